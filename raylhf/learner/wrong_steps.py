"""Pairs for Step-DPO (2406.18629) out of a group that a process reward has scored step by step."""

from collections.abc import Sequence

import numpy as np

from raylhf.algos.pairs import MadePairs
from raylhf.batch import Pair

ROUNDING = 1e-6
"""Scores as small as this are what float32 leaves of a sum, not a step's."""


def first_wrong_step_pairs(
    token_scores: Sequence[np.ndarray], texts: Sequence[str], scores: np.ndarray, valid: np.ndarray
) -> tuple[MadePairs, np.ndarray]:
    """The response that stays right longest against the one that goes wrong first, each up to that step.

    token_scores [K] of [T_i] hold a step's score at its last token and 0 elsewhere; a step below 0 is wrong, but for
    the rounding that a response's last token takes up. Returns at most one pair, and the tokens of each response that
    count, int64 [K, 2]: of the rejected one those of its first wrong step alone, of the chosen one those up to its own
    first wrong step (all, where it has none). Where no response of the group has a wrong step, or all go wrong at the
    same step, there is nothing to learn: a tie.
    """
    spans = np.stack([_first_wrong(own) for own in token_scores])
    lengths = np.array([len(own) for own in token_scores])
    is_wrong = spans[:, 0] >= 0
    right_steps = [
        int((own[:start] != 0).sum()) if start >= 0 else np.inf
        for own, start in zip(token_scores, spans[:, 0], strict=True)
    ]
    counted = np.stack([np.zeros_like(lengths), lengths], axis=1)
    rows = [int(i) for i in np.flatnonzero(valid)]
    candidates = [i for i in rows if is_wrong[i]]
    if len(rows) < 2 or not candidates:
        return MadePairs((), int(len(rows) > 1)), counted
    rejected = min(candidates, key=lambda i: (right_steps[i], scores[i], i))
    chosen = max(rows, key=lambda i: (right_steps[i], scores[i], -i))
    if right_steps[chosen] <= right_steps[rejected] or texts[chosen] == texts[rejected]:
        return MadePairs((), 1), counted
    counted[rejected] = spans[rejected]
    if is_wrong[chosen]:
        counted[chosen] = (0, spans[chosen][0])
    return MadePairs((Pair(chosen, rejected, margin=float(scores[chosen] - scores[rejected])),), 0), counted


def _first_wrong(token_scores: np.ndarray) -> np.ndarray:
    """[first token, one after the last) of the first step whose score is below 0; (-1, -1) where there is none."""
    wrong = np.flatnonzero(token_scores < -ROUNDING)
    if not len(wrong):
        return np.array([-1, -1])
    end = int(wrong[0])
    before = np.flatnonzero(token_scores[:end] != 0)
    return np.array([int(before[-1]) + 1 if len(before) else 0, end + 1])
