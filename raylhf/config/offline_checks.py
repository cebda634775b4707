"""Whether the settings of a policy run on stored judgements make sense together."""

from collections.abc import Iterator

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.checks import check_devices, check_placement, check_tracking
from raylhf.config.judgement_checks import check_judgements
from raylhf.config.preference import PreferenceConfig, SFTConfig
from raylhf.config.preference_checks import check_needs, check_reference, listed
from raylhf.config.preference_losses import KTOLoss, MODPOLoss, TREGLoss
from raylhf.config.problems import Problem, problem_at
from raylhf.config.run import PreferenceRunConfig

DATA = {"kto": ("pairs", "scores"), "plackett_luce": ("rankings", "scores")}
"""Judgements that a loss learns from, where these are not the usual ones."""
USUAL_DATA = ("pairs", "rankings", "scores")


def find_preference_problems(config: PreferenceRunConfig) -> list[Problem]:
    """Every problem, in the order of the sections."""
    checks = (check_devices, _check_offline, check_judgements, check_placement, check_tracking)
    return [problem for check in checks for problem in check(config)]


def _check_offline(config: PreferenceRunConfig) -> Iterator[Problem]:
    objective, data = config.objective, config.data
    if isinstance(objective, SFTConfig):
        if data.kind not in ("responses", "pairs"):
            yield problem_at(
                "data.kind", f"is {data.kind}, but sft learns from responses, or from the chosen ones of pairs"
            )
        return
    yield from _check_loss_data(objective, config)
    yield from check_needs(objective.loss, config)
    yield from check_reference(objective.reference, objective.loss, config)


def _check_loss_data(objective: PreferenceConfig, config: PreferenceRunConfig) -> Iterator[Problem]:
    loss, kind = objective.loss, config.data.kind
    wanted = DATA.get(loss.kind, USUAL_DATA)
    if kind not in wanted:
        yield problem_at("data.kind", f"is {kind}, but the loss {loss.kind} learns from {listed(wanted)}; change one")
    only_pairs = LOSSES[loss.kind].needs & {Need.TIME, Need.REWARD_GAPS}
    if only_pairs and kind in wanted and kind != "pairs":
        yield problem_at("data.kind", f"is {kind}, but only rows of pairs have {listed(only_pairs)}; change one")
    if isinstance(loss, KTOLoss) and kind != "scores" and "good_from" in loss.model_fields_set:
        yield problem_at(
            "objective.loss.good_from",
            f"has no effect with data.kind: {kind}, where those are good that win more pairs than they lose; remove it",
        )
    if isinstance(loss, TREGLoss) and loss.better == loss.worse:
        yield problem_at("objective.loss.worse", "is the same as better: no token would weigh more; change one")
    if isinstance(loss, MODPOLoss) and loss.weight + sum(loss.other_weights.values()) > 1 + 1e-6:
        yield problem_at("objective.loss.other_weights", "and weight add to more than 1; scale them to add to 1")
