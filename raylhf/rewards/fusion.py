"""Nodes of the reward graph: rewards made of rewards."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.validity import checked

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


class WeightedSum:
    """sum_k weight_k * score_k; invalid where any part is invalid.

    `parts` of the output are the parts' scores before weighting; a part's own parts follow it as `name/inner`.
    Dense scores are summed with the same weights.
    """

    arity: Literal["point", "group"]

    def __init__(self, parts: Mapping[str, tuple[float, "Reward"]]):
        """`parts` holds (weight, reward) of each part by its name in logs."""
        self._parts = dict(parts)
        self.arity = "group" if any(reward.arity == "group" for _, reward in parts.values()) else "point"

    def score(self, rollouts: Rollouts) -> RewardOutput:
        outputs = {
            name: checked(type(reward).__name__, reward.score(rollouts), len(rollouts))
            for name, (_, reward) in self._parts.items()
        }
        weights = {name: weight for name, (weight, _) in self._parts.items()}
        named = {}
        for name, output in outputs.items():
            named[name] = output.scores
            named.update({f"{name}/{inner}": scores for inner, scores in output.parts.items()})
        return RewardOutput(
            scores=np.sum([weights[name] * output.scores for name, output in outputs.items()], axis=0),
            valid=np.all([output.valid for output in outputs.values()], axis=0),
            parts=named,
            token_scores=weighted_token_scores(weights, outputs, rollouts),
            errors=tuple(f"{name}: {error}" for name, output in outputs.items() for error in output.errors),
        )


def weighted_token_scores(
    weights: Mapping[str, float], outputs: Mapping[str, RewardOutput], rollouts: Rollouts
) -> Sequence[np.ndarray] | None:
    """Weighted sum of the dense scores, float32 [T_i] each; None where no part has any."""
    dense = {name: output.token_scores for name, output in outputs.items() if output.token_scores is not None}
    if not dense:
        return None
    totals = [np.zeros(length, dtype=np.float32) for length in rollouts.response_lengths]
    for name, token_scores in dense.items():
        for total, scores in zip(totals, token_scores, strict=True):
            total += np.float32(weights[name]) * scores
    return totals
