import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylhf.batch import Pair, RewardExample
from raylhf.config.judgements import JudgementDataConfig
from raylhf.text.judgements import examples_digest, load_examples, split_examples

NAN = math.nan
USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
WHAT = {"role": "assistant", "content": "What?"}
DOCS = Path(__file__).parents[2] / "docs" / "reward_data.md"


def load(tmp_path, kind, *rows, attributes=(), **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(JudgementDataConfig(path=str(path), kind=kind, **settings), attributes=attributes)


def load_one(tmp_path, kind, *rows, **settings):
    (example,) = load(tmp_path, kind, *rows, **settings).examples
    return example


def some_examples(n):
    return [RewardExample(index=i, messages=(), responses=(f"r{i}",)) for i in range(n)]


def test_a_pair_of_strings_keeps_its_margin_and_agreement_and_ranks_its_two_responses(tmp_path):
    row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "margin": 2, "agreement": 0.75, "id": 7}
    example = load_one(tmp_path, "pairs", row)
    assert example.messages == (USER,)
    assert example.responses == ("Hello!", "What?")
    assert example.pairs == (Pair(0, 1, margin=2.0, agreement=0.75),)
    np.testing.assert_array_equal(example.ranks, [1, 2])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"chosen": [USER, HELLO], "rejected": [USER, WHAT]},
        {"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, WHAT]},
        {"prompt": [USER], "chosen": [HELLO], "rejected": [WHAT]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What? "},
    ],
)
def test_every_form_of_a_pair_is_the_same_example(tmp_path, row):
    example = load_one(tmp_path, "pairs", row, system_prompt="Be kind.")
    assert example.messages == ({"role": "system", "content": "Be kind."}, USER)
    assert example.responses == ("Hello!", "What?")
    assert example.pairs == (Pair(0, 1),)


def test_a_transcript_has_turns_only_after_blank_lines_and_joins_the_turns_of_one_speaker(tmp_path):
    start = "\n\nHuman: He said Human: no.\n\nAssistant: Who?\nHuman: you mean?\n\nHuman: Tom."
    example = load_one(
        tmp_path,
        "pairs",
        {
            "chosen": start + "\n\nAssistant: I see.\n\nAssistant: Go on.",
            "rejected": start + "\n\nAssistant: No Assistant: here.",
        },
    )
    assert example.messages == (
        {"role": "user", "content": "He said Human: no."},
        {"role": "assistant", "content": "Who?\nHuman: you mean?"},
        {"role": "user", "content": "Tom."},
    )
    assert example.responses == ("I see.\n\nGo on.", "No Assistant: here.")


def test_identical_pairs_are_left_out_and_counted_and_indices_run_on(tmp_path):
    judgements = load(
        tmp_path,
        "pairs",
        {"prompt": "a", "chosen": "x", "rejected": "x"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
    )
    assert [(e.index, e.messages[0]["content"]) for e in judgements.examples] == [(0, "b")]
    assert (judgements.num_rows, judgements.num_identical) == (2, 1)
    with pytest.raises(ValueError, match=r"holds no judgements: 1 rows, 1 of identical texts"):
        load(tmp_path, "pairs", {"prompt": "a", "chosen": "x", "rejected": "x"})


def test_all_pairs_of_a_prompt_become_one_example_with_contradictions_kept_and_counted(tmp_path):
    judgements = load(
        tmp_path,
        "pairs",
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "z", "rejected": "x", "margin": 1},
        {"prompt": "a", "chosen": "y", "rejected": "x"},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    )
    first, second = judgements.examples
    assert first.responses == ("x", "y", "z")
    assert first.pairs == (Pair(0, 1), Pair(2, 0, margin=1.0), Pair(1, 0), Pair(0, 1))
    assert first.ranks is None
    assert (second.index, second.pairs) == (1, (Pair(0, 1),))
    assert (judgements.num_rows, judgements.num_duplicates, judgements.num_contradictions) == (5, 1, 1)


def test_rows_without_a_prompt_are_one_example_where_their_responses_are_the_same(tmp_path):
    rows = [{"chosen": "x", "rejected": "y"}, {"chosen": "x", "rejected": "z"}, {"chosen": "y", "rejected": "x"}]
    examples = load(tmp_path, "pairs", *rows, {"prompt": "", **rows[0]}, system_prompt="Be kind.").examples
    assert [(e.index, e.messages, e.responses) for e in examples] == [(0, (), ("x", "y")), (1, (), ("x", "z"))]
    assert examples[0].pairs == (Pair(0, 1), Pair(1, 0), Pair(0, 1))


