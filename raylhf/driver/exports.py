"""What the driver hands to Prometheus: the rows that it logs, and what it knows of workers and prompts at any time."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raylhf.cluster.gauges import Gauges
from raylhf.cluster.health import Health
from raylhf.driver.batches import BatchQueue
from raylhf.driver.collect import STAGES
from raylhf.driver.workers import Workers
from raylhf.tracking import Tracker
from raylhf.tracking.exported import Series, exported_row

_LAST_STEP = Series("raylhf_last_step_timestamp_seconds")


@contextmanager
def exporting(run: str, tracker: Tracker) -> Iterator[Gauges]:
    """Export the rows that `tracker` logs meanwhile, as those of the run of this name; Ray must be there."""
    gauges = Gauges(run)

    def export(step: int, row: Mapping[str, float]) -> None:
        values = exported_row(row) | {Series("raylhf_step"): step}
        if "time/step_s" in row:
            values[_LAST_STEP] = time.time()
        gauges.update(values)

    gauges.update({Series("raylhf_step"): tracker.step, _LAST_STEP: time.time()})
    tracker.listener = export
    try:
        yield gauges
    finally:
        tracker.listener = None
        gauges.close()


def live_values(workers: Workers, batches: BatchQueue) -> dict[Series, float]:
    """Where workers and prompts stand now. Nothing is asked or changed, so that any thread may call it."""
    values: dict[Series, float] = {}
    for pool in (workers.rollout, workers.reward):
        counts = Counter(member.health for member in list(pool.members.values()))
        values |= {Series("raylhf_workers", (pool.role, health.value)): counts[health] for health in Health}
        values[Series("raylhf_worker_restarts", (pool.role,))] = pool.num_restarts
    values[Series("raylhf_worker_restarts", ("learner",))] = workers.num_learner_restarts
    stages = batches.stages()
    return values | {Series("raylhf_queue_prompts", (stage,)): stages[stage] for stage in STAGES}
