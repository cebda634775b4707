"""Where the workers of a role go: one placement group for those that stay, one for each that may leave."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.cluster.session import describe_nodes
from raylhf.config.placement import Role, largest_first

SLICE_S = 1
"""Of a wait that may be asked to stop; Ray counts whole seconds."""
JOIN_WAIT_S = 10
"""What is free is reserved within less; a worker that joins does not wait for what others have."""


class RolePlacement:
    """Reserves what a role's workers need, all of it or nothing, so that no half of a role waits for the other.

    A worker that takes another's place takes its bundle too; Ray moves the bundle when its node is gone.
    """

    def __init__(self, role: Role) -> None:
        """Ask for all that the role has from the start, without waiting."""
        self._role = role
        self._bundle = role.bundle
        self._together = role.replicas - role.num_apart
        self._groups: dict[int, tuple[PlacementGroup, int]] = {}
        if self._bundle:
            group = self._reserve(self._together)
            self._groups = {number: (group, number) for number in range(self._together)}
            for number in range(self._together, role.replicas):
                self._groups[number] = (self._reserve(1), 0)

    def wait(self, deadline: float, should_stop: Callable[[], bool]) -> None:
        """Until everything is reserved; `deadline` is a time of `time.monotonic`.

        Raises:
            WorkerError: it is not by then; the sentence says what is asked for and what the nodes have.
            StopRequestedError: `should_stop` became true meanwhile.
        """
        role = self._role
        for group in self._unique_groups():
            while not group.wait(SLICE_S):
                if should_stop():
                    raise StopRequestedError(f"reserving room for {role.name}")
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"{role.replicas} x {role.describe()} could not be reserved within cluster.start_timeout_s, "
                        f"with placement {role.placement}; the nodes have: {describe_nodes()}; something else may hold "
                        "a part of it (ray status)"
                    )

    def take(self, number: int) -> bool:
        """Whether worker `number` has its reservation; one that comes later is given it here, if there is room now."""
        if not self._bundle or number in self._groups:
            return True
        group = self._reserve(1)
        if not group.wait(JOIN_WAIT_S):
            remove_placement_group(group)
            return False
        self._groups[number] = (group, 0)
        return True

    def options(self, number: int) -> dict[str, Any]:
        """Ray's options for worker `number`."""
        if not self._bundle:
            return {}
        group, index = self._groups[number]
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}

    def keep(self, numbers: Collection[int]) -> None:
        """Free what workers had that may leave, and are not among `numbers`."""
        for number in [n for n in self._groups if n >= self._together and n not in numbers]:
            group, _ = self._groups.pop(number)
            remove_placement_group(group)

    def remove(self) -> None:
        """Free everything."""
        for group in self._unique_groups():
            remove_placement_group(group)
        self._groups = {}

    def _unique_groups(self) -> list[PlacementGroup]:
        return list({id(group): group for group, _ in self._groups.values()}.values())

    def _reserve(self, count: int) -> PlacementGroup:
        return placement_group([dict(self._bundle)] * count, strategy=self._role.placement)


def reserve(roles: Sequence[Role], *, timeout_s: float, should_stop: Callable[[], bool]) -> dict[str, RolePlacement]:
    """Reserve what the roles need, by name.

    One after the other, the largest workers first: small ones that came before them would lie scattered over the nodes
    that have room for a large one.

    Raises:
        WorkerError: it is not all reserved within the deadline.
        StopRequestedError: `should_stop` became true meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    places = {}
    for role in largest_first(roles):
        places[role.name] = RolePlacement(role)
        places[role.name].wait(deadline, should_stop)
    return places
