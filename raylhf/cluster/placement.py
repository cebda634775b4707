"""Where the workers of a role go: one placement group for those that stay, one for each that may leave."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.cluster.session import describe_nodes
from raylhf.config.placement import Role, largest_first

SLICE_S = 1
"""Of a wait that may be asked to stop; Ray counts whole seconds."""
FREE_WAIT_S = 10
"""What is free is reserved within less; workers that a run can start without do not hold it up for longer."""


class RolePlacement:
    """Reserves what a role's workers need: for those that stay all of it or nothing, so that no half waits for the
    other; for those that may leave one by one.

    A worker that takes another's place takes its bundle too; Ray moves the bundle when its node is gone. What has no
    room stays asked for: an autoscaler sees it, and brings a node.
    """

    def __init__(self, role: Role) -> None:
        """Ask for what those that stay need, without waiting."""
        self._role = role
        self._bundle = role.bundle
        self._staying: PlacementGroup | None = self._reserve(role.num_staying) if self._bundle else None
        self._apart: dict[int, PlacementGroup] = {}

    def wait(self, deadline: float, should_stop: Callable[[], bool]) -> None:
        """Until those that stay have their place; `deadline` is a time of `time.monotonic`.

        Raises:
            WorkerError: they have not by then; the sentence says what is asked for and what the nodes have.
            StopRequestedError: `should_stop` became true meanwhile.
        """
        role = self._role
        while self._staying is not None and not self._staying.wait(SLICE_S):
            if should_stop():
                raise StopRequestedError(f"reserving room for {role.name}")
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{role.num_staying} x {role.describe()} could not be reserved within cluster.start_timeout_s, "
                    f"with placement {role.placement}; the nodes have: {describe_nodes()}; something else may hold "
                    "a part of it (ray status)"
                )

    def take_rest(self, should_stop: Callable[[], bool]) -> None:
        """Ask for those that may leave, and give them a moment to get what is free."""
        deadline = time.monotonic() + FREE_WAIT_S
        for number in range(self._role.num_staying, self._role.replicas):
            self.take(number)
        for group in list(self._apart.values()):
            while not group.wait(SLICE_S) and time.monotonic() < deadline and not should_stop():
                pass

    def num_ready(self) -> int:
        """Of the workers from the start, counted from the first, those that have their place."""
        return sum(1 for _ in itertools.takewhile(self.take, range(self._role.replicas)))

    def take(self, number: int) -> bool:
        """Whether worker `number` has its place by now. It stays asked for from now on, until it is given back.

        The first time waits a moment, in which Ray reserves what is free.
        """
        if not self._bundle or number < self._role.num_staying:
            return True
        if number in self._apart:
            return self._apart[number].wait(0)
        self._apart[number] = self._reserve(1)
        return self._apart[number].wait(SLICE_S)

    def give_back(self, number: int) -> None:
        """Free what worker `number` has or is asked for, unless its place is one of those that stay."""
        if (group := self._apart.pop(number, None)) is not None:
            remove_placement_group(group)

    def options(self, number: int) -> dict[str, Any]:
        """Ray's options for worker `number`."""
        if self._staying is None:
            return {}
        apart = self._apart.get(number)
        group, index = (self._staying, number) if apart is None else (apart, 0)
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}

    def remove(self) -> None:
        """Free everything."""
        for number in list(self._apart):
            self.give_back(number)
        if self._staying is not None:
            remove_placement_group(self._staying)
            self._staying = None

    def _reserve(self, count: int) -> PlacementGroup:
        return placement_group([dict(self._bundle)] * count, strategy=self._role.placement)


def reserve(roles: Sequence[Role], *, timeout_s: float, should_stop: Callable[[], bool]) -> dict[str, RolePlacement]:
    """Reserve what the roles need, by name.

    One after the other, the largest workers first: small ones that came before them would lie scattered over the nodes
    that have room for a large one. Those that the run can start without come last, where there is room.

    Raises:
        WorkerError: what the run cannot start without is not all reserved within the deadline.
        StopRequestedError: `should_stop` became true meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    places = {}
    for role in largest_first(roles):
        places[role.name] = RolePlacement(role)
        places[role.name].wait(deadline, should_stop)
    for place in places.values():
        place.take_rest(should_stop)
    return places