def test_a_response_judged_twice_without_a_prompt_never_leaks_into_the_held_out_part(tmp_path):
    rows = [{"response": f"r{i // 2}", "score": i} for i in range(20)]
    examples = load(tmp_path, "scores", *rows).examples
    assert [e.targets is not None and e.targets[0, 0] for e in examples] == [2 * i + 0.5 for i in range(10)]
    train, held_out = split_examples(examples, 0.5, seed=0)
    assert not {e.responses for e in train} & {e.responses for e in held_out}


def test_a_ranking_without_ranks_is_best_first(tmp_path):
    example = load_one(tmp_path, "rankings", {"prompt": "Hi", "responses": ["a", "b", "c"]})
    np.testing.assert_array_equal(example.ranks, [1, 2, 3])
    assert example.pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2))


def test_ties_and_two_unranked_responses_make_no_pair_and_ranked_beats_unranked(tmp_path):
    row = {"prompt": "Hi", "responses": ["a", "b", "c", "d", "e"], "ranks": [2, 1, 2, None, None]}
    example = load_one(tmp_path, "rankings", row)
    np.testing.assert_array_equal(example.ranks, [2, 1, 2, NAN, NAN])
    beats = {(0, 3), (0, 4), (1, 0), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4)}
    assert {(pair.chosen, pair.rejected) for pair in example.pairs} == beats
    assert len(example.pairs) == len(beats)


def test_a_text_ranked_twice_in_one_row_takes_its_mean_place(tmp_path):
    example = load_one(tmp_path, "rankings", {"prompt": "Hi", "responses": ["a", "b", "a", "c"]})
    np.testing.assert_array_equal(example.ranks, [2, 2, 4])
    assert example.pairs == (Pair(0, 2), Pair(1, 2))


def test_two_rankings_of_a_prompt_give_comparisons_only(tmp_path):
    rows = [{"prompt": "Hi", "responses": ["a", "b"]}, {"prompt": "Hi", "responses": ["c", "b", "a"]}]
    judgements = load(tmp_path, "rankings", *rows)
    (example,) = judgements.examples
    assert example.ranks is None
    assert example.pairs == (Pair(0, 1), Pair(2, 1), Pair(2, 0), Pair(1, 0))
    assert judgements.num_contradictions == 1


def test_scores_in_one_row_or_in_several_are_the_same_example(tmp_path):
    together = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "scores": [1, 3.5, None, 1]}
    apart = [
        {"prompt": "Hi", "response": text, "score": score}
        for text, score in zip(together["responses"], together["scores"], strict=True)
    ]
    example = load_one(tmp_path, "scores", together)
    np.testing.assert_array_equal(example.targets, [[1], [3.5], [NAN], [1]])
    np.testing.assert_array_equal(example.target_stds, np.full((4, 1), NAN))
    np.testing.assert_array_equal(example.ranks, [2, 1, NAN, 2])
    assert example.pairs == (Pair(1, 0, margin=2.5), Pair(1, 3, margin=2.5))
    assert examples_digest([load_one(tmp_path, "scores", *apart)]) == examples_digest([example])


def test_a_response_scored_by_several_rows_takes_their_mean_and_the_spread_of_all_raters(tmp_path):
    rows = [
        {"prompt": "Hi", "response": "a", "score": 1, "score_std": 0.6},
        {"prompt": "Hi", "response": "b", "score": 7, "score_std": 0.5},
        {"prompt": "Hi", "response": "a", "score": 3, "score_std": 0.8},
        {"prompt": "Hi", "response": "a", "score": None},
    ]
    example = load_one(tmp_path, "scores", *rows)
    np.testing.assert_array_equal(example.targets, [[2], [7]])
    # Of a: the mean of 0.36 and 0.64 is 0.5, and the variance of 1 and 3 is 1.
    assert example.target_stds is not None
    assert example.target_stds[:, 0].tolist() == pytest.approx([math.sqrt(1.5), 0.5])


def test_raters_in_rows_of_their_own_give_a_spread_and_a_single_one_gives_none(tmp_path):
    rows = [{"prompt": "Hi", "response": text, "score": score} for text, score in [("a", 2), ("b", 5), ("a", 4)]]
    np.testing.assert_array_equal(load_one(tmp_path, "scores", *rows).target_stds, [[1], [NAN]])


