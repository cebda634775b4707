"""Reward models learn a planted truth; what is evaluated, exported and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_stand_ins import LETTERS, make_reward_config, on_ranks, random_text, tiny_folder, worth, write_rows
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

NUM_PROMPTS, NUM_STEPS = 150, 60
HELD_OUT = 30
PLANTED = {
    "mse": {"kind": "mse"},
    "bradley_terry": {"kind": "bradley_terry"},
    "plackett_luce": {"kind": "plackett_luce"},
    "token_aggregate": {"kind": "token_aggregate"},
}
EXPORTS = {
    "scalar": {"kind": "scalar"},
    "ensemble": {"kind": "ensemble", "members": 3},
    "lora": {"kind": "ensemble", "members": 2, "trunk": "lora"},
}


def settings(**learner):
    """What the planted runs share."""
    return {
        "data": {"held_out": HELD_OUT},
        "learner": {
            "lr": 3e-3,
            "adam_eps": 1e-8,
            "lr_schedule": "linear",
            "lr_warmup_steps": 5,
            "micro_batch_tokens": 4096,
            **learner,
        },
        "objective": {"batch_size": 16},
    }


def spoiled(rng: np.random.Generator, text: str) -> str:
    """The text with one guilty letter."""
    place = int(rng.integers(len(text)))
    return f"{text[:place]}x{text[place + 1 :]}"


def scored_rows(rng: np.random.Generator) -> list[dict]:
    rows = []
    for i in range(NUM_PROMPTS):
        texts = list(dict.fromkeys(random_text(rng, 6, 12) for _ in range(4)))
        rows.append({"prompt": str(i), "responses": texts, "scores": [worth(text) for text in texts]})
    return rows


def attribute_rows(rng: np.random.Generator) -> list[dict]:
    """Two values that pull apart; the second one is missing for half of the responses."""
    rows = []
    for i in range(NUM_PROMPTS):
        text = random_text(rng, 6, 12)
        other = text.count("a") / len(text) if i % 2 else None
        rows.append({"response": text, "attributes": {"Worth": worth(text), "First letter": other}})
    return rows


def guilty_rows(rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """Pairs of which the rejected text holds one guilty letter, and solutions whose wrong steps hold one."""

    def text(length: int) -> str:
        return "".join(rng.choice(list(LETTERS), length))

    pairs = [{"prompt": str(i), "chosen": text(10), "rejected": spoiled(rng, text(10))} for i in range(NUM_PROMPTS)]
    solutions = []
    for i in range(NUM_PROMPTS):
        is_wrong = rng.random(3) < 0.3
        steps = [spoiled(rng, text(5)) if wrong else text(5) for wrong in is_wrong]
        solutions.append({"prompt": str(i), "steps": steps, "labels": [int(not wrong) for wrong in is_wrong]})
    return pairs, solutions


def train_planted(ranks, runs):
    """Counts, metrics of the first and last step, and the evaluations before and after of each run."""
    answers = {}
    for name, config in runs.items():
        worker = ranks.start(config)
        before = worker.evaluate()
        metrics = [worker.update(step) for step in range(config.num_steps)]
        answers[name] = {"before": before, "metrics": metrics, "after": worker.evaluate()}
        if name == "guilty":
            answers[name]["caught"] = share_caught(worker)
    return answers


def share_caught(worker) -> float:
    """How often the lowest token score of a spoiled response is that of its guilty letter."""
    caught = []
    for encoded in worker._held_out:
        pair = encoded.example.pairs[0]
        row, text = encoded.rows[pair.rejected], encoded.example.responses[pair.rejected]
        with torch.no_grad():
            scores = worker._score([row])[0]
        places = np.flatnonzero(row.response_mask)
        caught.append(int(scores[places].argmin()) == text.index("x"))
    return float(np.mean(caught))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    base, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    folder = tiny_folder(base / "tiny")
    scores = write_rows(base / "scores.jsonl", scored_rows(rng))
    pairs, solutions = (write_rows(base / f"{i}.jsonl", rows) for i, rows in enumerate(guilty_rows(rng)))
    attributes = write_rows(base / "attributes.jsonl", attribute_rows(rng))
    token, two = {"kind": "token"}, {"kind": "multi_value", "attributes": ("Worth", "First letter")}
    fixed = {"num_steps": NUM_STEPS, **settings()}
    runs = {
        name: make_reward_config(
            folder, scores, kind="scores", loss=loss, head=token if name == "token_aggregate" else None, **fixed
        )
        for name, loss in PLANTED.items()
    }
    aggregate = {"kind": "token_aggregate", "aggregate": "mean"}
    runs["guilty"] = make_reward_config(folder, pairs, kind="pairs", loss=aggregate, head=token, **fixed)
    runs["process"] = make_reward_config(folder, solutions, kind="steps", loss={"kind": "process"}, head=token, **fixed)
    runs["attributes"] = make_reward_config(
        folder, attributes, kind="attributes", loss={"kind": "mse"}, head=two, **fixed
    )
    return on_ranks(train_planted, 1, runs)[0]


@pytest.mark.parametrize("loss", PLANTED)
def test_each_loss_recovers_the_order_of_a_known_scorer(planted, loss):
    before, after = planted[loss]["before"]["metrics"], planted[loss]["after"]["metrics"]
    assert before["rm_eval/spearman"] < 0.8
    assert after["rm_eval/spearman"] > 0.95
    assert after["rm_eval/loss"] < before["rm_eval/loss"] / 2
    assert after["rm_eval/accuracy"] > 0.9


def test_the_token_model_finds_the_guilty_token(planted):
    assert planted["guilty"]["caught"] > 0.95


def test_the_process_model_finds_the_first_wrong_step(planted):
    metrics = planted["process"]["after"]["metrics"]
    assert metrics["rm_eval/step_accuracy"] > 0.95
    assert metrics["rm_eval/first_error_f1"] > 0.95


def test_each_attribute_is_learnt_though_half_of_one_is_missing(planted):
    metrics = planted["attributes"]["after"]["metrics"]
    assert metrics["rm_eval/attribute/worth_spearman"] > 0.95
    assert metrics["rm_eval/attribute/first_letter_spearman"] > 0.8  # it has many ties at 0


def test_a_run_warms_its_learning_rate_up_and_down(planted):
    run = planted["mse"]
    rates = [metrics["rm/lr"] for metrics in run["metrics"]]
    assert rates[0] == pytest.approx(3e-3 / 5)
    assert rates[-1] == pytest.approx(3e-3 / NUM_STEPS)
    assert max(rates) == pytest.approx(3e-3 * (1 - 4 / NUM_STEPS))


def test_an_evaluation_travels_as_plain_values(planted):
    evaluation = planted["bradley_terry"]["after"]
    assert json.loads(json.dumps(evaluation["metrics"])) == evaluation["metrics"]
    assert len(evaluation["samples"]) == 3
    assert set(evaluation["samples"][0]) == {"prompt", "responses", "scores", "pairs", "targets"}
    assert sum(evaluation["reliability"]["counts"]) > 100
    assert planted["mse"]["after"]["reliability"] == {}


def train_and_export(ranks, runs, folder):
    """Scores of the held-out responses, from the worker that exported them; and what a diverged one says."""
    answers = {}
    for name, config in runs.items():
        worker = ranks.start(config)
        worker.update(0)
        worker.export(f"{folder}/{name}")
        answers[name] = worker._score_all(worker._held_out), worker.evaluate()
    answers["diverged"] = diverge(ranks.start(runs["token"]))
    return answers


def diverge(worker) -> str:
    """What a learner says whose weights are not numbers."""
    with torch.no_grad():
        next(worker._engine.module.parameters()).fill_(float("nan"))
    try:
        worker.update(1)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of exports, tiny model, both ranks' answers, held-out rows) with ZeRO 3 where the head allows."""
    base, rng = tmp_path_factory.mktemp("exported"), np.random.default_rng(1)
    folder = tiny_folder(base / "tiny")
    path = write_rows(base / "scores.jsonl", scored_rows(rng)[:20])
    runs = {}
    for name, head in EXPORTS.items():
        learner = {"zero_stage": 3 if name == "scalar" else 2, "lora": {"rank": 4} if name == "lora" else None}
        fixed = {**settings(**learner), "data": {"held_out": 4}}
        runs[name] = make_reward_config(folder, path, kind="scores", loss={"kind": "mse"}, head=head, **fixed)
    fixed = {**settings(), "data": {"held_out": 4}}
    runs["token"] = make_reward_config(
        folder, path, kind="scores", loss={"kind": "token_aggregate"}, head={"kind": "token"}, **fixed
    )
    answers = on_ranks(train_and_export, 2, runs, str(base))
    return base, runs, answers


