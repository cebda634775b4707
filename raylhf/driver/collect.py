"""Sampling and scoring: prompts stream through rollout and reward workers without a barrier between them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylhf.batch import Prompt
from raylhf.cluster.actors import gather
from raylhf.config import RunConfig
from raylhf.driver.workers import Workers


@dataclass(frozen=True)
class ScoredGroup:
    """The responses of one prompt: references to the data, and small numbers about them."""

    rollouts: Any
    """Reference to Rollouts."""
    rewards: Any
    """Reference to RewardOutput."""
    rollout_summary: dict[str, Any]
    reward_summary: dict[str, Any]
    num_resamples: int = 0
    """How often the group was sampled anew because a score failed."""


def collect(
    config: RunConfig,
    workers: Workers,
    prompts: Sequence[Prompt],
    *,
    num_responses: int,
    seed_key: Sequence[int],
    should_stop: Callable[[], bool],
) -> list[ScoredGroup]:
    """Sample and score `num_responses` for each prompt, in the prompts' order.

    A group goes to its reward worker the moment it is sampled: the reward call waits for the rollout's reference in
    Ray, not for the batch. Seeds depend on `seed_key`, the prompt and its place in the batch, not on the workers.
    A group of which a leaf with `on_failure: resample` failed is sampled anew, `reward.max_resamples` times at most.
    """
    groups: dict[int, ScoredGroup] = {}
    wanted = list(range(len(prompts)))
    for attempt in range(config.reward.max_resamples + 1):
        submitted: dict[int, tuple[Any, ...]] = {}
        for i in wanted:
            key = (*seed_key, i, prompts[i].index, *([attempt] if attempt else []))
            rollouts, rollout_summary = workers.rollout.submit(
                i % len(workers.rollout),
                "generate",
                prompts[i],
                num_responses=num_responses,
                seed=response_seed(config.seed, *key),
                num_returns=2,
            )
            rewards, reward_summary = workers.reward.submit(i % len(workers.reward), "score", rollouts, num_returns=2)
            submitted[i] = (rollouts, rewards, rollout_summary, reward_summary)
        summaries = _wait(config, workers, prompts, submitted, should_stop)
        for i, (rollouts, rewards, _, _) in submitted.items():
            rollout_summary, reward_summary = summaries[i]
            if i in groups:
                reward_summary = _with_calls_of(groups[i].reward_summary, reward_summary)
            groups[i] = ScoredGroup(rollouts, rewards, rollout_summary, reward_summary, num_resamples=attempt)
        wanted = [i for i in wanted if any(groups[i].reward_summary["resample"])]
        if not wanted:
            break
    return [groups[i] for i in range(len(prompts))]


def _with_calls_of(earlier: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` with the time and the leaves' calls of an earlier attempt, whose failures count too."""
    return {
        **summary,
        "seconds": earlier["seconds"] + summary["seconds"],
        "sources": [*earlier["sources"], *summary["sources"]],
    }


def _wait(
    config: RunConfig,
    workers: Workers,
    prompts: Sequence[Prompt],
    submitted: Mapping[int, tuple[Any, ...]],
    should_stop: Callable[[], bool],
) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """The rollout and reward summaries of each place of the batch, when all are there."""
    references = {}
    for i, (_, _, rollout_summary, reward_summary) in submitted.items():
        sampler = workers.rollout.name(i % len(workers.rollout))
        scorer = workers.reward.name(i % len(workers.reward))
        # By place: a batch that crosses the end of an epoch may hold a prompt twice.
        references[f"{sampler} (place {i}, prompt {prompts[i].index})"] = rollout_summary
        references[f"{scorer} (place {i}, prompt {prompts[i].index})"] = reward_summary
    values = gather(
        references, phase="rollout and reward", timeout_s=config.cluster.step_timeout_s, should_stop=should_stop
    )
    return {i: (values[2 * n], values[2 * n + 1]) for n, i in enumerate(submitted)}


def response_seed(*key: int) -> int:
    """A seed of 31 bits that any change of the key scatters; a group uses it and the numbers after it."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


def share_among_ranks(groups: Sequence[ScoredGroup], num_ranks: int) -> list[list[ScoredGroup]]:
    """Whole groups to ranks: equally many on each, tokens balanced (longest first, back and forth)."""
    by_length = sorted(groups, key=lambda group: -group.rollout_summary["num_tokens"])
    shares: list[list[ScoredGroup]] = [[] for _ in range(num_ranks)]
    for i, group in enumerate(by_length):
        lap, place = divmod(i, num_ranks)
        shares[place if lap % 2 == 0 else num_ranks - 1 - place].append(group)
    return shares


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


def timed() -> Callable[[], float]:
    """Seconds since this call."""
    started = time.perf_counter()
    return lambda: time.perf_counter() - started
