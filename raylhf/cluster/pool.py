"""Workers of one role that come and go: each is watched, and replaced when its process ends or falls silent."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylhf.cluster.actors import (
    START,
    Identity,
    Launcher,
    Outcome,
    Trouble,
    WorkerError,
    kill,
    submit,
    take_finished,
)
from raylhf.cluster.health import UP, Event, Health, Pulse

SUSPECT_SHARE = 0.5
"""Of the time after which a silent worker counts as hung."""
ROOM_LOOK_S = 0.2
"""Between two looks whether there is room for those that are to join."""
ASK_SHARE = 0.1
"""Of the same time: how often a worker is asked whether it is there."""
_REAP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Ticket:
    """One process of a worker."""

    number: int
    launch: int
    """Count of the processes so far that had this number."""


@dataclass(frozen=True)
class Loss:
    """A worker that is gone."""

    name: str
    number: int
    reason: str
    log_file: str
    """Where it wrote, on its node."""
    identity: Identity | None
    """Where it was; None if it never came up."""
    is_extra: bool
    """It was to join the others, which go on without it; else another takes its place."""


@dataclass
class Member:
    """One worker of a pool, over all processes that it has been."""

    number: int
    actor: Any
    pulse: Pulse
    heard_of_at: float
    """When it was launched, had started, or was last asked whether it is there."""
    identity: Identity | None = None
    children: Sequence[tuple[int, float]] = ()
    """Process number and start time of each process below it."""
    open_calls: dict[str, Any] = field(default_factory=dict)
    """References of `start`, `identity` and the heartbeat while they are not answered."""
    launches: int = 1
    """Count of the processes so far that had this number, also before it left and came back."""
    num_losses: int = 0
    """Since the last progress of the run."""
    is_extra: bool = False
    """It was launched beside others that serve, and has not served yet."""
    has_served: bool = False
    """This process has had what the others have."""

    @property
    def health(self) -> Health:
        return self.pulse.health


class WorkerPool:
    """The workers of a role.

    `start` of the plain worker returns a mapping, of which `children` are the processes below it; `ping` answers while
    the worker is well. A lost worker is replaced at once under its number; it serves after the caller has given it
    what the others have (`refreshed`).
    """

    def __init__(
        self,
        launcher: Launcher,
        arguments: Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        size: int,
        silence_s: float,
        start_timeout_s: float,
        max_losses: int,
        on_loss: Callable[[Loss], None],
        join: Callable[[int], bool] = lambda number: True,
        leave: Callable[[int], None] = lambda number: None,
    ) -> None:
        """`arguments(number)` are those of the plain worker's constructor; `max_losses` of one worker without progress
        of the run in between are one too many. `join(number)` asks for room for a further one and says whether it is
        there by now; `leave(number)` frees it, or ends the asking."""
        self.role = launcher.role
        self._launcher = launcher
        self._arguments = arguments
        self._silence_s = silence_s
        self._start_timeout_s = start_timeout_s
        self._max_losses = max_losses
        self._on_loss = on_loss
        self._join = join
        self._leave = leave
        self._launches: Counter[int] = Counter()
        self._looked_at = time.monotonic()
        self._looked_for_room_at = self._looked_at
        self.num_restarts = 0
        """Processes that took the place of lost ones so far."""
        self.members: dict[int, Member] = {number: self._launch(number) for number in range(size)}
        self.awaited: set[int] = set()
        """Numbers of those that join as soon as there is room."""

    # --- who is there -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Workers that are there, or are awaited."""
        return len(self.members) + len(self.awaited)

    def serving(self) -> list[int]:
        """Numbers of the workers that may be given work."""
        return [number for number, member in self.members.items() if member.health is Health.HEALTHY]

    def up(self) -> list[int]:
        """Numbers of the workers whose process has started."""
        return [number for number, member in self.members.items() if member.health in UP]

    def newcomers(self) -> list[int]:
        """Of those that are up, the numbers of the workers whose process has not served yet."""
        return [number for number in self.up() if not self.members[number].has_served]

    def name(self, number: int) -> str:
        return f"{self.role} {number}"

    def ticket(self, number: int) -> Ticket:
        """What tells this process of a worker from the ones before and after it."""
        return Ticket(number, self.members[number].launches)

    # --- calls ------------------------------------------------------------------------------------------------------

    def submit(self, number: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        """Call one worker without waiting; returns a reference, or a list of them."""
        return submit(self.members[number].actor, method, *args, num_returns=num_returns, **kwargs)

    def submit_to(self, numbers: Sequence[int], method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call several workers without waiting; references by worker name."""
        return {self.name(number): self.submit(number, method, *args, **kwargs) for number in numbers}

    # --- life -------------------------------------------------------------------------------------------------------

    def start_references(self) -> dict[str, Any]:
        """The open start-up calls by worker name, for a caller that waits for all of them."""
        return {
            self.name(number): member.open_calls[START]
            for number, member in self.members.items()
            if START in member.open_calls
        }

    def poll(self) -> list[int]:
        """Take in what is new, without waiting; returns the workers that were lost since (and are replaced already).

        Those that are awaited are launched where there is room for them by now.

        Raises:
            WorkerError: a worker is lost again and again.
            ValueError: one of the first processes says that its settings cannot be served; later ones are lost.
        """
        now, lost = time.monotonic(), []
        if now - self._looked_at > SUSPECT_SHARE * self._silence_s:  # the run learnt, or sent weights, meanwhile
            for member in self.members.values():
                member.pulse.overlooked(now)
        self._looked_at = now
        for number in list(self.members):
            if reason := self._look_at(number, now):
                self.lose(number, reason)
                lost.append(number)
        if self.awaited and now - self._looked_for_room_at > ROOM_LOOK_S:
            self._let_in()
        return lost

    def refreshed(self, number: int) -> None:
        """The worker has what the others have."""
        member = self.members[number]
        member.is_extra, member.has_served = False, True
        member.pulse.apply(Event.REFRESHED)

    def outdated(self, number: int) -> None:
        """An update did not reach the worker, or not wholly."""
        self.members[number].pulse.apply(Event.OUTDATED)

    def lose_if_current(self, ticket: Ticket, reason: str) -> None:
        """`lose` the worker, unless that process is replaced already, or has left."""
        if ticket.number in self.members and self.ticket(ticket.number) == ticket:
            self.lose(ticket.number, reason)

    def lose(self, number: int, reason: str) -> None:
        """End what is left of a worker and start another in its place, unless it was to join the others.

        Raises:
            WorkerError: it was lost too often without progress of the run in between.
        """
        member = self.members[number]
        member.pulse.apply(Event.LOST)
        self._end(member)
        log_file = "" if self._launcher.log_folder is None else str(self._launcher.log_file(number))
        self._on_loss(Loss(self.name(number), number, reason, log_file, member.identity, member.is_extra))
        if member.is_extra:
            del self.members[number]
            self._leave(number)
            return
        if member.num_losses >= self._max_losses:
            raise WorkerError(
                f"{self.name(number)} was lost {member.num_losses + 1} times without a finished step in between "
                f"(cluster.max_restarts={self._max_losses}); the last time: {reason}"
            )
        member.pulse.apply(Event.RELAUNCHED)
        new = self._launch(number)
        self.num_restarts += 1
        new.num_losses = member.num_losses + 1
        self.members[number] = new

    def progressed(self) -> None:
        """The run has finished a step: earlier losses are forgiven."""
        for member in self.members.values():
            member.num_losses = 0

    def resize(self, size: int) -> None:
        """Let further workers join as soon as there is room, or end some, whose calls then end as those of the dead.

        Those that are awaited leave first, then those that do not serve, then those with the highest numbers. A further
        worker that does not come up is given up, instead of being launched again and again: the others do without it.
        """
        leaving = sorted(self.members, key=lambda n: (self.members[n].health is Health.HEALTHY, -n))
        for number in leaving[: max(len(self.members) - size, 0)]:
            self._end(self.members.pop(number))
            self._leave(number)
        free = (number for number in itertools.count() if number not in self.members)
        wanted = set(itertools.islice(free, max(size - len(self.members), 0)))
        for number in self.awaited - wanted:
            self._leave(number)
        self.awaited = wanted
        self._let_in()

    def kill(self) -> None:
        """End all processes at once, and those below them."""
        for member in self.members.values():
            self._end(member)

    def _let_in(self) -> None:
        """Launch those of the awaited for whom there is room."""
        self._looked_for_room_at = time.monotonic()
        for number in sorted(filter(self._join, self.awaited)):
            self.awaited.remove(number)
            self.members[number] = self._launch(number)
            self.members[number].is_extra = True

    def _end(self, member: Member) -> None:
        kill(member.actor)
        self._end_children(member)

    def _launch(self, number: int) -> Member:
        args, kwargs = self._arguments(number)
        actor = self._launcher.launch(number, *args, **kwargs)
        pulse = Pulse(suspect_after_s=SUSPECT_SHARE * self._silence_s, dead_after_s=self._silence_s)
        calls = {"identity": actor.identity.remote(), START: submit(actor, START)}
        self._launches[number] += 1
        return Member(number, actor, pulse, time.monotonic(), open_calls=calls, launches=self._launches[number])

    def _look_at(self, number: int, now: float) -> str:
        """Why a worker is lost, or an empty string."""
        member = self.members[number]
        for call, outcome in take_finished(member.open_calls, wait_s=0).items():
            if reason := self._take_in(member, call, outcome):
                return reason
        if member.health is Health.RESTARTING:
            late = now - member.heard_of_at > self._start_timeout_s
            return f"it did not start within {self._start_timeout_s:g} s" if late else ""
        if member.pulse.is_lost(now):
            return f"it did not answer for {member.pulse.silent_for(now):.0f} s: it hangs"
        if "ping" not in member.open_calls and now - member.heard_of_at > ASK_SHARE * self._silence_s:
            member.heard_of_at = now
            member.open_calls["ping"] = self.submit(number, "ping")
            member.pulse.asked(now)
        return ""

    def _take_in(self, member: Member, call: str, outcome: Outcome) -> str:
        """Note the answer to one of our own calls; why the worker is lost, or an empty string."""
        if outcome.trouble is Trouble.MISTAKE and member.launches == 1 and not member.is_extra:
            raise ValueError(f"{self.name(member.number)}, {call}: {outcome.reason}")
        if outcome.trouble is not None:
            return outcome.reason
        if call == "identity":
            member.identity = outcome.value
        elif call == START:
            member.children = tuple((outcome.value or {}).get("children", ()))
            member.pulse.apply(Event.STARTED)
            member.heard_of_at = time.monotonic()
        else:
            member.pulse.apply(Event.ANSWERED)
        return ""

    def _end_children(self, member: Member) -> None:
        """Kill the processes below a worker that is gone: one that is stopped cannot see that its owner has ended."""
        if not member.children or member.identity is None:
            return
        if member.identity.node_id == ray.get_runtime_context().get_node_id():
            end_processes(member.children)
            return
        strategy: Any = NodeAffinitySchedulingStrategy(member.identity.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(end_processes)
        task.remote(list(member.children))  # not waited for: the node may be gone, and its processes with it


def end_processes(processes: Sequence[tuple[int, float]]) -> None:
    """Kill processes of this machine, given as (number, start time): a number may belong to another one by now."""
    for pid, started in processes:
        try:
            process = psutil.Process(pid)
            if process.create_time() == started:
                process.kill()
        except psutil.NoSuchProcess:
            continue
