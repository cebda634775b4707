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
MAX_CALLS = 10_000
"""Calls that are kept where nobody takes them; then the oldest go."""


def scale_of(std: float) -> float:
    """What to divide by where the spread is `std`: 1 where there is none."""
    return std if std >= MIN_STD else 1.0


@dataclass
class RunningMoments:
    """Exponential averages of the batches' means and (population) variances; mean 0 and spread 1 until the first."""

    decay: float
    is_reference: bool = False
    """Keeps the first batch's moments for ever."""
    num_commits: int = 0
    mean: float = 0.0
    variance: float = 1.0

    @property
    def std(self) -> float:
        """The spread to divide by."""
        return scale_of(math.sqrt(self.variance))

    @property
    def is_frozen(self) -> bool:
        """Whether further batches change nothing."""
        return self.is_reference and self.num_commits > 0

    def fold(self, scores: np.ndarray) -> None:
        """Take in the scores [N] of one batch over all workers, N > 0."""
        share = 1.0 if self.num_commits == 0 else 1.0 - self.decay
        self.mean += share * (float(scores.mean()) - self.mean)
        self.variance += share * (float(scores.var()) - self.variance)
        self.num_commits += 1


@dataclass(frozen=True)
class Call:
    """One call of a leaf."""

    source: str
    """The path of part names to the leaf."""
    seconds: float
    num_responses: int
    num_failed: int
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
            place: {"num_commits": moments.num_commits, "mean": moments.mean, "variance": moments.variance}
            for place, moments in self._moments.items()
        }

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a `state_dict`. A ValueError names the nodes where the saved graph and this one differ."""
        if different := sorted(saved.keys() ^ self._moments.keys()):
            raise ValueError(
                f"the saved reward state is of another graph: {', '.join(different)} has running moments in one of "
                "them only; resume with the settings of the saved run"
            )
        for place, values in saved.items():
            moments = self._moments[place]
            moments.num_commits = int(values["num_commits"])
            moments.mean, moments.variance = float(values["mean"]), float(values["variance"])
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
