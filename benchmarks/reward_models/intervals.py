"""Agreement with human judgement, with intervals from resampling whole prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr

NUM_SAMPLES = 2000


def interval(clusters: Sequence[Any], statistic: Callable[[Sequence[Any]], float]) -> tuple[float, float, float]:
    """(value, lower, upper): the statistic and its 95 % percentile interval over resampled clusters."""
    rng = np.random.default_rng(0)
    draws = [
        statistic([clusters[i] for i in rng.integers(0, len(clusters), len(clusters))]) for _ in range(NUM_SAMPLES)
    ]
    lower, upper = np.nanpercentile(draws, [2.5, 97.5])
    return float(statistic(clusters)), float(lower), float(upper)


def mean_of_all(clusters: Sequence[np.ndarray]) -> float:
    """The mean over all values, clusters joined."""
    return float(np.concatenate(clusters).mean())


def accuracy(gaps: np.ndarray) -> np.ndarray:
    """1 where the chosen response scores higher, a half at a tie."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def correlation(kind: str) -> Callable[[Sequence[np.ndarray]], float]:
    """Pearson's or Spearman's, over clusters of rows (score, human)."""
    function = {"pearson": pearsonr, "spearman": spearmanr}[kind]

    def statistic(clusters: Sequence[np.ndarray]) -> float:
        table = np.concatenate(clusters)
        return float(function(table[:, 0], table[:, 1])[0])

    return statistic


def first_error_f1(clusters: Sequence[Sequence[tuple[int, int]]]) -> float:
    """ProcessBench's harmonic mean of finding the first wrong step and of finding none; pairs are (found, true)."""
    pairs = [pair for cluster in clusters for pair in cluster]
    wrong = [found == true for found, true in pairs if true >= 0]
    right = [found == true for found, true in pairs if true < 0]
    a, b = float(np.mean(wrong)) if wrong else 0.0, float(np.mean(right)) if right else 0.0
    return 2 * a * b / (a + b) if a + b else 0.0


def roc_area(clusters: Sequence[Sequence[tuple[float, bool]]]) -> float:
    """How often a wrong step looks worse than a right one, ties half; pairs are (score of wrongness, is wrong)."""
    table = np.array([pair for cluster in clusters for pair in cluster])
    ranks, wrong = rankdata(table[:, 0]), table[:, 1] == 1
    num_wrong, num_right = wrong.sum(), (~wrong).sum()
    if not num_wrong or not num_right:
        return float("nan")
    return float((ranks[wrong].sum() - num_wrong * (num_wrong + 1) / 2) / (num_wrong * num_right))


def show(values: Mapping[str, tuple[float, float, float]]) -> str:
    return "; ".join(f"{name} {v:.3f} [{low:.3f}, {high:.3f}]" for name, (v, low, high) in values.items())
