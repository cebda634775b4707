"""The update of a reward model is one function of the data, whatever ranks, micro-batches, passes and ZeRO stage."""

from typing import Any

import numpy as np
import pytest
import torch
from reward_stand_ins import make_reward_config, on_ranks, random_text, tiny_folder, weights_of, worth, write_rows

from raylhf.models.load import load_causal_lm, load_tokenizer
from raylhf.models.reward import build_reward_model, export_reward_model

NUM_STEPS = 3  # two epochs of 9 prompts in batches of 6: a batch of 3 is among them, with 2 ranks
TOLERANCE = 2e-6

CASES: dict[str, dict[str, Any]] = {
    "mse": {"kind": "scores", "loss": {"kind": "mse"}},
    "mse with raters": {"kind": "scores", "loss": {"kind": "mse", "use_rater_std": True, "standardize": False}},
    "attributes": {
        "kind": "attributes",
        "loss": {"kind": "mse"},
        "head": {"kind": "multi_value", "attributes": ("worth", "length")},
    },
    "bradley_terry": {
        "kind": "pairs",
        "loss": {"kind": "bradley_terry", "use_margin": True, "label_smoothing": 0.1, "center_coef": 0.01},
    },
    "bradley_terry on rankings": {"kind": "rankings", "loss": {"kind": "bradley_terry"}},
    "one prompt a step": {
        "kind": "rankings",
        "loss": {"kind": "bradley_terry"},
        "objective": {"batch_size": 1},  # one of two ranks has nothing
    },
    "plackett_luce": {"kind": "rankings", "loss": {"kind": "plackett_luce"}},
    "plackett_luce on pairs": {"kind": "pairs", "loss": {"kind": "plackett_luce", "top": 1}},
    "token_aggregate": {
        "kind": "rankings",
        "loss": {"kind": "token_aggregate", "aggregate": "sum"},
        "head": {"kind": "token"},
    },
    "token_step": {
        "kind": "rankings",
        "loss": {"kind": "token_step", "past_shorter": "hold"},
        "head": {"kind": "token"},
    },
    "process": {"kind": "steps", "loss": {"kind": "process"}, "head": {"kind": "token"}},
    "shared ensemble": {
        "kind": "rankings",
        "loss": {"kind": "bradley_terry"},
        "head": {"kind": "ensemble", "members": 3},
    },
    "lora ensemble": {
        "kind": "scores",
        "loss": {"kind": "mse"},
        "head": {"kind": "ensemble", "members": 2, "trunk": "lora"},
        "learner": {"lora": {"rank": 4}},
    },
    "upper layers": {
        "kind": "rankings",
        "loss": {"kind": "plackett_luce"},
        "objective": {"trainable_layers": 1},
    },
}


def judgements() -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind: ragged, with ties, missing places, scores and labels, and prompts without any comparison."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("scores", "attributes", "pairs", "rankings", "steps")
    }
    for i in range(9):
        prompt = f"prompt {i}"
        texts = [random_text(rng) for _ in range(1 + i % 4)]
        scores = [round(worth(text), 1) for text in texts]
        stds = [None if rng.random() < 0.3 else float(rng.uniform(0.1, 1)) for _ in texts]
        rows["scores"].append({"prompt": prompt, "responses": texts, "scores": scores, "score_stds": stds})
        values = [
            {"worth": s, "length": None if rng.random() < 0.4 else len(t)} for s, t in zip(scores, texts, strict=True)
        ]
        rows["attributes"].append({"prompt": prompt, "responses": texts, "attributes": values})
        for _ in range(1 + i % 2):
            pair = {"prompt": prompt, "chosen": random_text(rng), "rejected": random_text(rng)}
            extra = {"margin": float(rng.random())} | ({"agreement": 0.8} if rng.random() < 0.5 else {})
            rows["pairs"].append(pair | extra)
        many = [random_text(rng) for _ in range(2 + i % 3)]
        places = [[1, 1, 1, 1], [1, 2, 2, 3], [2, 1, None, None]][i % 3][: len(many)]
        rows["rankings"].append({"prompt": prompt, "responses": many, "ranks": places})
        steps = [random_text(rng) for _ in range(1 + i % 3)]
        labels = [int(worth(step) > 0) if rng.random() < 0.8 else None for step in steps]
        rows["steps"].append({"prompt": prompt, "steps": steps, "labels": labels})
    return rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, dict[str, str]]:
    base = tmp_path_factory.mktemp("judged")
    paths = {kind: write_rows(base / f"{kind}.jsonl", rows) for kind, rows in judgements().items()}
    return tiny_folder(base / "tiny"), paths


def config_of(name: str, sources: tuple[str, dict[str, str]], **learner: Any) -> Any:
    folder, paths = sources
    case = dict(CASES[name])
    settings = {**case.pop("learner", {}), **learner}
    return make_reward_config(folder, paths[case["kind"]], **case, learner=settings)


def train(ranks, runs, folder):
    """Metrics and weights after a few steps of each run; a resumed run has those of its last step twice."""
    answers = {}
    for name, config in runs.items():
        worker = ranks.start(config)
        metrics = [worker.update(step) for step in range(NUM_STEPS)]
        answers[name] = metrics, weights_of(worker)
        if name[0] == "resumed":
            answers[name] = save_and_resume(ranks, config, f"{folder}/{name[1]}"), answers[name]
    return answers


