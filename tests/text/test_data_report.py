import json

import pytest

from raylhf.config.judgements import JudgementDataConfig
from raylhf.text.data_report import data_report, leaks, lines
from raylhf.text.judgements import load_examples


def load(path, kind, *rows, attributes=(), **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(JudgementDataConfig(path=str(path), kind=kind, **settings), attributes=attributes)


def report_of(judgements, **settings):
    return data_report(judgements.examples, [], loaded=[judgements], **settings)


def test_pairs_are_counted_with_their_length_bias_agreement_repeats_and_contradictions(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "one two three", "rejected": "one", "agreement": 0.75},
        {"prompt": "p", "chosen": "one", "rejected": "one two three", "agreement": 0.5},
        {"prompt": "q", "chosen": "a b", "rejected": "c d"},
        {"prompt": "q", "chosen": "a b", "rejected": "c d"},
        {"prompt": "r", "chosen": "same", "rejected": "same"},
    ]
    report = report_of(load(tmp_path / "a.jsonl", "pairs", *rows))
    assert (report.train.prompts, report.train.responses, report.train.comparisons) == (2, 4, 4)
    assert (report.num_rows, report.num_duplicates, report.num_identical, report.num_contradictions) == (5, 1, 1, 1)
    assert (report.words.mean, report.words.p50, report.words.max) == (2.0, 2.0, 3)
    assert report.words.p95 == pytest.approx(2.85)  # 0.95 of the three gaps of 1, 2, 2, 3 ends between 2 and 3
    assert report.chosen_longer == 0.5  # pairs of equal length do not count
    assert report.mean_agreement == 0.625
    assert (report.right_steps, report.scores, report.subsets) == (None, (), ())


def test_ties_and_rankings_are_counted_over_placed_responses(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [1, 1, 2, None]},
        {"prompt": "q", "responses": ["a", "b"]},
    ]
    report = report_of(load(tmp_path / "a.jsonl", "rankings", *rows))
    assert report.train.rankings == 1
    assert report.train.comparisons == 6
    assert report.tied == 0.25  # one of three pairs of placed responses, and none of one


def test_scores_are_summed_up_by_attribute(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "attributes": [{"good": 1, "long": 5}, {"good": 3}]},
        {"prompt": "q", "response": "a", "attributes": {"good": 5}},
    ]
    names = ("good", "long")
    report = report_of(load(tmp_path / "a.jsonl", "attributes", *rows, attributes=names), attributes=names)
    good, long = report.scores
    assert (good.name, good.num, good.min, good.mean, good.max) == ("good", 3, 1.0, 3.0, 5.0)
    assert good.sd == pytest.approx((8 / 3) ** 0.5)
    assert (long.name, long.num, long.mean) == ("long", 1, 5.0)
    assert report.train.scores == 4


def test_labelled_steps_and_the_share_of_right_ones_leave_out_what_nobody_judged(tmp_path):
    rows = [{"prompt": "p", "steps": ["a", "b", "c", "d"], "first_error": 2}]
    report = report_of(load(tmp_path / "a.jsonl", "steps", *rows))
    assert report.train.labelled_steps == 3
    assert report.right_steps == pytest.approx(2 / 3)


def test_prompts_and_responses_of_both_parts_are_leaks_and_rows_without_a_prompt_share_none(tmp_path):
    train = load(
        tmp_path / "a.jsonl", "pairs", *({"prompt": p, "chosen": "x", "rejected": "y"} for p in ("a", "b", ""))
    )
    held_out = load(
        tmp_path / "b.jsonl",
        "pairs",
        *({"prompt": p, "chosen": "x", "rejected": "z", "level": 1} for p in ("b", "c", "")),
        subset_key="level",
    )
    assert leaks(train.examples, held_out.examples) == (1, 1)
    report = data_report(train.examples, held_out.examples, loaded=[train, held_out])
    assert (report.shared_prompts, report.shared_responses) == (1, 1)
    assert report.num_rows == 6
    assert report.subsets == (("", 3), ("1", 3))


def test_lines_say_what_the_data_has_and_nothing_else(tmp_path):
    rows = [{"prompt": "p", "response": "a", "score": 1}, {"prompt": "p", "response": "b c", "score": 2}]
    assert dict(lines(report_of(load(tmp_path / "a.jsonl", "scores", *rows)))) == {
        "rows read": "2",
        "prompts": "1 train, 0 held out",
        "responses": "2 train, 0 held out",
        "comparisons": "1 train, 0 held out",
        "scores": "2 train, 0 held out",
        "repeated rows": "0",
        "left out (identical texts)": "0",
        "judged both ways": "0",
        "words a response": "mean 1.5, p50 2, p95 2, max 2",
        "chosen is longer": "100.0%",
        "ties": "0.0%",
        "score: score": "2, min 1, mean 1.5, sd 0.5, max 2",
        "held-out prompts also in train": "0",
        "held-out responses also in train": "0",
    }
