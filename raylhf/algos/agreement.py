"""How well scores agree with raters: accuracy, correlation, calibration, and how sure these numbers are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of the pairs whose `chosen` score [P] is above the `rejected` one [P]; a tie counts half.

    A reward that gives every response the same score thus has 0.5 and not 0. NaN without pairs or with a NaN score.
    """
    return _mean(_wins(np.asarray(chosen, float) - np.asarray(rejected, float)))


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation of `x` [N] and `y` [N]; NaN where either is constant (or N < 2)."""
    first, second = np.asarray(x, float), np.asarray(y, float)
    if len(first) != len(second):
        raise ValueError(f"a correlation needs as many x as y, got {len(first)} and {len(second)}: pair them up first")
    # By the range and not by the deviations: the mean of equal numbers may round to something else.
    if len(first) == 0 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    correlation = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(correlation, -1, 1))  # rounding can leave the range by a little


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation of the ranks of `x` [N] and `y` [N], ties sharing their mean rank; NaN where either is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


@dataclass(frozen=True)
class Reliability:
    """Predicted probabilities against what happened, in bins of equal width. An empty bin has NaN in both means."""

    edges: np.ndarray
    """Borders of the bins, float64 [num_bins + 1]; a bin holds its lower border, and the last one also its upper."""
    predicted: np.ndarray
    """Mean predicted probability in each bin, float64 [num_bins]."""
    observed: np.ndarray
    """Mean outcome in each bin, float64 [num_bins]."""
    counts: np.ndarray
    """Predictions in each bin, int64 [num_bins]."""
    ece: float
    """Expected calibration error: mean of |predicted - observed| over predictions; NaN without any."""


def reliability(probabilities: ArrayLike, outcomes: ArrayLike, *, edges: ArrayLike) -> Reliability:
    """Calibration of `probabilities` [P] of something that happened (1), did not (0) or partly did: `outcomes` [P].

    `edges` [num_bins + 1] are the borders of the bins.
    """
    predictions, happened = np.asarray(probabilities, float), np.asarray(outcomes, float)
    borders = np.asarray(edges, float)
    num_bins = len(borders) - 1
    bins = np.searchsorted(borders[1:-1], predictions, side="right")
    counts = np.bincount(bins, minlength=num_bins)
    # Sums over counts of 0 give the NaN that an empty bin should have.
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(bins, weights=predictions, minlength=num_bins) / counts
        observed = np.bincount(bins, weights=happened, minlength=num_bins) / counts
    filled = counts > 0
    ece = np.average(np.abs(predicted - observed)[filled], weights=counts[filled]) if filled.any() else np.nan
    return Reliability(borders, predicted, observed, counts, float(ece))


def pair_reliability(gaps: ArrayLike, agreement: ArrayLike = 1.0, *, num_bins: int) -> Reliability:
    """Calibration of sigmoid(gap) for `gaps` [P] = chosen - rejected, in bins over [0.5, 1].

    `agreement`, one for all or [P], is the share of raters who prefer chosen. Where all do, chosen always won, and
    calibration of sigmoid(gap) itself would only measure how large the gaps are. So every pair is turned until the
    model's favourite comes first: the prediction is then sigmoid(|gap|), and the outcome is the share of raters who
    prefer this favourite (half for a gap of 0).
    """
    gaps = np.asarray(gaps, float)
    confidences = 1 / (1 + np.exp(-np.abs(gaps)))
    outcomes = 0.5 + np.sign(gaps) * (np.asarray(agreement, float) - 0.5)
    return reliability(confidences, outcomes, edges=np.linspace(0.5, 1, num_bins + 1))


def cluster_bootstrap(values: Sequence[np.ndarray], *, num_samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over all `values`, which come in clusters (those of one prompt, say).

    Whole clusters are drawn with replacement, because values of one prompt are no independent evidence. (NaN, NaN)
    without any value.
    """
    clusters = [cluster for cluster in values if len(cluster)]
    if not clusters:
        return float("nan"), float("nan")
    sums = np.array([np.sum(cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(clusters), size=len(clusters)) for _ in range(num_samples))
    low, high = np.quantile([sums[draw].sum() / counts[draw].sum() for draw in draws], [0.025, 0.975])
    return float(low), float(high)


def first_error_scores(predicted: Sequence[int], actual: Sequence[int]) -> dict[str, float]:
    """Scores of ProcessBench (arXiv 2412.06559) from the first wrong step of each solution, -1 for none.

    `error_accuracy` over the solutions with an error, `correct_accuracy` over those without, and `f1`, their harmonic
    mean (0 when both are 0). NaN where there is no such solution.
    """
    hits, has_error = np.asarray(predicted) == np.asarray(actual), np.asarray(actual) != -1
    on_errors, on_correct = _mean(hits[has_error]), _mean(hits[~has_error])
    f1 = 0.0 if on_errors == on_correct == 0 else 2 * on_errors * on_correct / (on_errors + on_correct)
    return {"error_accuracy": on_errors, "correct_accuracy": on_correct, "f1": f1}


def _wins(gaps: np.ndarray) -> np.ndarray:
    """1 for a positive gap, 0 for a negative one, 0.5 for none, NaN for NaN."""
    return np.heaviside(gaps, 0.5)


def _mean(values: np.ndarray) -> float:
    """Mean of `values` [N]; NaN, and no warning, when there are none."""
    return float(values.mean()) if len(values) else float("nan")
