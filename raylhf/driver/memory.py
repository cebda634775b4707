"""Memory of the run's processes on the driver's machine, and of Ray's object stores on all of them."""

import logging

import psutil

from raylhf.cluster.session import object_store_use

LOGGER = logging.getLogger(__name__)
STORE_WARNING = 0.7
"""Share of an object store in use from which it is told of: from 0.8 on Ray moves values to the disk, by default."""


class StoreWatch:
    """Tells of an object store that is filling up before that slows the run down, or fills a disk."""

    def __init__(self) -> None:
        self._is_told = False

    def fullest(self) -> float:
        """The share in use of the fullest node's store; a warning goes out once each time that it becomes high."""
        use = object_store_use()
        if not use:
            return 0.0
        node = max(use, key=lambda name: use[name])
        is_high = use[node] >= STORE_WARNING
        if is_high and not self._is_told:
            LOGGER.warning(
                "the object store of %s is %.0f %% full; from 80 %% on Ray moves responses to its disk, which is slow. "
                "Give it more (cluster.object_store_gib, or ray start --object-store-memory where Ray was started "
                "by hand), or sample less at once (rollout.prompts_per_step, group_size, max_staleness)",
                node,
                100 * use[node],
            )
        self._is_told = is_high
        return use[node]


def total_rss_gib() -> float:
    """Resident memory of this process and all below it (Ray, workers, engines), in GiB. Shared pages count twice."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended since it was listed
            continue
    return total / 2**30
