"""How many rollout workers a run has while it goes on: as somebody asks for, or as the measured times suggest."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylhf.config import RunConfig

if TYPE_CHECKING:  # `raylhf scale` needs no Ray
    from raylhf.cluster.pool import WorkerPool

LOGGER = logging.getLogger(__name__)
FILE = "scale.json"
PATIENCE = 3
"""Steps in a row that must suggest a change before it is made: starting an engine takes longer than most steps."""
REST = 20
"""Steps without a change, after a worker that was to join did not come up."""
ADD_ABOVE = 1.25
"""Ratio of the times of rollout and learner above which one worker more is worth its start."""
REMOVE_BELOW = 0.8
"""The same ratio as it would be with one worker less, below which that one is not missed."""


@dataclass
class ScalingPolicy:
    """Follows the ratio of the rollout's time to the learner's, one worker at a time, within bounds."""

    least: int
    most: int
    _direction: int = 0
    _count: int = 0
    _rest: int = 0

    def rest(self) -> None:
        """Suggest nothing for the next `REST` steps."""
        self._rest = REST

    def next_size(self, size: int, *, rollout_s: float, learn_s: float) -> int:
        """Workers from the next step on, after a step with `size` of them that took these times."""
        if self._rest:
            self._rest -= 1
            return size
        direction = self._suggestion(size, rollout_s / max(learn_s, 1e-9))
        self._count = self._count + 1 if direction == self._direction else 1
        self._direction = direction
        if direction == 0 or self._count < PATIENCE:
            return size
        self._count = 0
        return size + direction

    def _suggestion(self, size: int, ratio: float) -> int:
        if ratio > ADD_ABOVE and size < self.most:
            return 1
        if size > self.least and ratio * size / (size - 1) < REMOVE_BELOW:
            return -1
        return 0


class RolloutScaling:
    """The number of rollout workers that a run is to have."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """A request in the run's folder counts also where it was made before the run was resumed.

        The run starts with no more workers than its settings say, for which the cluster must have room; those that were
        asked for beyond them join when it goes on.
        """
        rollout = config.rollout
        self._folder = folder
        self._sizes = config.rollout_sizes
        self._policy = ScalingPolicy(rollout.least_replicas, rollout.most_replicas) if rollout.is_elastic else None
        self._stamp: Any = None
        self._pool: WorkerPool | None = None
        """The workers, if all of them served when the step under way began."""
        self._num_members = 0
        """Workers when the step under way began."""
        self._asked = 0
        """Workers that the pool was last asked for."""
        self._num_awaited = 0
        """Workers of which it was last told that they wait for room."""
        self.size = rollout.replicas
        """Workers from now on."""
        self._read_request()
        self.start_size = min(self.size, rollout.replicas)
        if self.size != rollout.replicas:
            LOGGER.warning(
                "%s asks for %d rollout workers instead of rollout.replicas=%d; remove it to have those again",
                folder / FILE,
                self.size,
                rollout.replicas,
            )

    def follow(self, pool: "WorkerPool") -> None:
        """Let workers join or leave, as asked for; to be called between two steps."""
        is_new = self._read_request()
        if pool.size < self._asked and not is_new:  # one that was to join did not come up
            self._settle_for(pool.size)
        self._tell_of_awaited(len(pool.awaited))
        if pool.size != self.size:
            LOGGER.warning("rollout workers: %d -> %d", pool.size, self.size)
            pool.resize(self.size)
        self._asked = self.size
        self._num_members = len(pool.members)
        self._pool = pool if _all_serve(pool) else None

    def after_step(self, *, rollout_s: float, learn_s: float) -> None:
        """Follow the times of a step, where the settings give bounds, and where all workers served all the time: else
        the times do not say what that many of them need.

        One that is to join stays asked for until it is there, or fewer than those that are there would do.
        """
        pool, present = self._pool, self._num_members
        if self._policy is None or pool is None or len(pool.members) != present or not _all_serve(pool):
            return
        size = self._policy.next_size(present, rollout_s=rollout_s, learn_s=learn_s)
        if size != present:
            self.size = size if size < present else max(self.size, size)

    def _tell_of_awaited(self, count: int) -> None:
        if count > self._num_awaited:
            LOGGER.warning(
                "%d of %d rollout workers wait for room: a node that an autoscaler brings, or what others free",
                count,
                self._asked,
            )
        self._num_awaited = count

    def _settle_for(self, size: int) -> None:
        """Go on with those that are there, until somebody asks again or the policy has rested."""
        self.size = size
        if self._policy is not None:
            self._policy.rest()

    def _read_request(self) -> bool:
        """Take in what `raylhf scale` has asked for since the last time; whether it has."""
        file = self._folder / FILE
        try:
            status = file.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            request = _parse(file.read_text())
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            LOGGER.warning("%s is not a request of raylhf scale (%s); it is left alone", file, error)
            return False
        self.size = min(max(request, self._sizes[0]), self._sizes[-1])
        if self.size != request:
            LOGGER.warning("%s asks for %d rollout workers; the settings allow %d", file, request, self.size)
        return True


def request_size(folder: Path, size: int) -> None:
    """Ask the run of `folder` for `size` rollout workers: it follows before its next step."""
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps({"rollout": size}))
    temporary.rename(folder / FILE)


def _all_serve(pool: "WorkerPool") -> bool:
    return len(pool.serving()) == len(pool.members)


def set_request_aside(folder: Path) -> None:
    """Move what was asked of an earlier run out of the way of one that starts anew (`scale.1.json`)."""
    from raylhf.tracking.jsonl import unused_name

    file = folder / FILE
    if file.exists():
        file.rename(unused_name(file))


def _parse(text: str) -> int:
    """The size that is asked for; a ValueError says why it is none."""
    request = json.loads(text)
    size = request.get("rollout") if isinstance(request, dict) else None
    if type(size) is not int or size < 1:
        raise ValueError(f'it must be {{"rollout": N}} with N of 1 or more, not {text.strip()[:80]!r}')
    return size
