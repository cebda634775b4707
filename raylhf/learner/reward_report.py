"""What held-out judgements say about a reward model: the numbers of one evaluation, from all responses' scores."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
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
from raylhf.config.reward_model import BradleyTerryLoss, MSELoss, PlackettLuceLoss, RewardLoss, TokenAggregateLoss

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


def evaluation_report(
    scored: Sequence[ScoredExample], *, loss: RewardLoss, members: int, attributes: Sequence[str], num_bins: int
) -> Report:
    """Numbers of `scored`; only those for which it holds judgements.

    `members` is the size of an ensemble (0: none), `attributes` the names of several values.
    """
    scores = np.concatenate([s.scores for s in scored])
    metrics = {
        "rm_eval/score_mean": float(scores.mean()),
        "rm_eval/score_std": float(scores.std()),
        "rm_eval/length_correlation": length_correlation(scored),
    }
    gaps = [pair_gaps(s.example, s.scores) for s in scored]
    reliability = pair_calibration(scored, loss, num_bins=num_bins)
    if any(len(own) for own in gaps):
        metrics |= _accuracy(gaps)
        metrics |= {f"rm_eval/subset/{name}_accuracy": value for name, value in subset_accuracy(scored, gaps).items()}
    if reliability is not None:
        metrics["rm_eval/ece"] = reliability.ece
    metrics |= dict(_ranking(scored))
    metrics |= dict(_regression(scored, attributes))
    if members:
        metrics |= dict(_ensemble(scored, members, loss, num_bins=num_bins))
    if any(s.step_probs for s in scored):
        metrics |= step_metrics(scored)
    # A correlation with something constant is not a number, and is not reported as one.
    return Report({key: value for key, value in metrics.items() if np.isfinite(value)}, reliability)


def pair_calibration(scored: Sequence[ScoredExample], loss: RewardLoss, *, num_bins: int) -> Reliability | None:
    """How far the probabilities that `loss` puts behind pairs can be trusted; None without pairs or probabilities.

    A pair is judged by what the loss asks of it: a margin is subtracted where it subtracts one, and the share of raters
    who prefer the chosen response is the pair's `agreement`, else 1 - label_smoothing.
    """
    if not isinstance(loss, BradleyTerryLoss | PlackettLuceLoss | TokenAggregateLoss):
        return None
    uses_margin, smoothing = False, 0.0
    if not isinstance(loss, PlackettLuceLoss):
        uses_margin, smoothing = loss.use_margin, loss.label_smoothing
    gaps = np.concatenate([pair_gaps(s.example, s.scores) for s in scored])
    pairs = [pair for s in scored for pair in s.example.pairs]
    if not pairs:
        return None
    margins = np.array([pair.margin if uses_margin else 0.0 for pair in pairs])
    agreement = [1 - smoothing if pair.agreement is None else pair.agreement for pair in pairs]
    return pair_reliability(gaps - margins, agreement, num_bins=num_bins)


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


def subset_accuracy(scored: Sequence[ScoredExample], gaps: Sequence[np.ndarray]) -> dict[str, float]:
    """Accuracy of each subset, by its name in metric keys; empty without named subsets."""
    by_subset: dict[str, list[np.ndarray]] = defaultdict(list)
    for s, own in zip(scored, gaps, strict=True):
        if s.example.subset and len(own):
            by_subset[s.example.subset].append(own)
    subsets = sorted(by_subset)
    found = [np.concatenate(by_subset[subset]) for subset in subsets]
    return {name: pair_accuracy(own, 0 * own) for name, own in zip(metric_names(subsets), found, strict=True)}


def metric_names(texts: Sequence[str]) -> list[str]:
    """Each of `texts` as a part of a metric's key (a-z, 0-9 and _), different ones for all of them.

    The second of those that would be called the same gets the suffix _2, and so on.
    """
    names: list[str] = []
    for text in texts:
        stem = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"
        candidates = chain([stem], (f"{stem}_{number}" for number in count(2)))
        names.append(next(name for name in candidates if name not in names))
    return names


def disagreement(outputs: np.ndarray) -> np.ndarray:
    """Standard deviation over members of each response's scores [N, M], float64 [N], each member standardised first.

    Otherwise members that differ only in offset and scale would seem to disagree.
    """
    return _standardized(outputs).std(axis=1)


def member_disagreement(outputs: np.ndarray) -> np.ndarray:
    """Mean distance of each member's scores, of [N, M], from the mean of the others', all standardised: float64 [M]."""
    standardized = _standardized(outputs)
    others = (standardized.sum(axis=1, keepdims=True) - standardized) / (outputs.shape[1] - 1)
    return np.abs(standardized - others).mean(axis=0)


def step_metrics(scored: Sequence[ScoredExample]) -> dict[str, float]:
    """Share of labelled steps judged rightly, and how well the first wrong step is found (ProcessBench's F1).

    Steps that nobody labelled are neither right nor wrong: what the model says of them does not count.
    """
    hits: list[float] = []
    predicted, actual = [], []
    for s in scored:
        for probs, labels in zip(s.step_probs, s.example.step_labels, strict=True):
            is_labelled = ~np.isnan(labels) & (labels != RIGHT)  # half: the words that an edit left as they were
            known = is_labelled & ~np.isnan(probs)
            hits.extend((probs[known] >= RIGHT) == (labels[known] >= RIGHT))
            if is_labelled.any():
                predicted.append(_first((probs < RIGHT) & is_labelled))
                actual.append(_first(is_labelled & (labels < RIGHT)))
    return {
        "rm_eval/step_accuracy": _mean_of_known(hits),
        "rm_eval/first_error_f1": first_error_scores(predicted, actual)["f1"],
    }


def _first(is_wrong: np.ndarray) -> int:
    """Position of the first True; -1 without one."""
    return int(is_wrong.argmax()) if is_wrong.any() else -1


def _mean_of_known(values: Sequence[float]) -> float:
    """Mean of those that are numbers; NaN, and no warning, when there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _standardized(outputs: np.ndarray) -> np.ndarray:
    """Each column of `outputs` [N, M] with mean 0 and deviation 1; zeros where it is constant."""
    stds = outputs.std(axis=0)
    return (outputs - outputs.mean(axis=0)) / np.where(stds > 0, stds, 1.0)


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
    yield "rm_eval/ranking_spearman", _mean_of_known(found)


def _regression(scored: Sequence[ScoredExample], attributes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Correlations of outputs and targets; over several attributes the mean of those that exist, and each one's."""
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
    yield "rm_eval/pearson", _mean_of_known(linear)
    yield "rm_eval/spearman", _mean_of_known(monotone)
    for name, value in zip(metric_names(attributes), monotone if attributes else (), strict=True):
        yield f"rm_eval/attribute/{name}_spearman", value


def _ensemble(
    scored: Sequence[ScoredExample], members: int, loss: RewardLoss, *, num_bins: int
) -> Iterator[tuple[str, float]]:
    """How far the members disagree, and the main numbers of each as if it were the model."""
    outputs = np.concatenate([s.outputs for s in scored])
    distances = member_disagreement(outputs)
    yield "rm_eval/disagreement_mean", float(disagreement(outputs).mean())
    for k in range(members):
        alone = [replace(s, scores=s.outputs[:, k]) for s in scored]
        gaps = np.concatenate([pair_gaps(s.example, s.scores) for s in alone])
        reliability = pair_calibration(alone, loss, num_bins=num_bins)
        yield f"rm_eval/member/{k}_accuracy", pair_accuracy(gaps, 0 * gaps)
        yield f"rm_eval/member/{k}_length_correlation", length_correlation(alone)
        yield f"rm_eval/member/{k}_disagreement", float(distances[k])
        if reliability is not None:
            yield f"rm_eval/member/{k}_ece", reliability.ece
        if isinstance(loss, MSELoss):
            yield f"rm_eval/member/{k}_spearman", dict(_regression(alone, ()))["rm_eval/spearman"]