def test_attributes_follow_the_names_asked_for_and_make_no_comparisons(tmp_path):
    rows = [
        {"prompt": "Hi", "responses": ["a", "b"], "attributes": [{"good": 1, "other": "?"}, {"long": 2, "good": None}]},
        {"prompt": "Yo", "response": "c", "attributes": {"long": 4}},
    ]
    first, second = load(tmp_path, "attributes", *rows, attributes=("long", "good")).examples
    np.testing.assert_array_equal(first.targets, [[NAN, 1], [2, NAN]])
    np.testing.assert_array_equal(second.targets, [[4, NAN]])
    assert (first.pairs, first.ranks) == ((), None)


def test_an_attribute_that_no_row_has_and_scores_that_are_all_missing_are_refused(tmp_path):
    row = {"prompt": "Hi", "response": "a", "attributes": {"good": 1, "kind": None}}
    with pytest.raises(ValueError, match=r"no row with a number for kind, nice; .*objective\.head\.attributes"):
        load(tmp_path, "attributes", row, attributes=("good", "kind", "nice"))
    with pytest.raises(ValueError, match=r"needs the names to learn; set objective\.head\.attributes"):
        load(tmp_path, "attributes", row)
    with pytest.raises(ValueError, match="no row with a number for score"):
        load(tmp_path, "scores", {"prompt": "Hi", "response": "a", "score": None})


def test_step_ends_cut_the_joined_response_into_its_steps(tmp_path):
    steps = ["2 * 3 = 6", "6 + 1 = 8", "so 8"]
    example = load_one(
        tmp_path, "steps", {"prompt": "?", "steps": steps, "labels": [1, False, None]}, step_separator="\n--\n"
    )
    assert example.responses == ("2 * 3 = 6\n--\n6 + 1 = 8\n--\nso 8",)
    (ends,), (labels,) = example.step_ends, example.step_labels
    assert ends.tolist() == [9, 22, 30]
    assert ends.dtype == np.int64
    assert [example.responses[0][end - len(step) : end] for end, step in zip(ends, steps, strict=True)] == steps
    np.testing.assert_array_equal(labels, [1, 0, NAN])


@pytest.mark.parametrize(
    ("first_error", "labels"),
    [(0, [0, NAN, NAN]), (1, [1, 0, NAN]), (2, [1, 1, 0]), (-1, [1, 1, 1]), (None, [1, 1, 1])],
)
def test_steps_before_the_first_error_are_right_and_those_after_it_not_judged(tmp_path, first_error, labels):
    example = load_one(tmp_path, "steps", {"prompt": "?", "steps": ["a", "b", "c"], "first_error": first_error})
    np.testing.assert_array_equal(example.step_labels[0], labels)


def test_a_solution_labelled_by_several_rows_takes_the_majority_of_each_step(tmp_path):
    labels = [[1, 1, 1, None], [1, 0, 0, None], [0, 0, None, 1]]
    rows = [{"prompt": "?", "steps": ["a", "b", "c", "d"], "labels": row} for row in labels]
    judgements = load(tmp_path, "steps", rows[0], {"prompt": "?", "steps": ["e"], "labels": [0]}, *rows[1:])
    (example,) = judgements.examples
    np.testing.assert_array_equal(example.step_labels[0], [1, 0, NAN, 1])
    np.testing.assert_array_equal(example.step_labels[1], [0])
    assert judgements.num_contradictions == 3
    with pytest.raises(ValueError, match=r"line 2: steps cuts a solution otherwise than an earlier row"):
        load(tmp_path, "steps", rows[0], {"prompt": "?", "steps": ["a\n\nb", "c", "d"], "first_error": -1})


