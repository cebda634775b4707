"""What a resumed run must have in common with the run that wrote the checkpoint."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raylhf.batch import Prompt
from raylhf.config.run import CommonConfig

_FREE = (
    "name",
    "output_dir",
    "num_steps",
    "evaluation",
    "checkpoint",
    "tracking",
    "cluster",
    "launch",
    "objective.kl.budget_per_sequence",
    "objective.kl_budget_per_sequence",
    "reward.replicas",
    "reward.num_cpus",
    "reward.resources",
    "reward.placement",
    "reward.num_gpus",
    "reward.threads",
    "reward.batch_tokens",
    "rollout.replicas",
    "rollout.min_replicas",
    "rollout.max_replicas",
    "rollout.num_cpus",
    "rollout.resources",
    "rollout.placement",
    "rollout.threads",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "learner.num_ranks",
    "learner.zero_stage",
    "learner.num_cpus",
    "learner.resources",
    "learner.placement",
    "learner.threads",
)
"""Settings (and sections) that a resumed run may change: none decides what the numbers so far meant."""


def fixed_settings(config: CommonConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """The settings that must stay, by dotted key, and digests of the data by what they are of."""
    settings = dict(_leaves(config.model_dump(mode="json")))
    return {key: value for key, value in settings.items() if not _is_free(key)} | dict(data)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """12 hexadecimal digits that change when a prompt does."""
    texts = json.dumps([[*map(dict, prompt.messages)] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(texts.encode()).hexdigest()[:12]


def require_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, folder: str) -> None:
    """ValueError naming every setting in which a resumed run differs from the one that wrote the checkpoint."""
    # An older checkpoint may list settings that are free by now.
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key) and not _is_free(key)]
    if changed:
        listed = "; ".join(f"{key} was {saved.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{folder} was begun with other settings: {listed}. Give another name= for a new run, or "
            "checkpoint.resume=false to start this one anew"
        )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value
