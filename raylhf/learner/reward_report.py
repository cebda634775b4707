"""What held-out judgements say about a reward model: the numbers of one evaluation, from all responses' scores."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raylhf.algos.agreement import (
    Reliability,
    cluster_bootstrap,
    first_error_scores,
    pair_accuracy,
    pair_reliability,
    pearson,
    spearman,
)
from raylhf.batch import RewardExample

RIGHT = 0.5
"""Probability of being right below which a step counts as predicted to be wrong."""
NORMAL_95 = 2 * 1.96
"""Width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class ScoredExample:
    """A held-out prompt with the scores of its K responses."""

    example: RewardExample
    scores: np.ndarray
    """One a response, float64 [K]."""
    outputs: np.ndarray
    """All outputs of a sequence head (attributes, members), float64 [K, H]; the scores as [K, 1] of a token head."""
    step_probs: tuple[np.ndarray, ...] = ()
    """Of each response, the probability that each step is right, float64 [n_k]; NaN where it was cut off."""


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    metrics: dict[str, float]
    reliability: Reliability | None
    """Of the probabilities behind pairwise losses; None where scores make no such claim, or without pairs."""
    subsets: dict[str, dict[str, float]]
    """Number of pairs and accuracy by data.subset_key."""


def evaluation_report(
    scored: Sequence[ScoredExample], *, members: int, attributes: Sequence[str], is_logistic: bool, num_bins: int
) -> Report:
    """Numbers of `scored`; only those for which it holds judgements.

    `members` is the size of an ensemble (0: none), `attributes` the names of several values. With `is_logistic`, the
    sigmoid of a gap is the model's probability that the response with the higher score is preferred.
    """
    scores = np.concatenate([s.scores for s in scored])
    metrics = {
        "rm_eval/score_mean": float(scores.mean()),
        "rm_eval/score_std": float(scores.std()),
        "rm_eval/length_correlation": length_correlation(scored),
    }
    gaps = [pair_gaps(s.example, s.scores) for s in scored]
    all_gaps = np.concatenate(gaps)
    reliability = None
    subsets = {}
    if len(all_gaps):
        metrics |= _accuracy(gaps)
        if is_logistic:
            reliability = pair_reliability(all_gaps, num_bins=num_bins)
            metrics["rm_eval/ece"] = reliability.ece
        subsets = subset_accuracy(scored, gaps)
        metrics |= {f"rm_eval/subset/{name}_accuracy": numbers["accuracy"] for name, numbers in subsets.items()}
    metrics |= dict(_ranking(scored))
    metrics |= dict(_regression(scored, attributes))
    if members:
        metrics |= dict(_ensemble(scored, members, has_pairs=len(all_gaps) > 0))
    if any(s.step_probs for s in scored):
        metrics |= step_metrics(scored)
    # A correlation with something constant is not a number, and is not reported as one.
    return Report({key: value for key, value in metrics.items() if np.isfinite(value)}, reliability, subsets)


def reliability_lists(reliability: Reliability | None) -> dict[str, Any]:
    """Plain lists and numbers, which travel and print as JSON; empty without one."""
    if reliability is None:
        return {}
    return {key: np.asarray(value).tolist() for key, value in asdict(reliability).items()}


def pair_gaps(example: RewardExample, scores: np.ndarray) -> np.ndarray:
    """Score of the preferred response minus that of the other one, float64 [pairs]."""
    return np.array([scores[pair.chosen] - scores[pair.rejected] for pair in example.pairs], dtype=np.float64)


def length_correlation(scored: Sequence[ScoredExample]) -> float:
    """Spearman correlation of score and length in words.

    Within prompts where there are several responses (both centred by prompt): a prompt that asks for more words and
    gets good answers is no length bias. Over all responses where no prompt has two.
    """
    lengths = [np.array([len(text.split()) for text in s.example.responses], dtype=np.float64) for s in scored]
    both = [(s.scores, words) for s, words in zip(scored, lengths, strict=True)]
    groups = [(values - values.mean(), words - words.mean()) for values, words in both if len(values) > 1]
    values, words = zip(*(groups or both), strict=True)
    return spearman(np.concatenate(values), np.concatenate(words))