def save_and_resume(ranks, config, folder):
    """What the last step gives after it was left to a new worker."""
    before = ranks.start(config)
    metrics = [before.update(step) for step in range(NUM_STEPS - 1)]
    before.save(folder)
    after = ranks.start(config)
    assert after.load(folder) == NUM_STEPS - 1
    return [*metrics, after.update(NUM_STEPS - 1)], weights_of(after)


RESUMED = {"shared ensemble": 2, "lora ensemble": 2, "upper layers": 0, "token_aggregate": 3}
"""ZeRO stage of the cases that are stopped and resumed, on two ranks."""
STARTED = ("bradley_terry on rankings", "token_aggregate", "shared ensemble", "one prompt a step")
"""Cases that also start from a head that is there already, as ZeRO-3 draws a new one in another way."""


@pytest.fixture(scope="module")
def headed(sources, tmp_path_factory) -> dict[str, str]:
    """Folders of reward models, by case."""
    base, folders = tmp_path_factory.mktemp("headed"), {}
    for name in STARTED:
        head = config_of(name, sources).objective.head
        fixed = {"attention": "sdpa", "trust_remote_code": False, "lora": None, "trainable_layers": None}
        model = build_reward_model(sources[0], head=head, dtype=torch.float32, seed=5, **fixed)
        folders[name] = str(base / name)
        state = {key: weight.detach() for key, weight in model.hf.named_parameters()}
        tokenizer = load_tokenizer(sources[0])
        export_reward_model(model, folders[name], state=state, tokenizer=tokenizer, calibration=None)
    return folders


def started_runs(sources, headed, *, stage: int) -> dict[tuple[str, str], Any]:
    """Runs that start from a whole reward model, in two passes."""
    learner = {"zero_stage": stage, "micro_batch_tokens": 60}
    return {("started", name): config_of(name, (headed[name], sources[1]), **learner) for name in STARTED}


@pytest.fixture(scope="module")
def on_one_rank(sources, headed, tmp_path_factory):
    """Runs by micro-batch size and case; with 4096, every batch is one micro-batch."""
    runs = {
        (size, name): config_of(name, sources, micro_batch_tokens=size) for size in (4096, 40, 100) for name in CASES
    }
    return on_ranks(train, 1, {**runs, **started_runs(sources, headed, stage=0)}, str(tmp_path_factory.mktemp("one")))[
        0
    ]


@pytest.fixture(scope="module")
def on_two_ranks(sources, headed, tmp_path_factory):
    """Both ranks' runs: every case with ZeRO 2, some with 0 and 3, some resumed."""
    runs = {(2, name): config_of(name, sources, micro_batch_tokens=60, zero_stage=2) for name in CASES}
    runs |= {(0, name): config_of(name, sources, micro_batch_tokens=60, zero_stage=0) for name in STARTED}
    runs |= started_runs(sources, headed, stage=3)
    for name, stage in RESUMED.items():
        runs["resumed", name] = config_of(name, sources, micro_batch_tokens=60, zero_stage=stage)
    return on_ranks(train, 2, runs, str(tmp_path_factory.mktemp("two")))


def assert_same(found, expected):
    """Metrics of every step and the final weights."""
    (metrics, weights), (expected_metrics, expected_weights) = found, expected
    for step, (own, other) in enumerate(zip(metrics, expected_metrics, strict=True)):
        assert own.keys() == other.keys()
        for key in own.keys() - {"rm/tokens_per_s", "memory/learner_peak_gib"}:
            assert own[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (step, key)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [40, 100])
def test_small_micro_batches_and_two_passes_give_the_update_of_one_batch(on_one_rank, case, size):
    # With 40 tokens in a micro-batch, prompts with 3 and 4 responses take two passes.
    assert_same(on_one_rank[size, case], on_one_rank[4096, case])


@pytest.mark.parametrize(("stage", "case"), [*((2, case) for case in CASES), *((0, case) for case in STARTED)])
def test_two_ranks_give_the_update_of_one(on_one_rank, on_two_ranks, case, stage):
    first, second = (answers[stage, case] for answers in on_two_ranks)
    assert_same(first, on_one_rank[4096, case])
    for step, metrics in enumerate(second[0]):
        assert metrics == first[0][step] | {"rm/tokens_per_s": metrics["rm/tokens_per_s"]}


@pytest.mark.parametrize("case", STARTED)
def test_zero_3_on_two_ranks_gives_the_update_of_one_rank(on_one_rank, on_two_ranks, case):
    assert_same(on_two_ranks[0]["started", case], on_one_rank["started", case])


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_continues_to_the_bit(on_two_ranks, case):
    (metrics, weights), (expected_metrics, expected_weights) = on_two_ranks[0]["resumed", case]
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    assert metrics[-1]["rm/loss"] == expected_metrics[-1]["rm/loss"]


@pytest.mark.parametrize("case", CASES)
def test_the_update_moves_the_head_and_the_trunk(on_one_rank, sources, case):
    metrics, weights = on_one_rank[4096, case]
    start = dict(
        load_causal_lm(sources[0], dtype=torch.float32, attention="sdpa", trust_remote_code=False).named_parameters()
    )
    assert all(m["rm/grad_norm"] > 0 for m in metrics)
    learnt = {name for name, weight in weights.items() if name in start and (weight - start[name]).abs().max() > 1e-3}
    assert learnt or any("lora_B" in name and weight.abs().max() > 1e-3 for name, weight in weights.items())