@pytest.mark.parametrize(
    ("kind", "row", "sentence"),
    [
        ("pairs", {"prompt": "Hi", "chosen": "a"}, "no field 'rejected' .* ['chosen', 'prompt']"),
        ("pairs", {"prompt": "Hi", "chosen": "a", "rejected": [WHAT]}, "chosen is a str and rejected a list"),
        ("pairs", {"prompt": "Hi", "chosen": 1, "rejected": 2}, "both must be strings or both lists"),
        ("pairs", {"prompt": [USER, HELLO], "chosen": "a", "rejected": "b"}, "the last message is the assistant's"),
        ("pairs", {"chosen": [USER, HELLO], "rejected": [HELLO, WHAT]}, "differ before the last turn"),
        ("pairs", {"chosen": [USER], "rejected": [USER]}, "chosen must end with a message of the assistant"),
        ("pairs", {"chosen": [], "rejected": []}, "chosen must end with a message of the assistant"),
        ("pairs", {"chosen": [USER, HELLO], "rejected": [{"role": "x"}]}, "rejected[0]: {'role': 'x'} is no chat"),
        ("pairs", {"prompt": "Yo", "chosen": [USER, HELLO], "rejected": [USER, WHAT]}, "leave prompt out"),
        ("pairs", {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "b"}, "rejected must be an HH transcript"),
        ("pairs", {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}, "chosen must end with a message"),
        (
            "pairs",
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Yo\n\nAssistant: b"},
            "differ before the last turn",
        ),
        ("pairs", {"chosen": "a", "rejected": "b", "margin": -1}, "margin is -1; .* >= 0"),
        ("pairs", {"chosen": "a", "rejected": "b", "margin": "1"}, "margin is '1'; .* without quotes"),
        ("pairs", {"chosen": "a", "rejected": "b", "agreement": 1.5}, "agreement is 1.5; .* >= 0 and <= 1"),
        ("pairs", {"chosen": "a", "rejected": "b", "agreement": 0.25}, "swap chosen and rejected and write 0.75"),
        ("rankings", {"responses": ["a"]}, "responses must be a list of strings, 2 or more"),
        ("rankings", {"responses": ["a", None]}, "responses must be a list of strings"),
        ("rankings", {"responses": ["a", "b"], "ranks": [1]}, "ranks has 1 values; it must be a list of 2"),
        ("rankings", {"responses": ["a", "b"], "ranks": [1, 0]}, "ranks[1] is 0; .* >= 1"),
        ("rankings", {"responses": ["a", "b"], "ranks": [None, None]}, "every value of ranks is null"),
        ("scores", {"response": "a"}, "no field 'score'"),
        ("scores", {"score": 1}, "no field 'response'"),
        ("scores", {"response": 5, "score": 1}, "response is 5; it must be a string"),
        ("scores", {"response": "a", "score": "4"}, "score is '4'"),
        ("scores", {"response": "a", "score": True}, "score is True"),
        ("scores", {"response": "a", "score": NAN}, "score is nan; it must be a finite number"),
        ("scores", {"response": "a", "score": 3.5e38}, "score is beyond float32, whose largest number is 3.4e+38"),
        ("scores", {"response": "a", "score": -(10**400)}, "score is beyond float32"),
        ("scores", {"response": "a", "score": 1, "score_std": -1}, "std of score is -1; .* >= 0"),
        ("scores", {"responses": ["a", "b"], "scores": 1}, "scores has 1; it must be a list of 2"),
        ("scores", {"responses": ["a", "b"], "scores": [1, math.inf]}, "scores[1] is inf"),
        ("attributes", {"response": "a", "attributes": 3}, "attributes is 3; it must be an object"),
        ("attributes", {"responses": ["a"], "attributes": [{"good": "5"}]}, "attributes[0].good is '5'"),
        ("steps", {"steps": ["a"]}, "no field 'first_error'"),
        ("steps", {"steps": ["a", ""], "labels": [1, 1]}, "steps[1] is empty"),
        ("steps", {"steps": "a", "labels": [1]}, "steps must be a list of strings, 1 or more"),
        ("steps", {"steps": ["a"], "labels": [2]}, "labels[0] is 2; it must be 1 (right), 0 (wrong) or null"),
        ("steps", {"steps": ["a"], "labels": ["1"]}, "labels[0] is '1'"),
        ("steps", {"steps": ["a"], "labels": [1], "first_error": 0}, "both labels and first_error are given"),
        (
            "steps",
            {"steps": ["a"], "first_error": 1},
            "first_error is 1; it must be the position of one of the 1 steps",
        ),
        ("steps", {"steps": ["a"], "first_error": "0"}, "first_error is '0'"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, kind, row, sentence):
    good = {
        "pairs": {"chosen": "a", "rejected": "b"},
        "rankings": {"responses": ["a", "b"]},
        "scores": {"response": "a", "score": 1},
        "attributes": {"response": "a", "attributes": {"good": 1}},
        "steps": {"steps": ["a"], "labels": [1]},
    }[kind]
    pattern = r"a\.jsonl, line 2.*" + re.escape(sentence).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        load(tmp_path, kind, good, row, attributes=("good",))


def test_null_fields_of_parquet_rows_count_as_absent(tmp_path):
    rows = [{"prompt": None, "chosen": "a", "rejected": "b", "margin": None, "agreement": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (example,) = load_examples(JudgementDataConfig(path=str(tmp_path), kind="pairs")).examples
    assert (example.messages, example.pairs) == ((), (Pair(0, 1, margin=0.0, agreement=0.5),))


def test_held_out_judgements_come_from_their_own_path_and_its_setting_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "b", "chosen": "x", "rejected": "y"}')
    config = JudgementDataConfig(path=str(tmp_path / "gone.jsonl"), kind="pairs")
    (example,) = load_examples(config, path=str(tmp_path / "test.jsonl")).examples
    assert example.messages[0]["content"] == "b"
    with pytest.raises(ValueError, match=r"^data\.held_out_path=.*no such file"):
        load_examples(config, path=str(tmp_path / "test.parquet"))


def test_a_subset_is_the_value_of_the_prompts_first_row(tmp_path):
    rows = [{"prompt": p, "chosen": c, "rejected": "y", "level": n} for p, c, n in [("a", "x", 3), ("a", "z", 4)]]
    rows.append({"prompt": "b", "chosen": "x", "rejected": "y"})
    examples = load(tmp_path, "pairs", *rows, subset_key="level").examples
    assert [example.subset for example in examples] == ["3", ""]
    with pytest.raises(ValueError, match=r"no row with the field 'lvl'; correct data\.subset_key"):
        load(tmp_path, "pairs", *rows, subset_key="lvl")


def test_a_split_takes_whole_prompts_by_share_or_number_and_depends_on_the_seed_alone():
    examples = some_examples(20)
    training, held_out = split_examples(examples, 0.25, seed=1)
    assert len(held_out) == 5
    assert sorted(e.index for e in training + held_out) == list(range(20))
    for part in (training, held_out):
        assert [e.index for e in part] == sorted(e.index for e in part)
    assert [e.index for e in split_examples(examples, 5, seed=1)[1]] == [e.index for e in held_out]
    assert [e.index for e in split_examples(examples, 5, seed=2)[1]] != [e.index for e in held_out]
    assert len(split_examples(examples, 0.01, seed=1)[1]) == 1
    assert split_examples(examples, 0, seed=1) == (examples, [])


def test_a_split_that_leaves_nothing_to_train_on_or_cuts_a_prompt_is_refused():
    with pytest.raises(ValueError, match=r"data\.held_out=3 leaves nothing .* 3 prompts; set it to at most 2"):
        split_examples(some_examples(3), 3, seed=0)
    with pytest.raises(ValueError, match=r"data\.held_out=0\.1 leaves nothing"):
        split_examples(some_examples(1), 0.1, seed=0)
    with pytest.raises(ValueError, match=r"data\.held_out=1\.5 is no whole number"):
        split_examples(some_examples(3), 1.5, seed=0)


def test_the_digest_changes_with_any_judgement_and_is_the_same_in_another_process(tmp_path):
    row = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, None]}
    digest = examples_digest(load(tmp_path, "scores", row).examples)
    program = (
        "import sys\n"
        "from raylhf.config.judgements import JudgementDataConfig\n"
        "from raylhf.text.judgements import examples_digest, load_examples\n"
        "print(examples_digest(load_examples(JudgementDataConfig(path=sys.argv[1], kind='scores')).examples))\n"
        "assert not {'torch', 'transformers', 'datasets', 'ray'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.jsonl")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, digest), run.stderr
    assert re.fullmatch("[0-9a-f]{12}", digest)
    for changed in ({"prompt": "Yo"}, {"responses": ["a", "c"]}, {"scores": [1, 2]}, {"score_stds": [0.5, None]}):
        assert examples_digest(load(tmp_path, "scores", row | changed).examples) != digest


def test_every_example_line_of_the_documentation_is_read(tmp_path):
    kind, kinds = "scores", []
    for line in DOCS.read_text().splitlines():
        if line.startswith("## `kind:"):
            kind = line.removeprefix("## `kind: ").rstrip("`")
        elif line.startswith("{"):
            kinds.append(kind)
            load(tmp_path, kind, json.loads(line), attributes=("correct",))
    assert set(kinds) == {"pairs", "rankings", "scores", "attributes", "steps", "edits", "responses"}
