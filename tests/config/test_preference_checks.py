"""Losses of preference optimisation: their defaults, and settings that cannot serve them."""

import math
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.checks import check_config
from raylhf.config.offline_checks import find_preference_problems
from raylhf.config.preference import OnlineDPOConfig
from raylhf.config.preference_losses import PreferenceLoss
from raylhf.config.run import PreferenceRunConfig

KINDS = [get_args(loss.model_fields["kind"].annotation)[0] for loss in get_args(get_args(PreferenceLoss)[0])]
REQUIRED = {"tgdpo": {"guide": "g"}, "modpo": {"other_weights": {"calm": 0.4}}}
"""Settings without a default."""
DEFAULTS = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "robust_dpo": {"beta": 0.1, "label_noise": 0.1},
    "ipo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"odds_coef": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "beta_dpo": {"beta": 0.1, "sensitivity": 0.6, "filter_share": 0.2, "decay": 0.9},
    "alpha_dpo": {"beta": 10.0, "gamma_ratio": 0.4, "alpha": 0.2, "decay": 0.9},
    "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5},
    "tgdpo": {"beta": 0.1, "alpha": 0.5},
    "t_reg": {"beta": 0.1, "alpha": 0.25},
    "step_dpo": {"beta": 0.5},
    "wdpo": {"beta": 0.01, "rho": 0.01},
    "kldpo": {"beta": 0.01, "temperature": 0.05},
    "dr_dpo": {"beta": 0.1, "temperature": 1.0},
    "aux_dpo": {"beta": 0.1, "bound": 1.0, "offset_lr": 5e-3, "null_coef": 1.0, "amplitude_coef": 0.01},
    "modpo": {"beta": 0.1, "weight": 0.6},
    "ns_dpo": {"beta": 0.1, "gamma": 0.95},
    "plackett_luce": {"beta": 0.1},
}
"""Of the papers and their code (METHODS, P5 to P28)."""
DATA = {"plackett_luce": "rankings"}
WDPO = {"loss": {"kind": "wdpo"}}
ATTENTION: dict[str, Any] = {"model": {"path": "m", "attention": "eager"}}
PROCESS = {"kind": "process", "path": "r"}
LORA = {"learner": {"lora": {"rank": 2}}}


def loss_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, **REQUIRED.get(kind, {})}


def offline(*, kind: str = "preference", data: str = "pairs", loss: Any = None, reference: Any = None, **sections: Any):
    """Problems of a run on stored judgements."""
    objective = {"kind": kind} | ({"loss": loss} if loss else {}) | ({"reference": reference} if reference else {})
    raw = {"name": "x", "model": {"path": "m"}, "data": {"path": "p.jsonl", "kind": data}, "objective": objective}
    return [str(problem) for problem in find_preference_problems(PreferenceRunConfig.model_validate(raw | sections))]


@pytest.fixture
def online(build):
    """Problems of an online run with these settings of its objective, and others by dotted name."""

    def problems(objective: dict[str, Any] | None = None, changes: dict[str, Any] | None = None) -> list[str]:
        settings = {"rollout.group_size": 4, "objective": {"kind": "online_dpo", **(objective or {})}}
        return check_config(build(settings | (changes or {})))

    return problems


