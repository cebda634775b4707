"""Nodes over one reward: veto, calibrate, whiten, clip. The reward's own parts keep their names, and a node that moves
the scale adds the scores before it as `raw`."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.fusion import laid_out
from raylhf.rewards.nodes import any_resample, named_parts
from raylhf.rewards.state import RewardState, RunningMoments
from raylhf.rewards.validity import usable

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


class Veto:
    """At most `cap` where the rule's score is below the threshold. A response that the rule fails on is invalid."""

    def __init__(self, reward: "Reward", rule: "Reward", *, rule_name: str, below: float, cap: float):
        """`rule_name` is the rule's among the parts."""
        self._reward = reward
        self._rule = rule
        self._rule_name = rule_name
        self._below = below
        self._cap = cap

    def score(self, rollouts: Rollouts) -> RewardOutput:
        output, rule = self._reward.score(rollouts), self._rule.score(rollouts)
        is_vetoed = rule.scores < self._below
        scores = np.where(is_vetoed, np.minimum(output.scores, self._cap), output.scores)
        changed = rescored("veto", replace(output, valid=output.valid & rule.valid), scores)
        return replace(
            changed,
            parts={**output.parts, **named_parts({self._rule_name: rule})},
            resample=any_resample([output, rule]),
            errors=(*changed.errors, *(f"{self._rule_name}: {error}" for error in rule.errors)),
        )


class Calibrate:
    """(score - mean) / std with constants, of the score clipped to [low, high]."""

    def __init__(self, reward: "Reward", *, mean: float, std: float, low: float = -np.inf, high: float = np.inf):
        """`low` and `high` are in the units of the reward."""
        self._reward = reward
        self._mean = mean
        self._std = std
        self._low = low
        self._high = high

    def score(self, rollouts: Rollouts) -> RewardOutput:
        output = self._reward.score(rollouts)
        scores = (np.clip(output.scores, self._low, self._high) - self._mean) / self._std
        return rescored("calibrate", with_raw_part(output), scores, token_factor=1 / self._std)


class Whiten:
    """(score - running mean) / running std; without `shift_mean`, the score over the running std.

    Before the first commit scores pass as they are. Moments of a reference stay those of the first commit.
    """

    def __init__(
        self,
        reward: "Reward",
        *,
        place: str,
        state: RewardState,
        decay: float = 0.0,
        shift_mean: bool = True,
        is_reference: bool = False,
    ):
        self._reward = reward
        self._place = place
        self._state = state
        self._shift_mean = shift_mean
        self._moments: RunningMoments = state.register(place, decay=decay, is_reference=is_reference)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        output = self._reward.score(rollouts)
        self._state.observe(self._place, output.scores[output.valid])
        mean = self._moments.mean if self._shift_mean else 0.0
        std = self._moments.std
        return rescored("whiten", with_raw_part(output), (output.scores - mean) / std, token_factor=1 / std)


class Clip:
    """The score, at least `low` and at most `high`."""

    def __init__(self, reward: "Reward", *, low: float, high: float):
        self._reward = reward
        self._low = low
        self._high = high

    def score(self, rollouts: Rollouts) -> RewardOutput:
        output = self._reward.score(rollouts)
        return rescored("clip", output, np.clip(output.scores, self._low, self._high))


def rescored(name: str, output: RewardOutput, scores: np.ndarray, *, token_factor: float = 1.0) -> RewardOutput:
    """`output` with the scores [B] of node `name`; dense ones are multiplied by the factor, the last token gets the
    rest.

    The columns of a `vector` are not of the new scores' scale, and end here.
    """
    changed = usable(name, replace(output, scores=scores))
    dense = None
    if output.token_scores is not None:
        dense = laid_out([token_factor * row.astype(float) for row in output.token_scores], changed.scores)
    return replace(
        changed,
        token_scores=dense,
        vector=None,
        vector_names=(),
    )


def with_raw_part(output: RewardOutput) -> RewardOutput:
    """`output` with its scores as the part `raw`, unless a node below has named rawer ones so."""
    return replace(output, parts={"raw": output.scores, **output.parts})
