"""A stopwatch."""

import time
from collections.abc import Callable


def timed() -> Callable[[], float]:
    """Seconds since this call."""
    started = time.perf_counter()
    return lambda: time.perf_counter() - started
