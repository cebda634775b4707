"""Which of a group's K responses to compare: preference pairs out of scores, for methods that learn from pairs.

Everything is numpy, of one group, and determined by its arguments, `seed` included. Positions are those of the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from raylhf.batch import Pair

PairKind = Literal["best_worst", "all_pairs", "random_against_best", "pareto"]
"""best_worst: one pair, the best response against the worst (online DPO, arXiv 2402.04792). all_pairs: every two.
random_against_best: one pair, the best response against one drawn at random from the others. pareto: every two of which
one is at least as good as the other in every column of the vector, and better in one."""

Comparison = tuple[int, int]
"""(better, worse): positions of two responses."""


@dataclass(frozen=True)
class MadePairs:
    """The pairs of one group."""

    pairs: tuple[Pair, ...]
    """Comparisons whose margin is the difference of the scores, more than the tie margin."""
    num_ties: int
    """Comparisons that `kind` asks for but that are ties."""


def make_pairs(
    kind: PairKind,
    scores: np.ndarray,
    valid: np.ndarray,
    *,
    vector: np.ndarray | None = None,
    tie_margin: float | None,
    seed: int,
    texts: Sequence[str] | None = None,
) -> MadePairs:
    """The comparisons of kind `kind` among the responses whose score is valid; none where fewer than two are.

    `scores` [K]; `valid` [K] (bool) is False where no score could be had. A comparison is a tie, and no pair is made
    of it, if the better response's score is not more than `tie_margin` (>= 0) above the other's, or if the two `texts`
    [K] are equal. This takes in a Pareto comparison that the scores contradict. Ties are dropped since their label is
    an accident of order; in groups of which many are ties there is little to learn. With None, scores never make a tie:
    for labels that are probabilities, an even one too says something.

    `vector` [K, J] holds the members of an ensemble, or attributes, NaN where one does not apply; a comparison is then
    of the columns that both responses have. A pair's agreement is the share of these that rate its chosen response
    higher (None without any). `seed` decides the draw of random_against_best and nothing else.
    """
    if kind == "pareto" and vector is None:
        raise ValueError('pairs of kind "pareto" need a vector of scores: choose a reward that has more than one part')
    rows = [int(row) for row in np.flatnonzero(valid & np.isfinite(scores))]
    if len(rows) < 2:
        return MadePairs((), 0)
    columns = np.full((len(scores), 1), np.nan) if vector is None else vector
    comparisons = _COMPARISONS[kind](rows, scores, columns, np.random.default_rng(seed))
    pairs = tuple(
        Pair(better, worse, float(scores[better] - scores[worse]), _agreement(columns[better], columns[worse]))
        for better, worse in comparisons
        if (tie_margin is None or scores[better] - scores[worse] > tie_margin)
        and (texts is None or texts[better] != texts[worse])
    )
    return MadePairs(pairs, len(comparisons) - len(pairs))


def _best_worst(
    rows: Sequence[int], scores: np.ndarray, vector: np.ndarray, rng: np.random.Generator
) -> list[Comparison]:
    """The first of the highest scores against the first of the lowest."""
    return [(max(rows, key=scores.__getitem__), min(rows, key=scores.__getitem__))]


def _random_against_best(
    rows: Sequence[int], scores: np.ndarray, vector: np.ndarray, rng: np.random.Generator
) -> list[Comparison]:
    """The first of the highest scores against any other response, each equally likely."""
    best = max(rows, key=scores.__getitem__)
    return [(best, int(rng.choice([row for row in rows if row != best])))]


def _all_pairs(
    rows: Sequence[int], scores: np.ndarray, vector: np.ndarray, rng: np.random.Generator
) -> list[Comparison]:
    """Every two, in the order of their positions."""
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(rows, 2)]


def _pareto(rows: Sequence[int], scores: np.ndarray, vector: np.ndarray, rng: np.random.Generator) -> list[Comparison]:
    """Every two of which one dominates the other, in the order of their positions."""
    ordered = ((i, j) if _dominates(vector[i], vector[j]) else (j, i) for i, j in combinations(rows, 2))
    return [(i, j) for i, j in ordered if _dominates(vector[i], vector[j])]


_COMPARISONS: dict[
    PairKind, Callable[[Sequence[int], np.ndarray, np.ndarray, np.random.Generator], list[Comparison]]
] = {
    "best_worst": _best_worst,
    "all_pairs": _all_pairs,
    "random_against_best": _random_against_best,
    "pareto": _pareto,
}


def _dominates(row: np.ndarray, other: np.ndarray) -> bool:
    """Whether `row` [J] is nowhere below `other` [J] and somewhere above it, over the columns that both have."""
    # A comparison with NaN is False, so a column that one lacks neither helps nor hinders.
    return bool((row > other).any() and not (row < other).any())


def _agreement(chosen: np.ndarray, rejected: np.ndarray) -> float | None:
    """The share of the columns [J] that both have in which `chosen` is higher; None if there is no such column."""
    shared = ~(np.isnan(chosen) | np.isnan(rejected))
    return float((chosen > rejected)[shared].mean()) if shared.any() else None
