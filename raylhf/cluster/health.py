"""What a worker that may be replaced goes through, as a pure state machine: no Ray, and no clock of its own."""

from dataclasses import dataclass
from enum import Enum


class Health(Enum):
    """Where a worker stands."""

    HEALTHY = "healthy"
    """It answers, and serves the current weights (or the current statistics of a reward)."""
    SUSPECT = "suspect"
    """It has been silent for a while: it gets no new work."""
    DEAD = "dead"
    """Its process is gone, or was silent for too long."""
    RESTARTING = "restarting"
    """A new process is on its way."""
    STALE = "stale"
    """It answers, but has yet to receive what the others have: it serves nothing."""


class Event(Enum):
    """What happens to a worker."""

    ANSWERED = "answered"
    LATE = "late"
    LOST = "lost"
    """Its process ended, it was silent for too long, or it said that it cannot go on."""
    RELAUNCHED = "relaunched"
    STARTED = "started"
    OUTDATED = "outdated"
    """An update did not reach it, or not wholly."""
    REFRESHED = "refreshed"
    """It has what the others have."""


_NEXT: dict[tuple[Health, Event], Health] = {
    (Health.HEALTHY, Event.ANSWERED): Health.HEALTHY,
    (Health.HEALTHY, Event.LATE): Health.SUSPECT,
    (Health.HEALTHY, Event.LOST): Health.DEAD,
    (Health.HEALTHY, Event.OUTDATED): Health.STALE,
    (Health.HEALTHY, Event.REFRESHED): Health.HEALTHY,
    (Health.SUSPECT, Event.ANSWERED): Health.HEALTHY,
    (Health.SUSPECT, Event.LATE): Health.SUSPECT,
    (Health.SUSPECT, Event.LOST): Health.DEAD,
    (Health.SUSPECT, Event.OUTDATED): Health.STALE,
    (Health.SUSPECT, Event.REFRESHED): Health.HEALTHY,
    (Health.DEAD, Event.LOST): Health.DEAD,
    (Health.DEAD, Event.RELAUNCHED): Health.RESTARTING,
    (Health.RESTARTING, Event.LATE): Health.RESTARTING,
    (Health.RESTARTING, Event.LOST): Health.DEAD,
    (Health.RESTARTING, Event.STARTED): Health.STALE,
    (Health.STALE, Event.ANSWERED): Health.STALE,
    (Health.STALE, Event.LATE): Health.STALE,
    (Health.STALE, Event.LOST): Health.DEAD,
    (Health.STALE, Event.OUTDATED): Health.STALE,
    (Health.STALE, Event.REFRESHED): Health.HEALTHY,
}
UP = frozenset({Health.HEALTHY, Health.SUSPECT, Health.STALE})
"""States of a worker whose process has started."""


def next_health(health: Health, event: Event) -> Health:
    """The state after `event`.

    Raises:
        ValueError: the event cannot happen in this state.
    """
    try:
        return _NEXT[health, event]
    except KeyError:
        raise ValueError(f"a worker that is {health.value} cannot be {event.value}") from None


@dataclass
class Pulse:
    """One worker's state and what is known of when it last answered. Times are seconds of any one clock."""

    suspect_after_s: float
    """Silence after which it gets no new work."""
    dead_after_s: float
    """Silence after which it counts as hung."""
    health: Health = Health.RESTARTING
    asked_at: float | None = None
    """When the question that is still open was asked."""

    def apply(self, event: Event) -> None:
        """Move on; a worker that answers, starts or is lost owes no answer any more."""
        self.health = next_health(self.health, event)
        if event in (Event.ANSWERED, Event.LOST, Event.RELAUNCHED, Event.STARTED):
            self.asked_at = None

    def asked(self, now: float) -> None:
        """A question was sent; an earlier one that is still open goes on counting."""
        if self.asked_at is None:
            self.asked_at = now

    def overlooked(self, now: float) -> None:
        """Nobody has looked for an answer for a while: what is open counts from now on."""
        if self.asked_at is not None:
            self.asked_at = now

    def silent_for(self, now: float) -> float:
        """Seconds since the open question, 0 without one."""
        return 0.0 if self.asked_at is None else now - self.asked_at

    def is_lost(self, now: float) -> bool:
        """Become suspect after some silence; true after too much of it (the caller then applies LOST)."""
        silence = self.silent_for(now)
        if silence >= self.suspect_after_s:
            self.apply(Event.LATE)
        return silence >= self.dead_after_s
