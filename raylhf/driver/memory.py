"""Memory of the run's processes on the driver's machine."""

import psutil


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