def subset_accuracy(scored: Sequence[ScoredExample], gaps: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Number of pairs and accuracy of each subset, by its name in metric keys; empty without named subsets."""
    by_name: dict[str, list[np.ndarray]] = defaultdict(list)
    for s, own in zip(scored, gaps, strict=True):
        if s.example.subset and len(own):
            by_name[metric_name(s.example.subset)].append(own)
    found = {name: np.concatenate(parts) for name, parts in sorted(by_name.items())}
    return {name: {"num_pairs": len(own), "accuracy": pair_accuracy(own, 0 * own)} for name, own in found.items()}


def metric_name(text: str) -> str:
    """`text` as a part of a metric's key: a-z, 0-9 and _."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def disagreement(outputs: np.ndarray) -> np.ndarray:
    """Standard deviation over members of each response's scores [N, M], float64 [N], each member standardised first.

    Otherwise members that differ only in offset and scale would seem to disagree.
    """
    stds = outputs.std(axis=0)
    return ((outputs - outputs.mean(axis=0)) / np.where(stds > 0, stds, 1.0)).std(axis=1)


def step_metrics(scored: Sequence[ScoredExample]) -> dict[str, float]:
    """Share of labelled steps judged rightly, and how well the first wrong step is found (ProcessBench's F1)."""
    hits: list[np.ndarray] = []
    predicted, actual = [], []
    for s in scored:
        for probs, labels in zip(s.step_probs, s.example.step_labels, strict=True):
            known = ~np.isnan(labels) & ~np.isnan(probs)
            hits.append((probs[known] >= RIGHT) == (labels[known] >= RIGHT))
            predicted.append(_first(probs < RIGHT))
            actual.append(_first(labels < RIGHT))
    return {
        "rm_eval/step_accuracy": float(np.concatenate(hits).mean()),
        "rm_eval/first_error_f1": first_error_scores(predicted, actual)["f1"],
    }


def _first(is_wrong: np.ndarray) -> int:
    """Position of the first True; -1 without one."""
    return int(is_wrong.argmax()) if is_wrong.any() else -1


def _accuracy(gaps: Sequence[np.ndarray]) -> dict[str, float]:
    """Accuracy over all pairs, and its standard error with the pairs of one prompt as one cluster."""
    wins = [np.heaviside(own, 0.5) for own in gaps]
    low, high = cluster_bootstrap(wins)
    every = np.concatenate(gaps)
    return {"rm_eval/accuracy": pair_accuracy(every, 0 * every), "rm_eval/accuracy_se": (high - low) / NORMAL_95}


def _ranking(scored: Sequence[ScoredExample]) -> Iterator[tuple[str, float]]:
    """Mean over prompts with three or more ranked responses; a pair is what accuracy is for."""
    found = []
    for s in scored:
        if s.example.ranks is None or len(s.scores) < 3 or np.isnan(s.example.ranks).all():
            continue
        places = np.nan_to_num(s.example.ranks, nan=np.nanmax(s.example.ranks) + 1)  # below all that have a place
        found.append(spearman(s.scores, -places))
    if found and not np.isnan(found).all():
        yield "rm_eval/ranking_spearman", float(np.nanmean(found))


def _regression(scored: Sequence[ScoredExample], attributes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Correlations of outputs and targets; over several attributes their mean, and each one's."""
    judged = [s for s in scored if s.example.targets is not None]
    if not judged:
        return
    targets = np.concatenate([np.asarray(s.example.targets) for s in judged])
    outputs = np.concatenate([s.outputs if attributes else s.scores[:, None] for s in judged])
    linear, monotone = [], []
    for j in range(targets.shape[1]):
        known = ~np.isnan(targets[:, j])
        linear.append(pearson(outputs[known, j], targets[known, j]))
        monotone.append(spearman(outputs[known, j], targets[known, j]))
    yield "rm_eval/pearson", float(np.mean(linear))
    yield "rm_eval/spearman", float(np.mean(monotone))
    for name, value in zip(attributes, monotone if attributes else (), strict=True):
        yield f"rm_eval/attribute/{metric_name(name)}_spearman", value


def _ensemble(scored: Sequence[ScoredExample], members: int, *, has_pairs: bool) -> Iterator[tuple[str, float]]:
    outputs = np.concatenate([s.outputs for s in scored])
    yield "rm_eval/disagreement_mean", float(disagreement(outputs).mean())
    if not has_pairs:
        return
    for k in range(members):
        gaps = np.concatenate([pair_gaps(s.example, s.outputs[:, k]) for s in scored])
        yield f"rm_eval/member/{k}_accuracy", pair_accuracy(gaps, 0 * gaps)
