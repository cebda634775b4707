"""What a reward graph remembers: running moments of its nodes, and the calls of its leaves.

Every worker has a state of its own, and all stay equal to the bit: a worker only collects the valid scores that it
sees, the driver takes what all of them collected, sorts it together, and has every worker commit the same. Between two
commits nothing changes, so a score depends neither on the number of workers nor on the order of their calls.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_STD = 1e-6
"""A smaller spread is rounding: the scores are constant, and their scale is 1."""
MIN_SHARE_OF_LARGEST_STD = 0.05
"""Where scores become constant, the scale stops at this share of the largest spread before: a rare other score is then
20 of them away at most, and the scale makes no jump to 1."""
SAVED_MOMENTS = ("num_commits", "mean", "variance", "weight", "largest_std")
"""What a state holds of each node's moments."""
MAX_CALLS = 10_000
"""Calls that are kept where nobody takes them; then the oldest go."""


def scale_of(std: float) -> float:
    """What to divide by where the spread is `std`: 1 where there is none."""
    return std if std >= MIN_STD else 1.0


@dataclass
class RunningMoments:
    """Mean and (population) variance of all scores so far, each weighted by decay^(commits since it came).

    A score counts the same in a small batch and a large one, and the drift of the mean is part of the variance. Mean 0
    and spread 1 until the first commit.
    """

    decay: float
    is_reference: bool = False
    """Keeps the first batch's moments for ever."""
    num_commits: int = 0
    mean: float = 0.0
    variance: float = 1.0
    weight: float = 0.0
    """Of all scores together."""
    largest_std: float = 0.0
    """Over the commits."""

    @property
    def std(self) -> float:
        """The spread to divide by."""
        if self.num_commits == 0:
            return 1.0
        return scale_of(max(math.sqrt(self.variance), MIN_SHARE_OF_LARGEST_STD * self.largest_std))

    @property
    def is_frozen(self) -> bool:
        """Whether further batches change nothing."""
        return self.is_reference and self.num_commits > 0

    def fold(self, scores: np.ndarray) -> None:
        """Take in the scores [N] of one batch over all workers, N > 0."""
        self.weight = self.decay * self.weight + len(scores)
        share = len(scores) / self.weight
        drift = float(scores.mean()) - self.mean
        self.mean += share * drift
        self.variance = (1 - share) * (self.variance + share * drift**2) + share * float(scores.var())
        self.largest_std = max(self.largest_std, math.sqrt(self.variance))
        self.num_commits += 1


@dataclass(frozen=True)
class Call:
    """One call of a leaf."""

    source: str
    """The path of part names to the leaf."""
    seconds: float
    num_responses: int
    num_failed: int
    num_truncated: int
    """Responses that its model read in part."""
    score_mean: float
    """Over the valid scores; NaN without any."""
    score_std: float
    """Of the valid scores (population); NaN without any."""


class RewardState:
    """The moments of one graph's nodes by their place in it, such as `graph.parts.helpful.reward`."""

    def __init__(self) -> None:
        self.observing = False
        """Whether scores are collected for the next commit (the driver switches it on for training batches)."""
        self._moments: dict[str, RunningMoments] = {}
        self._pending: dict[str, list[float]] = {}
        self._calls: deque[Call] = deque(maxlen=MAX_CALLS)

    def register(self, place: str, *, decay: float, is_reference: bool = False) -> RunningMoments:
        """Moments for the node at `place`; the node reads them, and `observe` and `commit` change them."""
        assert place not in self._moments, f"two nodes at {place}"
        self._moments[place] = RunningMoments(decay=decay, is_reference=is_reference)
        return self._moments[place]

    def observe(self, place: str, scores: np.ndarray) -> None:
        """Collect valid scores [N] for the next commit."""
        if self.observing and len(scores) and not self._moments[place].is_frozen:
            self._pending.setdefault(place, []).extend(scores.tolist())

    def take_pending(self) -> dict[str, list[float]]:
        """What was collected since the last call, for `merge_pending`."""
        pending, self._pending = self._pending, {}
        return pending

    def commit(self, merged: Mapping[str, Sequence[float]]) -> None:
        """Fold in what all workers collected.

        A node whose scores come from a node below that commits for the first time waits for the next commit: it would
        learn the scale that the scores had before.
        """
        first = {place for place in merged if self._moments[place].num_commits == 0}
        for place, scores in merged.items():
            is_above_a_first = any(below.startswith(f"{place}.") for below in first)
            moments = self._moments[place]
            if not moments.is_frozen and not (place in first and is_above_a_first):
                moments.fold(np.array(scores))

    @property
    def needs_commit(self) -> bool:
        """Whether some node still has no moments, and leaves scores as they are."""
        return any(moments.num_commits == 0 for moments in self._moments.values())

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Everything that later scores depend on, as plain JSON."""
        return {
            place: {name: getattr(moments, name) for name in SAVED_MOMENTS} for place, moments in self._moments.items()
        }

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a `state_dict`. A ValueError names the nodes where the saved graph and this one differ."""
        if different := sorted(saved.keys() ^ self._moments.keys()):
            raise ValueError(
                f"the saved reward state is of another graph: {', '.join(different)} has running moments in one of "
                "them only; resume with the settings of the saved run"
            )
        for place, values in saved.items():
            for name in SAVED_MOMENTS:
                setattr(self._moments[place], name, values[name])
        self._pending = {}

    def record_call(self, call: Call) -> None:
        """Keep one call of a leaf for the next report."""
        self._calls.append(call)

    def take_calls(self) -> list[Call]:
        """The calls since the last time, oldest first."""
        calls = list(self._calls)
        self._calls.clear()
        return calls


def merge_pending(collected: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """What several workers collected, in an order that does not tell who saw what."""
    merged: dict[str, list[float]] = {}
    for pending in collected:
        for place, scores in pending.items():
            merged.setdefault(place, []).extend(scores)
    return {place: sorted(scores) for place, scores in merged.items()}
