"""Every preference loss on stored judgements against plain loops: one response at a time, no padding, no masks.

Nothing of raylhf is used on this side but the settings' names: the formulas are those of the papers, the model is
Hugging Face's and the optimizer torch's own. The reference differs from the start, so every update has a gradient in
all terms.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_plain import PlainLearner
from preference_stand_ins import make_preference_config, policy_weights, put_reference, write_data, write_models
from reward_stand_ins import on_ranks, write_rows

from raylhf.models.tiny import write_tiny_model

NUM_UPDATES = 2
LATE = {"aux_dpo": 3}
"""The penalty on AuxDPO's offsets acts on their second step, which the third update of the policy sees."""
TOLERANCE = 5e-6

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": {"beta": 0.4}},
    "dpo on rankings": {"data": "rankings", "loss": {"kind": "dpo", "beta": 0.4}},
    "cdpo": {"loss": {"beta": 0.4, "label_smoothing": 0.2}},
    "robust_dpo": {"loss": {"beta": 0.4, "label_noise": 0.2}},
    "ipo": {"loss": {"beta": 0.4}},
    "simpo": {"loss": {"beta": 2.0, "gamma": 0.5}},
    "orpo": {"loss": {"odds_coef": 0.5}},
    "kto": {"data": "two prompts", "loss": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}},
    "kto on scores": {"data": "scores", "loss": {"kind": "kto", "beta": 0.4}},
    "beta_dpo": {"loss": {"beta": 0.4, "sensitivity": 0.3, "filter_share": 0.4, "decay": 0.7}},
    "alpha_dpo": {"loss": {"beta": 2.0, "alpha": 0.3, "decay": 0.7}},
    "tdpo1": {"loss": {"beta": 0.4}},
    "tdpo2": {"loss": {"beta": 0.4, "alpha": 0.7}},
    "tgdpo": {"loss": {"beta": 0.4, "alpha": 3.0}},
    "t_reg": {"loss": {"beta": 0.4, "alpha": 2.0}},
    "step_dpo": {"data": "steps", "loss": {"beta": 0.4}},
    "wdpo": {"loss": {"beta": 0.4, "rho": 1e-3}, "model": {"attention": "eager"}},
    "kldpo": {"loss": {"beta": 0.4, "temperature": 0.5}},
    "dr_dpo": {"loss": {"beta": 0.4, "temperature": 0.5}},
    "aux_dpo": {"loss": {"beta": 0.4, "bound": 2.0, "offset_lr": 0.3, "null_coef": 1e-4, "amplitude_coef": 0.5}},
    "modpo": {"loss": {"beta": 0.4, "weight": 0.5, "other_weights": {"calm": 0.3, "brief": 0.1}}},
    "ns_dpo": {"loss": {"beta": 0.4, "gamma": 0.8}},
    "plackett_luce": {"data": "rankings", "loss": {"beta": 0.4}},
    "plackett_luce on scores": {"data": "scores", "loss": {"kind": "plackett_luce", "beta": 0.4}},
    "sft": {"data": "responses"},
    "sft on pairs": {"data": "pairs"},
}
APART = ("dpo", "kto", "tdpo2", "tgdpo", "t_reg", "aux_dpo", "plackett_luce", "sft")
CASES |= {f"{case}, apart": CASES[case] for case in APART}
KINDS = {"two prompts": "pairs", "steps": "pairs"}
"""data.kind, where the file is called otherwise."""


def config_of(case: str, models: dict[str, str], paths: dict[str, str]) -> Any:
    settings = {"data": "pairs", "model": {}, **CASES[case]}
    data = settings["data"]
    if case.startswith("sft"):
        objective: dict[str, Any] = {"kind": "sft"}
    else:
        kind = case.removesuffix(", apart")
        loss = {"kind": kind, **settings["loss"]}
        objective = {"loss": loss | ({"guide": models["guide"]} if kind == "tgdpo" else {})}
    return make_preference_config(
        models["start"],
        paths[data],
        data={"kind": KINDS.get(data, data)},
        objective=objective,
        model={"path": models["start"], **settings["model"]},
        learner={"packing": not case.endswith(", apart")},
    )


