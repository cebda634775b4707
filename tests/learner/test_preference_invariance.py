"""The update of a preference loss is one function of the data, whatever ranks, micro-batches and ZeRO stage.

Online and on stored judgements; and what is left to learn from where there is little or nothing.
"""

from typing import Any

import numpy as np
import pytest
import torch
from preference_stand_ins import make_online_config, make_preference_config, policy_weights, scored_groups, share_of
from reward_stand_ins import on_ranks, random_text, write_rows

from raylhf.models.tiny import write_tiny_model

NUM_STEPS = 2
TOLERANCE = 2e-6

OFFLINE: dict[str, dict[str, Any]] = {
    "dpo": {"data": "rankings"},
    "kto": {"data": "rankings by scores"},
    "plackett_luce": {"data": "rankings"},
    "kldpo": {"data": "rankings", "loss": {"temperature": 0.2}},
    "tdpo2": {"data": "rankings"},
    "wdpo": {"data": "rankings", "loss": {"rho": 1e-3}, "model": {"attention": "eager"}},
    "aux_dpo": {"data": "rankings", "loss": {"offset_lr": 0.3}},
    "sft": {"data": "responses"},
    "dpo, a prompt a step": {"data": "rankings", "objective": {"batch_size": 1}},
    "dpo, apart": {"data": "rankings", "learner": {"packing": False}},
    "sft, apart": {"data": "responses", "learner": {"packing": False}},
    "kto, a prompt a step": {"data": "rankings by scores", "objective": {"batch_size": 1}},
}
ONLINE: dict[str, dict[str, Any]] = {
    "online dpo": {},
    "online kto": {},
    "online plackett_luce": {"objective": {"pairs": {}}},
    "online kldpo": {"loss": {"temperature": 0.2}},
    "online dpo, a rank without a pair": {"ties_from": 3},
}
SIZED = ("dpo", "kto", "plackett_luce", "online dpo")
"""Losses that are computed with micro-batches of more than two sizes."""
WHOLE_WEIGHTS = ("tdpo2", "wdpo", "aux_dpo")
"""Losses that ZeRO-3 cannot serve."""
STAGE_3 = (
    "dpo",
    "dpo, apart",
    "plackett_luce",
    "sft",
    "kto, a prompt a step",
    "online kto",
    "online dpo, a rank without a pair",
)


def judgements() -> dict[str, list[dict[str, Any]]]:
    """Groups of two to four ragged responses, some of them empty, one prompt of them without any comparison."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"rankings": [], "rankings by scores": [], "responses": []}
    for i in range(6):
        prompt, texts = f"prompt {'x' * i}", [random_text(rng) for _ in range(4 - i % 3)]
        texts[-1] = "" if i == 2 else texts[-1]
        places = [1, 1] if i == 5 else rng.permutation(len(texts)) + 1
        rows["rankings"].append({"prompt": prompt, "responses": texts, "ranks": [int(p) for p in places]})
        scores = [round(float(s), 2) for s in rng.random(len(texts))]
        rows["rankings by scores"].append({"prompt": prompt, "responses": texts, "scores": scores})
        rows["responses"].append({"prompt": prompt, "response": texts[0]})
    return rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, dict[str, str]]:
    base = tmp_path_factory.mktemp("compared")
    rows = judgements()
    rows["one sided"] = [{"prompt": f"p{i}", "response": "abcd"[i:], "score": 1.0} for i in range(3)]
    paths = {kind: write_rows(base / f"{kind}.jsonl", own) for kind, own in rows.items()}
    return write_tiny_model(base / "tiny"), paths


def config_of(name: str, sources: tuple[str, dict[str, str]], **learner: Any) -> Any:
    folder, paths = sources
    settings = {
        "data": "",
        "loss": {},
        "objective": {},
        "model": {},
        "learner": {},
        **OFFLINE.get(name, {}),
        **ONLINE.get(name, {}),
    }
    kind = name.removeprefix("online ").partition(",")[0]
    objective = {"kind": "sft"} if kind == "sft" else {"loss": {"kind": kind, "beta": 0.5, **settings["loss"]}}
    objective |= settings["objective"]
    learner |= settings["learner"]
    model = {"path": folder, **settings["model"]}
    if name in ONLINE:
        return make_online_config(folder, objective=objective, model=model, learner=learner)
    data = {"kind": {"rankings by scores": "scores", "one sided": "scores"}.get(settings["data"], settings["data"])}
    # One prompt is held out: with two ranks, one of them has nothing to evaluate on.
    data |= {"held_out": 1}
    return make_preference_config(
        folder, paths[settings["data"]], data=data, objective=objective, model=model, learner=learner
    )


def train(ranks, num_ranks, runs, folder):
    """Metrics and weights after a few steps of each run; a resumed run has those of its last step twice."""
    answers = {}
    for key, config in runs.items():
        worker = ranks.start(config)
        name = key[-1]
        if name in ONLINE:
            ties_from = ONLINE[name].get("ties_from", 6)
            batches = [scored_groups(step, ties_from=ties_from) for step in range(NUM_STEPS)]
            metrics = [worker.update(*share_of(groups, ranks.rank, num_ranks)) for groups in batches]
        else:
            metrics = [worker.update(step) for step in range(NUM_STEPS)]
            metrics.append(worker.evaluate()["metrics"])
        answers[key] = metrics, policy_weights(worker)
    return answers


@pytest.fixture(scope="module")
def on_one_rank(sources, tmp_path_factory):
    """Runs by micro-batch size and case; with 4096, every batch is one micro-batch."""
    sizes = {**dict.fromkeys((4096, 75), (*OFFLINE, *ONLINE)), **dict.fromkeys((30, 200), SIZED)}
    runs = {(size, name): config_of(name, sources, micro_batch_tokens=size) for size in sizes for name in sizes[size]}
    return on_ranks(train, 1, 1, runs, "")[0]


@pytest.fixture(scope="module")
def on_two_ranks(sources):
    """Both ranks' runs: every case with ZeRO 2, those with whole weights with 0 as well, the others with 3."""
    cases = {2: (*OFFLINE, *ONLINE), 0: ("dpo", "kto", "online dpo", *WHOLE_WEIGHTS), 3: STAGE_3}
    runs = {
        (stage, name): config_of(name, sources, micro_batch_tokens=75, zero_stage=stage)
        for stage, names in cases.items()
        for name in names
    }
    return on_ranks(train, 2, 2, runs, "")


