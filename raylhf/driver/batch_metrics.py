"""Numbers of a batch of scored responses."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from raylhf.driver.collect import ScoredGroup


def batch_metrics(groups: Sequence[ScoredGroup], *, area: str, seconds: float | None = None) -> dict[str, float]:
    """Scores and response lengths of a batch; `area` is `reward` for training and `eval` for held-out prompts.

    Raises:
        ValueError: not one response got a valid score; the sentence gives the first reasons.
    """
    scores = np.concatenate([group.reward_summary["scores"] for group in groups])
    valid = np.concatenate([group.reward_summary["valid"] for group in groups])
    lengths = np.concatenate([group.rollout_summary["lengths"] for group in groups])
    truncated = sum(group.rollout_summary["num_truncated"] for group in groups) / len(lengths)
    if not valid.any():
        reasons = [error for group in groups for error in group.reward_summary["errors"]][:3]
        raise ValueError(f"no response of the batch got a valid score ({len(valid)} responses): {'; '.join(reasons)}")
    scored = scores[valid]
    metrics = {
        f"{area}/score_mean": float(scored.mean()),
        f"{area}/score_se": clustered_standard_error(
            [np.array(group.reward_summary["scores"])[group.reward_summary["valid"]] for group in groups]
        ),
        f"{area}/invalid_count": float((~valid).sum()),
    }
    metrics |= _part_metrics(groups, valid, area) | _source_metrics(groups, area)
    prefix = "eval" if area == "eval" else "rollout"
    metrics |= {f"{prefix}/response_length_mean": float(lengths.mean()), f"{prefix}/truncated_frac": truncated}
    if area == "eval":
        return metrics
    num_tokens = int(lengths.sum())
    metrics |= {
        "reward/score_std": float(scored.std()),
        "rollout/response_length_p95": float(np.percentile(lengths, 95)),
        "rollout/zero_length_count": float((lengths == 0).sum()),
        "rollout/num_tokens": float(num_tokens),
    }
    metrics["time/reward_s"] = sum(group.reward_summary["seconds"] for group in groups)
    metrics["reward/resampled_count"] = float(sum(group.num_resamples > 0 for group in groups))
    if seconds is not None:
        metrics["rollout/tokens_per_s"] = num_tokens / seconds
    return metrics


def version_metrics(groups: Sequence[ScoredGroup], *, version: int) -> dict[str, float]:
    """How old the weights were that sampled a batch, which is learnt from by weights of version `version`."""
    summaries = [group.rollout_summary for group in groups]
    oldest = min((s["policy_version"] for s in summaries if s["policy_version"] is not None), default=version)
    num_tokens = sum(summary["num_tokens"] for summary in summaries)
    num_responses = sum(len(summary["lengths"]) for summary in summaries)
    mean = sum(summary["version_sum"] for summary in summaries) / num_tokens if num_tokens else version
    return {
        "rollout/policy_version": float(oldest),
        "rollout/staleness_max": float(version - oldest),
        "rollout/staleness_mean": version - mean,
        "rollout/mixed_versions_frac": sum(summary["num_mixed"] for summary in summaries) / num_responses,
    }


def _part_metrics(groups: Sequence[ScoredGroup], valid: np.ndarray, area: str) -> dict[str, float]:
    """Mean and spread of each named part, over the valid responses to which it applies."""
    metrics = {}
    for name in dict.fromkeys(name for group in groups for name in group.reward_summary["parts"]):
        columns = [(g.reward_summary["parts"].get(name), len(g.reward_summary["scores"])) for g in groups]
        part = np.concatenate([np.full(n, np.nan) if column is None else column for column, n in columns])
        applies = part[valid & ~np.isnan(part)]
        if len(applies):
            metrics |= {
                f"{area}/part/{name}_mean": float(applies.mean()),
                f"{area}/part/{name}_std": float(applies.std()),
            }
    return metrics


def _source_metrics(groups: Sequence[ScoredGroup], area: str) -> dict[str, float]:
    """How long each leaf's calls took, what they gave, and how many responses it failed to score or read in part."""
    calls: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        for call in group.reward_summary["sources"]:
            calls[call["source"]].append(call)
    metrics = {}
    for name, own in calls.items():
        seconds = [call["seconds"] for call in own]
        metrics |= {
            f"{area}/source/{name}_latency_p50_s": float(np.percentile(seconds, 50)),
            f"{area}/source/{name}_latency_p95_s": float(np.percentile(seconds, 95)),
            f"{area}/source/{name}_failed_count": float(sum(call["num_failed"] for call in own)),
            f"{area}/source/{name}_truncated_count": float(sum(call["num_truncated"] for call in own)),
        }
        counts = np.array([call["num_responses"] - call["num_failed"] for call in own], dtype=np.float64)
        if counts.any():
            kept = counts > 0
            means, stds = (np.array([call[key] for call in own])[kept] for key in ("score_mean", "score_std"))
            mean = np.average(means, weights=counts[kept])
            square = np.average(stds**2 + (means - mean) ** 2, weights=counts[kept])
            metrics |= {
                f"{area}/source/{name}_score_mean": float(mean),
                f"{area}/source/{name}_score_std": float(np.sqrt(square)),
            }
    return metrics


def clustered_standard_error(groups: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over all scores, where those of one prompt are one cluster (they resemble each other).

    0 with fewer than two prompts that have a score.
    """
    filled = [group for group in groups if len(group)]
    if len(filled) < 2:
        return 0.0
    everything = np.concatenate(filled)
    residuals = np.array([(group - everything.mean()).sum() for group in filled])
    count = len(filled)
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(everything))