POOR: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "all good": ("kto", "scores", [{"prompt": f"p{i}", "response": "abc"[i:], "score": 1} for i in range(3)]),
    "all bad": ("kto", "scores", [{"prompt": f"p{i}", "response": "abc"[i:], "score": 0} for i in range(3)]),
    "one prompt": ("kto", "pairs", [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
    "the same tokens": ("dpo", "pairs", [{"prompt": "p", "chosen": "eight letters", "rejected": "eight legs"}]),
    "empty responses": ("simpo", "pairs", [{"prompt": "p", "chosen": "", "rejected": "b"}]),
}
"""Loss, kind and rows of data that say little; texts are cut to eight tokens."""


def train(ranks, configs, poor, reference):
    """Losses and weights after each run's updates; of poor data, metrics and weights of one."""
    answers = {}
    for case, config in poor.items():
        worker = ranks.start(config)
        before = policy_weights(worker)
        answers[case] = worker.update(0), before, policy_weights(worker)
    for case, config in configs.items():
        worker = ranks.start(config)
        put_reference(worker, reference)
        losses = [worker.update(step)["policy/loss"] for step in range(LATE.get(case, NUM_UPDATES))]
        answers[case] = losses, policy_weights(worker)
    return answers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(settings by case, folders of models, what the learner made of them by case)."""
    folder = tmp_path_factory.mktemp("preference")
    models, paths = write_models(folder), write_data(folder)
    configs, poor = {case: config_of(case, models, paths) for case in CASES}, {}
    for case, (loss, kind, rows) in POOR.items():
        path = write_rows(folder / f"{case}.jsonl", rows)
        objective, data = {"loss": {"kind": loss}}, {"kind": kind, "max_tokens": 8}
        poor[case] = make_preference_config(models["start"], path, objective=objective, data=data)
    return configs, models, on_ranks(train, 1, configs, poor, models["reference"])[0]


@pytest.mark.parametrize("case", CASES)
def test_two_updates_give_the_weights_that_plain_loops_give(runs, case):
    configs, models, answers = runs
    losses, weights = answers[case]
    plain = PlainLearner(configs[case], models, file=Path(configs[case].data.path))
    expected = [plain.update(step) for step in range(len(losses))]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert all(math.isfinite(loss) for loss in losses)
    start = plain.start
    assert max((weights[name] - start[name]).abs().max().item() for name in weights) > 5e-3
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(weights[name], weight.detach(), rtol=0, atol=TOLERANCE, msg=f"{case}: {name}")


@pytest.mark.parametrize("case", POOR)
def test_data_that_says_little_gives_finite_metrics_and_weights(runs, case):
    metrics, _, weights = runs[2][case]
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("case", "side", "other"), [("all good", "chosen", "rejected"), ("all bad", "rejected", "chosen")]
)
def test_one_sided_data_moves_its_side_and_reports_no_other(runs, case, side, other):
    metrics, before, after = runs[2][case]
    assert metrics["policy/loss"] == pytest.approx(0.5)  # the policy is the reference
    assert f"pref/{side}_reward_mean" in metrics
    assert not {f"pref/{other}_reward_mean", "pref/margin_mean", "pref/accuracy"} & metrics.keys()
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())


def test_responses_that_are_the_same_tokens_move_nothing(runs):
    metrics, before, after = runs[2]["the same tokens"]
    assert metrics["policy/loss"] == pytest.approx(math.log(2))
    assert metrics["pref/accuracy"] == 0.5
    assert metrics["pref/truncated_count"] == metrics["pref/response_cut_count"] == 2
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-5)


def test_an_empty_response_is_its_end(runs):
    metrics, _, _ = runs[2]["empty responses"]
    assert metrics["pref/chosen_length_mean"] == 1
    assert metrics["pref/rejected_length_mean"] == 2


def epochs_with_and_without_memory(ranks, config):
    """Weights after three passes over the data whose frozen numbers are remembered, and asked for each time."""
    answers = []
    for is_remembered in (True, False):
        worker = ranks.start(config)
        assert worker._keeps_columns
        calls = [0]
        compute = worker._models.reference_logprobs

        def counting(*arguments, compute=compute, calls=calls):
            calls[-1] += 1
            return compute(*arguments)

        worker._models.__dict__["reference_logprobs"] = counting
        for step in range(6):
            if not is_remembered:
                worker._kept.clear()
            worker.update(step)
            calls.append(0)
        answers.append((calls, policy_weights(worker)))
    return answers


@pytest.mark.parametrize("loss", ["dpo", "t_reg"])
def test_what_a_fixed_reference_says_of_an_example_is_asked_once(loss, tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": f"p{i}", "chosen": "abcdef"[: i + 1], "rejected": "x" * (5 - i)} for i in range(5)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    config = make_preference_config(
        folder,
        path,
        num_steps=6,
        objective={"loss": {"kind": loss}, "batch_size": 3},
        learner={"num_ranks": 2, "zero_stage": 2},
    )
    for (few, weights), (many, expected) in on_ranks(epochs_with_and_without_memory, 2, config):
        assert few[:2] == many[:2] and min(many[:6]) > 0
        assert few[2:] == [0] * 5
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6, msg=name)
