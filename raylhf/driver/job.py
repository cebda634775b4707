"""What `train` asks of each kind of run."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raylhf.config.run import AnyRunConfig, RunConfig
from raylhf.tracking import Tracker

Checkpoint = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and the driver's state in it."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # Threads that spin while they wait stall each other where cores are shared, as on a laptop: ten times slower, seen.
    # Ten thousand turns, about 0.1 ms, reach from one operation to the next: a learner alone on its cores is 1.2 times
    # as fast as without, and one of two that share them 0.87 times. See `environment_of` too.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    # Bytes. Ray sends results below 100 kB to whoever called, that is the driver: it is to get summaries, no responses.
    "RAY_max_direct_call_object_size": "500",
}
"""Of every worker process."""
LONG_SPIN = "300000"
"""GNU OpenMP's own default, some milliseconds: threads stay awake between all operations of a step. A synchronous step
of GRPO with two threads on two cores takes 13.2 s with it instead of 15.5 s, and 17.9 instead of 28.3 s beside a busy
process of lower priority, which takes the cores of threads that sleep (three steps each, and one)."""


def environment_of(config: AnyRunConfig) -> dict[str, str]:
    """Of every worker process of a run: threads wait awake for longer where no more of them work at a time than this
    machine has cores, if it is the only one."""
    learner = config.learner.num_ranks * config.learner.threads
    counts = [learner]
    if isinstance(config, RunConfig):
        rollout, reward = config.rollout, config.reward
        sampling = rollout.most_replicas * rollout.threads
        if reward.threads > 1:  # one thread alone waits for no other
            sampling += reward.replicas * reward.threads
        counts = [learner + sampling] if rollout.max_staleness > 0 else [learner, sampling]
    has_room = config.cluster.address is None and max(counts) <= len(os.sched_getaffinity(0))
    return ENVIRONMENT | ({"GOMP_SPINCOUNT": LONG_SPIN} if has_room else {})


@dataclass(frozen=True)
class RunContext:
    """What a running job works with."""

    folder: Path
    tracker: Tracker
    fingerprint: dict[str, Any]
    """The settings that a resumed run must share."""
    should_stop: Callable[[], bool]
    evaluations: list[dict[str, Any]]
    """Held-out evaluations so far, oldest first: {step, metrics, samples, ...}."""


class Job(Protocol):
    """One kind of run."""

    num_steps: int
    """Steps of the whole run."""
    fingerprint: dict[str, Any]
    """Settings and data that decide what the numbers mean."""

    def run(self, context: RunContext, checkpoint: Checkpoint | None) -> str:
        """Start Ray and workers, train, export; returns how it ended: `complete`, `stopped`, `over KL budget`."""
        ...

    def rows_under_way(self) -> list[int]:
        """Rows of the data that the batch under way is made of, as far as the driver knows them."""
        ...

    def summary(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Numbers of the whole run, for the tracker's summary."""
        ...

    def report(self, folder: Path, status: str, evaluations: list[dict[str, Any]]) -> None:
        """Print what the run came to."""
        ...