def held_out_rows(config):
    """Of the run's held-out responses."""
    from raylhf.learner.reward_batch import encode_example
    from raylhf.models.load import load_tokenizer
    from raylhf.text.judgements import load_split

    tokenizer = load_tokenizer(config.model.path)
    held_out = load_split(config.data, config.objective.head, seed=config.seed).held_out
    return [row for e in held_out for row in encode_example(tokenizer, e, max_tokens=config.data.max_tokens).rows]


@pytest.mark.parametrize("name", ["scalar", "ensemble"])
def test_an_export_gives_the_same_scores_in_transformers_and_in_raylhf(exported, name):
    from raylhf.learner.reward_batch import pad_rows_of_tokens
    from raylhf.models.reward import load_reward_model

    base, runs, answers = exported
    expected, _ = answers[0][name]
    tokens, lengths = pad_rows_of_tokens(held_out_rows(runs[name]), torch.device("cpu"))
    loaded = load_reward_model(str(base / name), dtype=torch.float32)
    plain = AutoModelForSequenceClassification.from_pretrained(base / name, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(tokens, lengths)
        rows = [plain(tokens[i : i + 1, : lengths[i]]).logits[0] for i in range(len(tokens))]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.stack(rows), expected, rtol=0, atol=1e-5)
    assert loaded.calibration is not None
    assert loaded.calibration.n == len(expected)
    np.testing.assert_allclose(loaded.calibration.mean, expected.double().mean(0), atol=1e-6)
    np.testing.assert_allclose(loaded.calibration.q99, np.quantile(expected.double(), 0.99, axis=0), atol=1e-6)
    assert len(loaded.calibration.target_mean or ()) == expected.shape[1]


