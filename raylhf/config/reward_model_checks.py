"""Whether a reward model's settings make sense together."""

from collections.abc import Iterator

from raylhf.config.checks import Problem, check_devices, check_placement, problem_at
from raylhf.config.reward_model import BradleyTerryLoss, MSELoss, TokenAggregateLoss
from raylhf.config.run import RewardModelRunConfig

HEADS = {
    "mse": ("scalar", "ensemble", "multi_value"),
    "bradley_terry": ("scalar", "ensemble"),
    "plackett_luce": ("scalar", "ensemble"),
    "token_aggregate": ("token",),
    "token_step": ("token",),
    "process": ("token",),
}
"""Heads that a loss can train."""

DATA = {
    "mse": ("scores", "attributes"),
    "bradley_terry": ("pairs", "rankings", "scores"),
    "plackett_luce": ("rankings", "scores", "pairs"),
    "token_aggregate": ("pairs", "rankings", "scores"),
    "token_step": ("pairs", "rankings", "scores"),
    "process": ("steps",),
}
"""Judgements that a loss can learn from; a ranking and scores hold pairs too."""


def find_reward_model_problems(config: RewardModelRunConfig) -> list[Problem]:
    """Every problem, in the order of the sections."""
    return [*check_devices(config), *_check_objective(config), *_check_data(config), *check_placement(config)]


def _check_objective(config: RewardModelRunConfig) -> Iterator[Problem]:
    objective = config.objective
    loss, head = objective.loss, objective.head
    if head.kind not in HEADS[loss.kind]:
        yield problem_at(
            "objective.head.kind",
            f"is {head.kind}, but the loss {loss.kind} trains {_listed(HEADS[loss.kind])}; change one of them",
        )
    if config.data.kind not in DATA[loss.kind]:
        yield problem_at(
            "data.kind",
            f"is {config.data.kind}, but the loss {loss.kind} learns from {_listed(DATA[loss.kind])}; change one",
        )
    if (config.data.kind == "attributes") != (head.kind == "multi_value"):
        yield problem_at(
            "objective.head.kind",
            f"is {head.kind} with data.kind: {config.data.kind}; attributes and a multi_value head go together",
        )
    if head.kind == "ensemble" and head.trunk == "lora" and config.learner.lora is None:
        yield problem_at("learner.lora", "is null, but objective.head.trunk: lora trains an adapter a member; set it")
    if head.kind == "ensemble" and head.trunk == "shared" and config.learner.lora is not None:
        yield problem_at(
            "objective.head.trunk",
            "is shared, but learner.lora is set; set trunk: lora for an adapter a member, or remove learner.lora",
        )
    if objective.trainable_layers is not None and config.learner.lora is not None:
        yield problem_at(
            "objective.trainable_layers", "is set beside learner.lora, which freezes all layers; remove one of them"
        )
    if isinstance(loss, BradleyTerryLoss | TokenAggregateLoss) and loss.use_margin and config.data.kind != "pairs":
        yield problem_at("objective.loss.use_margin", f"is true, but rows of {config.data.kind} have no margin")
    if isinstance(loss, MSELoss) and loss.use_rater_std and config.data.kind != "scores":
        yield problem_at("objective.loss.use_rater_std", "is true, but only rows of scores have a score_std")


def _check_data(config: RewardModelRunConfig) -> Iterator[Problem]:
    data = config.data
    if data.held_out_path is not None and data.held_out > 0:
        yield problem_at("data.held_out", f"is {data.held_out:g} beside held_out_path; set it to 0")
    if data.held_out >= 1 and data.held_out != int(data.held_out):
        yield problem_at("data.held_out", f"is {data.held_out:g}; give a share below 1, or a whole number of prompts")
    if config.evaluation.every_steps > 0 and data.held_out == 0 and data.held_out_path is None:
        yield problem_at(
            "data.held_out", "is 0, but evaluation.every_steps is set; hold prompts out, or set every_steps: 0"
        )


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