def test_every_loss_is_listed_with_its_needs_and_nothing_else_is():
    assert list(LOSSES) == KINDS
    assert len(set(KINDS)) == 21


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_loads_with_its_published_defaults(kind):
    loss = TypeAdapter(PreferenceLoss).validate_python(loss_of(kind))
    assert {name: getattr(loss, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]
    numbers = {name for name, value in loss.model_dump().items() if isinstance(value, float)}
    assert numbers == DEFAULTS[kind].keys() | ({"good_from"} if kind == "kto" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_without_its_paper_or_formula_is_not_listed(kind):
    algorithm = LOSSES[kind]
    assert all((algorithm.title, algorithm.paper, algorithm.formula, algorithm.function, algorithm.defaults))
    assert (Need.REFERENCE in algorithm.needs) == (kind not in ("simpo", "orpo"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_with_data_that_it_learns_from_has_no_problem(kind):
    sections: dict[str, Any] = ATTENTION if kind == "wdpo" else {}
    assert offline(loss=loss_of(kind), data=DATA.get(kind, "pairs"), **sections) == []


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"t_reg", "step_dpo", "aux_dpo", "modpo", "ns_dpo"}))
def test_a_loss_that_needs_nothing_stored_is_legal_online(online, kind):
    changes = {"model.attention": "eager"} if kind == "wdpo" else {}
    assert online({"loss": loss_of(kind)}, changes) == []


def test_what_else_is_legal_together(online):
    moved = {"every_steps": 1, "mix": 0.01}
    assert online({"reference": moved, "num_minibatches": 4}) == []
    steps = {"reward.graph": PROCESS, "reward.missing_eos_penalty": 0}
    assert online({"loss": {"kind": "step_dpo"}, "pairs": {"kind": "first_wrong_step"}}, steps) == []
    assert offline(loss={"kind": "kto", "good_from": 0.3}, data="scores") == []
    assert online({"loss": {"kind": "plackett_luce"}, "pairs": {"tie_margin": 0.1}}) == []
    assert online({"loss": {"kind": "kto"}, "pairs": {"kind": "all_pairs", "tie_margin": 0.1}}) == []
    assert offline(reference=moved) == []
    assert offline(kind="sft", data="responses") == offline(kind="sft") == []
    assert offline(loss={"kind": "kto"}, data="scores") == []
    assert offline(loss={"kind": "modpo", "weight": 0.7, "other_weights": {"a": 0.2, "b": 0.1}}) == []
    for kind in ("dpo", "kldpo", "simpo"):
        assert offline(loss={"kind": kind}, learner={"zero_stage": 3}, data="rankings") == []


@pytest.mark.parametrize(
    ("objective", "changes", "problem"),
    [
        ({}, {"rollout.group_size": 1}, "rollout.group_size: is 1, but objective.kind: online_dpo compares the resp"),
        ({"loss": loss_of("ns_dpo")}, {}, "objective.loss.kind: is ns_dpo, which needs the time of each pair: stored"),
        ({"loss": loss_of("modpo")}, {}, "objective.loss.kind: is modpo, which needs rewards of both responses of"),
        ({"loss": loss_of("aux_dpo")}, {}, "objective.loss.kind: is aux_dpo, which needs pairs that come again: stor"),
        ({"loss": loss_of("t_reg")}, {}, "objective.loss.kind: is t_reg, which needs the reference under two other pr"),
        ({"loss": loss_of("step_dpo")}, {}, "objective.loss.kind: is step_dpo, which online is dpo with objective.p"),
        (
            {"loss": loss_of("plackett_luce"), "pairs": {"kind": "all_pairs"}},
            {},
            "objective.pairs: has no effect with plackett_luce, which ranks whole groups; remove it",
        ),
        (
            {"loss": loss_of("kto"), "pairs": {"full_weight_gap": 0.5}},
            {},
            "objective.pairs: weighs pairs, which has no effect with kto, a loss of single responses",
        ),
        (
            {"pairs": {"kind": "first_wrong_step", "weight_by_agreement": True, "parts": ["a", "b"]}},
            {"reward.graph": PROCESS, "reward.missing_eos_penalty": 0},
            "objective.pairs: has settings about scores, but first_wrong_step compares steps",
        ),
        (
            {"pairs": {"kind": "pareto", "parts": ["a"]}},
            {},
            "objective.pairs.parts: has 1 names, but pareto compares by two or more parts of the reward; name them",
        ),
        (
            {"loss": {"kind": "cdpo"}, "pairs": {"kind": "all_pairs", "soft_labels": True, "tie_margin": 0.1}},
            {},
            "objective.pairs.tie_margin: is 0.1, but with soft_labels a tie is a pair that could go either way",
        ),
        (
            {"loss": {"kind": "cdpo", "label_smoothing": 0.1}, "pairs": {"kind": "all_pairs", "soft_labels": True}},
            {},
            "objective.loss.label_smoothing: has no effect with objective.pairs.soft_labels",
        ),
        (
            {"loss": {"kind": "kto", "good_from": 0.3}, "pairs": {"kind": "all_pairs"}},
            {},
            "objective.loss.good_from: has no effect on fresh responses",
        ),
        (
            {"pairs": {"kind": "first_wrong_step"}},
            {"reward.missing_eos_penalty": 0},
            "reward.graph: must be one leaf of kind process with aggregate min or mean",
        ),
        (
            {"pairs": {"kind": "first_wrong_step"}},
            {"reward.graph": PROCESS, "reward.missing_eos_penalty": 0.5},
            "reward.missing_eos_penalty: changes the score of a response's last step",
        ),
        ({"pairs": {"parts": ["a", "b"]}}, {}, "objective.pairs.parts: has no effect without pareto or weight_by"),
        (
            {"num_minibatches": 16},
            {},
            "objective.num_minibatches: is 16, which does not divide the 8 prompts of a rank, whose responses stay",
        ),
        ({"reference": {"mix": 0.5}}, {}, "objective.reference.mix: has no effect with every_steps: 0"),
        (
            {"reference": {"every_steps": 1}},
            {"learner.zero_stage": 3},
            "objective.reference.every_steps: is set, but under learner.zero_stage: 3 no rank holds policy and ref",
        ),
        ({"loss": loss_of("tdpo1")}, {"learner.zero_stage": 3}, "learner.zero_stage: is 3, but the loss tdpo1 needs"),
    ],
)
def test_online_settings_that_exclude_each_other_are_one_sentence(online, objective, changes, problem):
    found = online(objective, changes)
    assert len(found) == 1 and found[0].startswith(problem), found


def test_a_reference_of_few_bits_is_not_moved_a_little(online):
    found = online({"reference": {"every_steps": 1, "mix": 0.1}}, {"model.dtype": "bfloat16"})
    assert any(p.startswith("objective.reference.mix: is 0.1, but model.dtype: bfloat16 rounds") for p in found)
    found = online({"reference": {"every_steps": 1}}, {"model.dtype": "bfloat16"})
    assert not any(p.startswith("objective.reference") for p in found)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "sft", "data": "scores"}, "data.kind: is scores, but sft learns from responses, or from the chosen"),
        ({"data": "responses"}, "data.kind: is responses, but the loss dpo learns from pairs, rankings and scores"),
        (
            {"loss": loss_of("kto"), "data": "rankings"},
            "data.kind: is rankings, but the loss kto learns from pairs and scores; change one",
        ),
        (
            {"loss": loss_of("plackett_luce")},
            "data.kind: is pairs, but the loss plackett_luce learns from rankings and scores; change one",
        ),
        (
            {"loss": loss_of("ns_dpo"), "data": "rankings"},
            "data.kind: is rankings, but only rows of pairs have the time of each pair; change one",
        ),
        (
            {"loss": loss_of("modpo"), "data": "scores"},
            "data.kind: is scores, but only rows of pairs have rewards of both responses of each pair; change one",
        ),
        (
            {"loss": {"kind": "modpo", "weight": 0.9, "other_weights": {"calm": 0.2}}},
            "objective.loss.other_weights: and weight add to more than 1; scale them to add to 1",
        ),
        (
            {"loss": {"kind": "kto", "good_from": 0.3}},
            "objective.loss.good_from: has no effect with data.kind: pairs, where those are good that win more",
        ),
        (
            {"loss": {"kind": "t_reg", "better": "x", "worse": "x"}},
            "objective.loss.worse: is the same as better: no token would weigh more; change one",
        ),
        ({"loss": loss_of("tdpo2"), "learner": {"zero_stage": 3}}, "learner.zero_stage: is 3, but the loss tdpo2 need"),
        (
            {"loss": loss_of("aux_dpo"), "learner": {"zero_stage": 3}},
            "learner.zero_stage: is 3, but the loss aux_dpo needs gradients of single responses, for which the",
        ),
        (
            {"loss": loss_of("aux_dpo"), **LORA},
            "learner.lora: is set, but the loss aux_dpo needs gradients of single responses of the reference",
        ),
        (WDPO, "model.attention: is sdpa, but the loss wdpo needs a gradient of a gradient, which fused attention"),
        (WDPO | ATTENTION | {"learner": {"zero_stage": 3}}, "learner.zero_stage: is 3, but the loss wdpo needs"),
        (
            WDPO | ATTENTION | {"learner": {"gradient_checkpointing": True}},
            "learner.gradient_checkpointing: is true, but the loss wdpo needs a gradient of a gradient",
        ),
        ({"reference": {"mix": 0.5}}, "objective.reference.mix: has no effect with every_steps: 0; set that, or remov"),
        (
            {"reference": {"every_steps": 2}, **LORA},
            "objective.reference.every_steps: is set, but with learner.lora the reference is the model without its",
        ),
        (
            {"reference": {"every_steps": 2}, "learner": {"zero_stage": 3}},
            "objective.reference.every_steps: is set, but under learner.zero_stage: 3 no rank holds policy and",
        ),
        (
            {"loss": loss_of("simpo"), "reference": {"every_steps": 2}},
            "objective.reference: has no effect: the loss simpo has no reference; remove it",
        ),
    ],
)
def test_stored_judgements_that_do_not_serve_a_loss_are_one_sentence(settings, problem):
    found = offline(**settings)
    assert len(found) == 1 and found[0].startswith(problem), found


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("dpo", "beta", 0.0),
        ("dpo", "label_smoothing", 0.1),
        ("cdpo", "label_smoothing", 0.5),
        ("robust_dpo", "label_noise", 0.5),
        ("beta_dpo", "filter_share", 1.0),
        ("kldpo", "temperature", 0.0),
        ("modpo", "weight", 0.0),
        ("modpo", "other_weights", {}),
        ("ns_dpo", "gamma", 1.1),
        ("alpha_dpo", "decay", 1.0),
    ],
)
def test_a_setting_outside_of_its_range_is_refused(kind, setting, value):
    with pytest.raises(ValidationError, match=setting):
        TypeAdapter(PreferenceLoss).validate_python(loss_of(kind) | {setting: value})


@pytest.mark.parametrize("kind", REQUIRED)
def test_a_setting_without_a_default_is_asked_for(kind):
    with pytest.raises(ValidationError, match=next(iter(REQUIRED[kind]))):
        TypeAdapter(PreferenceLoss).validate_python({"kind": kind})


def test_the_default_is_dpo_on_the_best_and_the_worst_against_a_fixed_reference():
    objective = OnlineDPOConfig(kind="online_dpo")
    assert objective.loss.kind == "dpo" and objective.pairs.kind == "best_worst"
    assert objective.reference.every_steps == 0 and math.isclose(objective.loss.beta, 0.1)
