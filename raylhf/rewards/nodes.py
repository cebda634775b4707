"""Nodes over several parts: what is common to them, and those that treat every prompt alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.fusion import Combined, laid_out, weighted_sum
from raylhf.rewards.state import RewardState
from raylhf.rewards.validity import MAX_SCORE

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


class Combine:
    """Combines the scores of its parts, in their order; `by_member`, the columns of those that have a `vector`.

    A member that does not apply to a response (NaN in a column) is left out there; a part that failed makes the
    response invalid, and so does a response without members.
    """

    def __init__(
        self, parts: Mapping[str, "Reward"], combine: Callable[[np.ndarray], Combined], *, by_member: bool = False
    ):
        """`combine` takes members [B, M] (see `fusion`)."""
        self._parts = dict(parts)
        self._combine = combine
        self._by_member = by_member

    def score(self, rollouts: Rollouts) -> RewardOutput:
        outputs = {name: reward.score(rollouts) for name, reward in self._parts.items()}
        columns = [
            output.vector if self._by_member and output.vector is not None else output.scores[:, None]
            for output in outputs.values()
        ]
        scores, weights = self._combine(np.concatenate(columns, axis=1))
        ends = np.cumsum([column.shape[1] for column in columns])[:-1]
        per_part = [block.sum(axis=1) for block in np.split(weights, ends, axis=1)]
        return joined(outputs, Combined(scores, np.stack(per_part, axis=1)), rollouts)


class Adaptive:
    """sum_k weight_k * score_k / std_k with running standard deviations, so that no part rules by its scale alone."""

    def __init__(
        self,
        parts: Mapping[str, "Reward"],
        weights: Sequence[float],
        *,
        decay: float,
        place: str,
        state: RewardState,
    ):
        """`place` is the node's own in the graph; the moments of a part stand at `PLACE.parts.NAME`."""
        self._parts = dict(parts)
        self._weights = np.asarray(weights, dtype=float)
        self._places = [f"{place}.parts.{name}" for name in self._parts]
        self._moments = [state.register(part, decay=decay) for part in self._places]
        self._state = state

    def score(self, rollouts: Rollouts) -> RewardOutput:
        outputs = {name: reward.score(rollouts) for name, reward in self._parts.items()}
        for place, output in zip(self._places, outputs.values(), strict=True):
            self._state.observe(place, output.scores[output.valid])
        stds = np.array([moments.std for moments in self._moments])
        return joined(outputs, weighted_sum(scores_of(outputs), self._weights / stds), rollouts)


def scores_of(outputs: Mapping[str, RewardOutput]) -> np.ndarray:
    """The parts' scores as columns, float64 [B, M]."""
    return np.stack([output.scores for output in outputs.values()], axis=1)


def joined(
    outputs: Mapping[str, RewardOutput],
    combined: Combined,
    rollouts: Rollouts,
    *,
    is_counted: np.ndarray | None = None,
) -> RewardOutput:
    """One output of the parts' outputs: invalid where a part is, with the parts named for logs.

    `combined` has one weight a part and row, [B, M], for the dense scores. A part without dense scores counts on the
    response's last token. `is_counted` [B, M] are the parts whose failure matters to a row; None means all. A row
    where no part counts is invalid, and the caller says why.
    """
    is_valid = np.stack([output.valid for output in outputs.values()], axis=1)
    counted = np.ones_like(is_valid) if is_counted is None else is_counted
    can_be_valid = (is_valid | ~counted).all(axis=1) & counted.any(axis=1)
    valid = can_be_valid & (np.abs(combined.scores) <= MAX_SCORE)
    errors = [f"{name}: {error}" for name, output in outputs.items() for error in output.errors]
    if num_broken := int((can_be_valid & ~valid).sum()):
        errors.append(
            f"{num_broken} of {len(rollouts)} combined scores are no finite float32 numbers: no member applies to the "
            "response, or the weights are too large"
        )
    scores = np.where(valid, combined.scores, np.nan)
    return RewardOutput(
        scores=scores,
        valid=valid,
        parts=named_parts(outputs),
        token_scores=_joined_token_scores(list(outputs.values()), combined.weights, scores, rollouts),
        resample=any_resample(outputs.values()),
        errors=tuple(errors),
    )


def named_parts(outputs: Mapping[str, RewardOutput]) -> dict[str, np.ndarray]:
    """The scores of the parts by name, each followed by its own parts as `name/inner`."""
    named = {}
    for name, output in outputs.items():
        named[name] = output.scores
        named.update({f"{name}/{inner}": scores for inner, scores in output.parts.items()})
    return named


def any_resample(outputs: Iterable[RewardOutput]) -> np.ndarray | None:
    """Rows for which some part asks to sample the group anew, bool [B]; None where none asks."""
    asked = [output.resample for output in outputs if output.resample is not None]
    return np.any(asked, axis=0) if asked else None


def _joined_token_scores(
    outputs: Sequence[RewardOutput], weights: np.ndarray, scores: np.ndarray, rollouts: Rollouts
) -> list[np.ndarray] | None:
    """The weighted sum of the dense scores, laid out to the score; None where no part has any."""
    dense = [(j, output.token_scores) for j, output in enumerate(outputs) if output.token_scores is not None]
    if not dense:
        return None
    totals = [np.zeros(length) for length in rollouts.response_lengths]
    for j, token_scores in dense:
        for total, row, weight in zip(totals, token_scores, weights[:, j], strict=True):
            total += weight * row
    return laid_out(totals, scores)
