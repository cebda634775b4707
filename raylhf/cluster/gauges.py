"""Numbers of a run as gauges of Ray, from where Prometheus reads them at the node of the driver."""

import logging
import math
import threading
from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge

from raylhf.tracking.exported import EXPORTED, RUN_LABEL, Series

LOGGER = logging.getLogger(__name__)
REPEAT_S = 1.0
"""Ray drops a gauge that was not set for two of its report intervals, of which the shortest is 1 s, the usual 10 s."""
END_TIMEOUT_S = 10.0


class Gauges:
    """Keeps the values that were set last in Ray, until `close`: a step may take longer than Ray remembers them.

    No failure gets out of here; the first one is told of in the log.
    """

    def __init__(self, run: str) -> None:
        """Ray must be there, until after `close`."""
        self.look: Callable[[], Mapping[Series, float]] = dict
        """What is looked up each time, in a thread of its own."""
        self._run = run
        self._values: dict[Series, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._has_failed = False
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="raylhf-gauges", daemon=True)
        self._thread.start()

    def update(self, values: Mapping[Series, float]) -> None:
        """Set values from now on. One that is not finite is not exported, and takes an earlier one with it."""
        with self._lock:
            self._values |= values

    def close(self) -> None:
        """Set nothing any more; Ray drops the gauges after two of its report intervals."""
        self._end.set()
        self._thread.join(END_TIMEOUT_S)

    def _repeat(self) -> None:
        while not self._end.wait(REPEAT_S):
            try:
                with self._lock:
                    values = dict(self._values)
                for series, value in {**values, **self.look()}.items():
                    if math.isfinite(value):
                        self._set(series, value)
            except Exception as error:  # whatever it is, the run is worth more than its gauges
                if not self._has_failed:
                    LOGGER.warning("the run's numbers cannot be handed to Prometheus (%s); the run goes on", error)
                self._has_failed = True

    def _set(self, series: Series, value: float) -> None:
        exported = EXPORTED[series.name]
        if series.name not in self._gauges:
            self._gauges[series.name] = Gauge(series.name, exported.meaning, (RUN_LABEL, *exported.labels))
        tags = dict(zip(exported.labels, series.labels, strict=True))
        self._gauges[series.name].set(value, {RUN_LABEL: self._run, **tags})
