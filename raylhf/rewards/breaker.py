"""A circuit breaker: leaves a failing server alone for a while."""

import time
from collections.abc import Callable


class CircuitBreaker:
    """Leaves a failing server alone for `reset_s` seconds after `failures` failures in a row.

    Then a probe decides. A passed probe lets calls through, and only a success forgets the failures: the next
    failure leaves the server alone again.
    """

    def __init__(self, *, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic):
        self._limit = failures
        self._reset_s = reset_s
        self._clock = clock
        self._num_failures = 0
        self._opened_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls may go through only after a probe, if at all."""
        return self._opened_at is not None

    @property
    def remaining_s(self) -> float:
        """Until a probe is due."""
        return 0.0 if self._opened_at is None else max(0.0, self._opened_at + self._reset_s - self._clock())

    def succeeded(self) -> None:
        self._num_failures = 0
        self._opened_at = None

    def failed(self) -> None:
        self._num_failures += 1
        if self._num_failures >= self._limit:
            self._opened_at = self._clock()

    def probed(self, *, is_healthy: bool) -> None:
        self._opened_at = None if is_healthy else self._clock()
