"""Where the time between the command and the first step goes."""

import time
from collections.abc import Mapping

PARTS = {
    "start": ("program", "time/start_program_s"),
    "starting Ray": ("Ray", "time/start_ray_s"),
    "waiting for the nodes": ("nodes", "time/start_nodes_s"),
    "preparing the model": ("model", "time/start_model_s"),
    "starting workers": ("workers", "time/start_workers_s"),
    "first weights": ("first weights", "time/start_sync_s"),
    "calibrating rewards": ("calibration", "time/start_calibration_s"),
    "evaluation": ("evaluation", "time/start_evaluation_s"),
}
"""The phases of a start, each with its name for people and its metric."""
WITHIN_WORKERS = {"time/start_engine_s": "vLLM engine", "time/start_learner_s": "learners"}
"""What a worker tells of its own start; runs beside the other workers'."""


class StartUp:
    """Adds up the seconds of each phase until the first step."""

    def __init__(self, *, began: float) -> None:
        """`began`: when the program was started, as `time.time()` tells it."""
        self._began = self._since = began
        self._phase = "start"
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """One phase ends and another begins."""
        now = time.time()
        if self._phase in PARTS:
            key = PARTS[self._phase][1]
            self._seconds[key] = self._seconds.get(key, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def metrics(self) -> dict[str, float]:
        """Seconds of each part so far, and of the whole."""
        self.enter("")
        return {"time/start_s": time.time() - self._began, **self._seconds}


def start_line(metrics: Mapping[str, float]) -> str:
    """The parts in one sentence for people; those below a tenth of a second are left out."""
    inside = [f"{name} {metrics[key]:.1f}" for key, name in WITHIN_WORKERS.items() if key in metrics]
    parts = []
    for name, key in PARTS.values():
        if metrics.get(key, 0.0) >= 0.1:
            details = f" ({', '.join(inside)})" if key == "time/start_workers_s" and inside else ""
            parts.append(f"{name} {metrics[key]:.1f}{details}")
    return f"first step after {metrics['time/start_s']:.1f} s: {', '.join(parts)}"
