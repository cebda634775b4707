"""The statistics that all reward workers share: what is observed is counted once, whoever is lost meanwhile."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from raylhf.cluster.actors import LOSSES, Outcome, StopRequestedError, Trouble, raise_trouble, settle
from raylhf.cluster.health import Health
from raylhf.cluster.pool import WorkerPool
from raylhf.config import RunConfig
from raylhf.rewards.state import merge_pending

PHASE = "reward statistics"
IDLE_S = 0.1


class RewardStatistics:
    """Keeps every reward worker at the same statistics, also those that come later."""

    def __init__(self, config: RunConfig, reward: WorkerPool, should_stop: Callable[[], bool]) -> None:
        self.state: dict[str, Any] = {}
        """As of the last commit: what a checkpoint holds, and what a new worker is given."""
        self.is_observing = False
        """Whether what is scored now counts in the statistics."""
        self._timeout_s = config.cluster.worker_timeout_s
        self._is_needed = config.reward.has_state
        self._reward = reward
        self._should_stop = should_stop
        self._observed: dict[str, list[float]] = {}
        """What was observed since the last commit, when the workers were last asked."""

    def begin(self) -> None:
        """Take the first worker's statistics for everybody's, now that all have started."""
        while not (states := self._tell("state_dict")):
            if self._should_stop():
                raise StopRequestedError("waiting for reward workers")
            time.sleep(IDLE_S)
            self._reward.poll()
        self.state = next(iter(states.values()))
        self.bring_back()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from saved statistics."""
        self.state = state
        for number in self._reward.up():
            self._reward.outdated(number)
        self.bring_back()

    def bring_back(self) -> None:
        """Give workers that have started since what the others have; they serve from now on."""
        stale = [number for number in self._reward.up() if self._reward.members[number].health is Health.STALE]
        for method, argument in (("load_state_dict", self.state), ("set_observing", self.is_observing)):
            stale = list(self._tell(method, argument, numbers=stale))
        for number in stale:
            self._reward.refreshed(number)

    def observe(self, is_observing: bool) -> None:
        """Whether what is scored from now on counts: training does, evaluation not."""
        if not self._is_needed:
            return
        self.is_observing = is_observing
        if is_observing:
            self.drop()  # what came in late from a batch that was given up
        self._tell("set_observing", self.is_observing)

    def take(self) -> bool:
        """Fetch what the workers have observed; false if one of them is lost with its part."""
        numbers = self._reward.up()
        observed = self._tell("take_pending", numbers=numbers)
        self._observed = merge_pending(list(observed.values()))
        return bool(numbers) and len(observed) == len(numbers)

    def drop(self) -> None:
        """Forget what the workers have observed since the last commit."""
        self._tell("take_pending")

    def commit(self) -> None:
        """Fold what was observed into the statistics of all workers."""
        if not self._is_needed:
            return
        # One worker that has committed is enough to know the new statistics; without any, the next one commits.
        while not (states := self._tell("commit", self._observed, numbers=self._reward.serving())):
            self._wait_for_one()
        self._observed = {}
        self.state = next(iter(states.values()))
        for number in set(self._reward.up()) - set(states):  # suspects, who may yet answer
            self._reward.outdated(number)

    def needs_commit(self) -> bool:
        """Whether a node of the graph has no statistics yet."""
        while not (answers := self._tell("needs_commit", numbers=self._reward.serving())):
            self._wait_for_one()
        return any(answers.values())

    def _tell(self, method: str, *args: Any, numbers: Sequence[int] | None = None) -> dict[int, Any]:
        """Call workers (None: all that are up) and wait; the values by number. Who is lost is replaced and left out."""
        chosen = self._reward.up() if numbers is None else numbers
        tickets = {number: self._reward.ticket(number) for number in chosen}
        references = {number: self._reward.submit(number, method, *args) for number in chosen}
        outcomes = settle(references, timeout_s=self._timeout_s)
        values = {}
        for number, ticket in tickets.items():
            outcome = outcomes.get(number, Outcome(trouble=Trouble.DIED, reason=f"no answer to {method}: it hangs"))
            if outcome.trouble in LOSSES:
                self._reward.lose_if_current(ticket, outcome.reason)
            else:
                raise_trouble({self._reward.name(number): outcome}, PHASE)
                values[number] = outcome.value
        return values

    def _wait_for_one(self) -> None:
        """Until a worker serves; the pool gives up by itself when none starts in time, again and again."""
        while not self._reward.serving():
            if self._should_stop():
                raise StopRequestedError("waiting for reward workers")
            self._reward.poll()
            self.bring_back()
            time.sleep(IDLE_S)
