"""Whether a reward model's settings make sense together."""

from collections import Counter
from collections.abc import Iterator

from raylhf.config.checks import check_devices, check_placement, check_tracking
from raylhf.config.judgement_checks import check_judgements
from raylhf.config.problems import Problem, problem_at
from raylhf.config.reward_model import BradleyTerryLoss, EnsembleHead, MSELoss, MultiValueHead, TokenAggregateLoss
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
    "process": ("steps", "edits"),
}
"""Judgements that a loss can learn from; a ranking and scores hold pairs too."""


def find_reward_model_problems(config: RewardModelRunConfig) -> list[Problem]:
    """Every problem, in the order of the sections."""
    checks = (check_devices, _check_objective, _check_head, check_judgements, check_placement, check_tracking)
    return [problem for check in checks for problem in check(config)]


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
    if objective.trainable_layers is not None and config.learner.lora is not None:
        yield problem_at(
            "objective.trainable_layers", "is set beside learner.lora, which freezes all layers; remove one of them"
        )
    has_margin = config.data.kind in ("pairs", "scores")  # of scores it is their difference
    if isinstance(loss, BradleyTerryLoss | TokenAggregateLoss) and loss.use_margin and not has_margin:
        yield problem_at("objective.loss.use_margin", f"is true, but rows of {config.data.kind} have no margin")
    if isinstance(loss, MSELoss) and loss.use_rater_std and config.data.kind != "scores":
        yield problem_at("objective.loss.use_rater_std", "is true, but only rows of scores have a score_std")


def _check_head(config: RewardModelRunConfig) -> Iterator[Problem]:
    head, learner = config.objective.head, config.learner
    if isinstance(head, MultiValueHead):
        repeated = [name for name, count in Counter(head.attributes).items() if count > 1]
        if repeated:
            yield problem_at("objective.head.attributes", f"names {_listed(tuple(repeated))} twice; name each once")
    if not isinstance(head, EnsembleHead):
        return
    if head.trunk == "lora" and learner.lora is None:
        yield problem_at("learner.lora", "is null, but objective.head.trunk: lora trains an adapter a member; set it")
    if head.trunk == "shared" and learner.lora is not None:
        yield problem_at(
            "objective.head.trunk",
            "is shared, but learner.lora is set; set trunk: lora for an adapter a member, or remove learner.lora",
        )
    if head.trunk == "lora" and learner.gradient_checkpointing:
        yield problem_at(
            "learner.gradient_checkpointing",
            "is true, but it recomputes layers when another member's adapter may be selected (objective.head.trunk: "
            "lora); set it to false, or use trunk: shared",
        )


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