def test_an_exported_token_model_gives_the_same_token_scores_in_transformers(exported):
    base, runs, answers = exported
    expected, _ = answers[0]["token"]
    plain = AutoModelForTokenClassification.from_pretrained(base / "token", dtype=torch.float32)
    for i, row in enumerate(held_out_rows(runs["token"])):
        with torch.no_grad():
            found = plain(torch.from_numpy(row.ids)[None]).logits[0, :, 0]
        torch.testing.assert_close(found, expected[i, : len(found)], rtol=0, atol=1e-5)


def test_lora_members_are_exported_as_models_of_their_own(exported):
    base, runs, answers = exported
    expected, _ = answers[0]["lora"]
    for k in range(2):
        folder = Path(base, "lora", f"member_{k}")
        plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        row = held_out_rows(runs["lora"])[0]
        with torch.no_grad():
            found = plain(torch.from_numpy(row.ids)[None]).logits[0]
        torch.testing.assert_close(found, expected[0, k : k + 1], rtol=0, atol=1e-5)


def test_only_the_first_rank_has_an_evaluation_and_ensembles_tell_their_members(exported):
    _, _, (first, second) = exported
    assert second["ensemble"][1] == {}
    metrics = first["ensemble"][1]["metrics"]
    assert metrics["rm_eval/disagreement_mean"] > 0
    assert {f"rm_eval/member/{k}_accuracy" for k in range(3)} <= metrics.keys()


def test_a_diverged_reward_model_stops_the_run_with_a_sentence(exported):
    _, _, answers = exported
    assert "is nan in step 2: training has diverged" in answers[0]["diverged"]
