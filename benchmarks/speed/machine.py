"""What else the machine does while something is measured: steps that others disturbed are told from the rest."""

import threading
import time
from typing import Any

import numpy as np
import psutil

PERIOD_S = 0.5
MOST_OTHERS = 0.08
"""Share of the machine's cores that others may take in a step that counts."""


class Neighbours:
    """Samples the CPU seconds of a process with all below it, and of the whole machine, while it is entered."""

    def __init__(self, pid: int) -> None:
        self._tree = psutil.Process(pid)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._own: dict[tuple[int, float], float] = {}
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
            self._samples.append((time.time(), busy, self._tree_s()))

    def _tree_s(self) -> float:
        """CPU seconds of all processes that were ever seen in the tree."""
        try:
            processes = [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                spent = process.cpu_times()
                self._own[process.pid, process.create_time()] = spent.user + spent.system
            except psutil.NoSuchProcess:
                continue
        return sum(self._own.values())

    def share(self, began: float, ended: float) -> float:
        """Of all cores, what others took between two times (of `time.time`)."""
        moments, busy, own = np.array(self._samples).T
        others = np.interp([began, ended], moments, busy - own)
        return float((others[1] - others[0]) / (ended - began) / (psutil.cpu_count() or 1))


def calm(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps in which others took little; where there is none, the calmest."""
    found = [step for step in steps if step["others"] <= MOST_OTHERS]
    return found or [min(steps, key=lambda step: step["others"])]