def assert_same(found, expected):
    """Metrics of every step and the final weights."""
    (metrics, weights), (expected_metrics, expected_weights) = found, expected
    for step, (own, other) in enumerate(zip(metrics, expected_metrics, strict=True)):
        # While the policy is the reference, accuracy and its error are of rounding.
        ignored = {"pref/accuracy", "pref/accuracy_se"} if step == 0 else set()
        assert own.keys() == other.keys()
        for key in own.keys() - ignored - {"memory/learner_peak_gib"}:
            if not key.endswith(("_s", "mismatch/ratio_max")):
                assert own[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), (step, key)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("size", "case"),
    [*((75, case) for case in (*OFFLINE, *ONLINE)), *((size, case) for size in (30, 200) for case in SIZED)],
)
def test_micro_batches_of_any_size_give_the_update_of_one_batch(on_one_rank, case, size):
    assert_same(on_one_rank[size, case], on_one_rank[4096, case])


@pytest.mark.parametrize("case", ["dpo", "sft"])
def test_packed_lines_give_the_update_of_padded_rows(on_one_rank, case):
    assert_same(on_one_rank[75, f"{case}, apart"], on_one_rank[4096, case])


@pytest.mark.parametrize("case", [*OFFLINE, *ONLINE])
def test_two_ranks_give_the_update_of_one(on_one_rank, on_two_ranks, case):
    first, second = (answers[2, case] for answers in on_two_ranks)
    assert_same(first, on_one_rank[4096, case])
    for own, other in zip(second[0], first[0], strict=True):
        assert {k: v for k, v in own.items() if not k.endswith("_s")} == {
            k: v for k, v in other.items() if not k.endswith("_s")
        }


@pytest.mark.parametrize("case", ["dpo", "kto", "online dpo", *WHOLE_WEIGHTS])
def test_without_partitions_two_ranks_give_the_update_of_one(on_one_rank, on_two_ranks, case):
    assert_same(on_two_ranks[0][0, case], on_one_rank[4096, case])


@pytest.mark.parametrize("case", STAGE_3)
def test_zero_3_on_two_ranks_gives_the_update_of_one(on_one_rank, on_two_ranks, case):
    assert_same(on_two_ranks[0][3, case], on_one_rank[4096, case])


@pytest.mark.parametrize("case", [*OFFLINE, *ONLINE])
def test_every_step_moves_the_policy(on_one_rank, case):
    metrics, _ = on_one_rank[4096, case]
    assert all(m["policy/grad_norm"] > 0 for m in metrics[:NUM_STEPS])
    assert all(np.isfinite(value) for m in metrics for value in m.values())
