"""How members' scores become one score: pure functions of numpy arrays.

`members` is [B, M]: M estimates or objectives for each of B responses, NaN where one does not apply to a response. Such
a member is left out of its row; a row without any member gets NaN. Every function also gives the weights [B, M] with
which the members' dense scores count, 0 for a member that is left out: equal shares of a mean, else the derivative by
the member, so that credit goes to the tokens that the score listens to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Combined(NamedTuple):
    """One score a response, and where it comes from."""

    scores: np.ndarray
    """float64 [B]; NaN in a row without members."""
    weights: np.ndarray
    """Weight of each member's dense scores, float64 [B, M]."""


def worst_case(members: np.ndarray) -> Combined:
    """The lowest member (worst-case optimisation, 2310.02743); of equal ones the first."""
    lowest = np.argmin(np.where(np.isnan(members), np.inf, members), axis=1)
    return Combined(_or_nan(members, _pick(members, lowest)), _one_hot(lowest, members))


def lower_confidence(members: np.ndarray, *, coef: float) -> Combined:
    """Mean minus `coef` standard deviations (ddof 1); a single member counts as it is."""
    mean, variance, weights = _mean_and_variance(members)
    return Combined(mean - coef * np.sqrt(variance), weights)


def uncertainty_weighted(members: np.ndarray, *, coef: float) -> Combined:
    """Mean minus `coef` variances (ddof 1, as the PPO path of 2310.02743's code); a single member counts as it is."""
    mean, variance, weights = _mean_and_variance(members)
    return Combined(mean - coef * variance, weights)


def kl_dro(members: np.ndarray, *, beta: float) -> Combined:
    """-beta log mean exp(-r / beta): the worst mean over mixtures of members within a KL ball around equal shares.

    The mean as beta grows, the minimum as it goes to 0. Shifted by the minimum, so no exponential overflows; by expm1
    and log1p, so that a large beta does not round the members away.
    """
    lowest = worst_case(members).scores
    with np.errstate(under="ignore", over="ignore"):
        shrunk = np.expm1(-(members - lowest[:, None]) / beta)
    mean, _, _ = _mean_and_variance(shrunk)
    return Combined(lowest - beta * np.log1p(mean), softmax(-members, temperature=beta))


def tchebycheff(members: np.ndarray, *, weights: Sequence[float], ideal: Sequence[float]) -> Combined:
    """-max_j weight_j |ideal_j - r_j|: minus the weighted distance of the objective that is furthest from its ideal."""
    gaps = np.asarray(ideal, dtype=float) - members
    distances = np.asarray(weights, dtype=float) * np.abs(gaps)
    furthest = np.argmax(np.where(np.isnan(distances), -np.inf, distances), axis=1)
    slopes = np.nan_to_num(np.asarray(weights, dtype=float) * np.sign(gaps))
    return Combined(_or_nan(members, -_pick(distances, furthest)), _one_hot(furthest, members) * slopes)


def weighted_sum(members: np.ndarray, weights: ArrayLike) -> Combined:
    """sum_j weight_j r_j with `weights` [M] or [B, M].

    Where a member is left out, the others' weights grow, so that the row's weights keep their sum of absolute values:
    a missing source is neither a 0 nor a smaller reward. Weights whose sum overflows give NaN or an infinity.
    """
    every = np.broadcast_to(np.asarray(weights, dtype=float), members.shape)
    present = np.where(np.isnan(members), 0.0, every)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted, left = np.abs(every).sum(axis=1), np.abs(present).sum(axis=1)
        grown = present * np.divide(wanted, left, out=np.ones(len(members)), where=left > 0)[:, None]
        return Combined(_or_nan(members, (grown * np.nan_to_num(members)).sum(axis=1)), grown)


def softmax(logits: np.ndarray, *, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) over the last axis [B, M]; NaN gets 0, and so does a row of NaN throughout."""
    with np.errstate(under="ignore"):
        scaled = np.where(np.isnan(logits), -np.inf, logits / temperature)
        highest = scaled.max(axis=-1, keepdims=True)
        shares = np.exp(scaled - np.where(np.isfinite(highest), highest, 0.0))
        totals = shares.sum(axis=-1, keepdims=True)
        return np.divide(shares, totals, out=np.zeros_like(shares), where=totals > 0)


def laid_out(token_scores: Sequence[np.ndarray], scores: np.ndarray) -> list[np.ndarray]:
    """`token_scores`, float32 [T_i] each, with what they leave of the score on the last token: each row sums to it.

    A row whose score is NaN becomes zeros, and one without tokens stays empty.
    """
    rows = []
    for tokens, score in zip(token_scores, scores, strict=True):
        row = np.zeros(len(tokens), dtype=np.float32) if np.isnan(score) else np.array(tokens, dtype=np.float32)
        if len(row) and not np.isnan(score):
            row[-1] = score - row[:-1].sum(dtype=np.float64)
        rows.append(row)
    return rows


def _mean_and_variance(members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [B], variance with ddof 1 [B] (0 of a single member) and equal shares [B, M] of the members that apply."""
    applies = ~np.isnan(members)
    counts = applies.sum(axis=1)
    shares = applies / np.maximum(counts, 1)[:, None]
    mean = _or_nan(members, (shares * np.nan_to_num(members)).sum(axis=1))
    deviations = np.nan_to_num(members - mean[:, None])
    return mean, (deviations**2).sum(axis=1) / np.maximum(counts - 1, 1), shares


def _or_nan(members: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(members).all(axis=1), np.nan, scores)


def _pick(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, columns[:, None], axis=1)[:, 0]


def _one_hot(columns: np.ndarray, members: np.ndarray) -> np.ndarray:
    picked = np.arange(members.shape[1]) == columns[:, None]
    return (picked & ~np.isnan(members)).astype(float)
