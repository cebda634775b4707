"""Settings of a reward model's training that are each legal but make no sense together."""

import pytest

from raylhf.config.reward_model_checks import find_reward_model_problems
from raylhf.config.run import RewardModelRunConfig

PAIRWISE = {"kind": "bradley_terry"}
LORA_MEMBERS = {"kind": "ensemble", "trunk": "lora"}
ATTRIBUTES = {"kind": "multi_value", "attributes": ["kind", "true", "kind"]}


def problems(*, loss=PAIRWISE, head=None, data="pairs", learner=None, trainable_layers=None, **source):
    objective = {"kind": "reward_model", "loss": loss, "trainable_layers": trainable_layers}
    config = RewardModelRunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "tiny"},
            "data": {"path": "p.jsonl", "kind": data} | source,
            "objective": objective if head is None else objective | {"head": head},
            "learner": learner or {},
        }
    )
    return [str(problem) for problem in find_reward_model_problems(config)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": PAIRWISE | {"use_margin": True}},
        {"loss": PAIRWISE | {"use_margin": True}, "data": "scores"},
        {"head": LORA_MEMBERS, "learner": {"lora": {"rank": 2}}},
        {"head": {"kind": "ensemble"}, "learner": {"gradient_checkpointing": True}},
        {"learner": {"lora": {"rank": 2}, "gradient_checkpointing": True}},
        {"held_out": 0, "held_out_path": "q.jsonl"},
        {"loss": {"kind": "mse"}, "data": "attributes", "head": ATTRIBUTES | {"attributes": ["kind", "true"]}},
    ],
)
def test_what_makes_sense_together_has_no_problem(settings):
    assert problems(**settings) == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"head": LORA_MEMBERS, "learner": {"lora": {"rank": 2}, "gradient_checkpointing": True}},
            "learner.gradient_checkpointing: is true, but it recomputes layers",
        ),
        ({"head": LORA_MEMBERS}, "learner.lora: is null, but objective.head.trunk: lora"),
        (
            {"head": {"kind": "ensemble"}, "learner": {"lora": {"rank": 2}}},
            "objective.head.trunk: is shared, but learner.lora is set",
        ),
        (
            {"loss": PAIRWISE | {"use_margin": True}, "data": "rankings"},
            "objective.loss.use_margin: is true, but rows of rankings have no margin",
        ),
        (
            {"loss": {"kind": "mse"}, "data": "attributes", "head": ATTRIBUTES},
            "objective.head.attributes: names kind twice; name each once",
        ),
        ({"head": {"kind": "token"}}, "objective.head.kind: is token, but the loss bradley_terry trains scalar or"),
        ({"data": "steps"}, "data.kind: is steps, but the loss bradley_terry learns from pairs, rankings or scores"),
        ({"held_out_path": "q.jsonl"}, "data.held_out: is 0.1 beside held_out_path; set it to 0"),
        ({"held_out": 0, "held_out_path": "./p.jsonl"}, "data.held_out_path: is a part of data.path"),
    ],
)
def test_what_excludes_each_other_is_one_sentence(settings, problem):
    (found,) = problems(**settings)
    assert found.startswith(problem)


def test_a_file_of_the_training_folder_is_not_held_out_and_one_of_a_folder_below_is(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.jsonl", "below/b.jsonl"):
        (tmp_path / name).touch()
    (found,) = problems(path=str(tmp_path), held_out=0, held_out_path=str(tmp_path / "a.jsonl"))
    assert found.startswith("data.held_out_path: is a part of data.path")
    assert problems(path=str(tmp_path), held_out=0, held_out_path=str(tmp_path / "below" / "b.jsonl")) == []
