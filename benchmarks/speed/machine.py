"""What else the machine does while something is measured: steps that others disturbed are told from the rest."""

import threading
import time
import uuid
from typing import Any

import numpy as np
import psutil

PERIOD_S = 1.0
MOST_OTHERS = 0.12
"""Share of the machine's cores that others may take in a step that counts."""


class Neighbours:
    """Samples the CPU seconds of a program with all that it starts, and of the whole machine, while it is entered.

    The program is to be started with `mark` in its environment: processes that leave its tree keep that.
    """

    def __init__(self) -> None:
        self.mark = {"RAYLHF_SPEED_RUN": uuid.uuid4().hex}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_own: dict[int, bool] = {}
        self._spent: dict[int, float] = {}
        self._samples: list[tuple[float, float, float]] = []

    def __enter__(self) -> "Neighbours":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            times: Any = psutil.cpu_times()
            busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
            self._samples.append((time.time(), busy, self._own_s()))

    def _own_s(self) -> float:
        """CPU seconds of all processes that were ever seen with the mark."""
        for pid in psutil.pids():
            try:
                process = psutil.Process(pid)
                if not self._is_own.get(pid, False) and (pid not in self._is_own or self._is_young(process)):
                    self._is_own[pid] = self.mark.items() <= process.environ().items()
                if self._is_own[pid]:
                    spent = process.cpu_times()
                    self._spent[pid] = spent.user + spent.system
            except psutil.Error:
                continue
        return sum(self._spent.values())

    def _is_young(self, process: psutil.Process) -> bool:
        """Whether it may have been seen between fork and exec, with its parent's environment."""
        return process.create_time() > time.time() - 4 * PERIOD_S

    def share(self, began: float, ended: float) -> float:
        """Of all cores, what others took between two times (of `time.time`)."""
        moments, busy, own = np.array(self._samples).T
        others = np.interp([began, ended], moments, busy - own)
        return float((others[1] - others[0]) / (ended - began) / (psutil.cpu_count() or 1))


def calm(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps in which others took little; where there is none, the calmest."""
    found = [step for step in steps if step["others"] <= MOST_OTHERS]
    return found or [min(steps, key=lambda step: step["others"])]
