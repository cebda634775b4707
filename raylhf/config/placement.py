"""What each role asks of the cluster, and whether the nodes can hold it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from raylhf.config.run import AnyRunConfig, RunConfig

EPSILON = 1e-6
"""Fractions of a GPU are sums of decimals."""


@dataclass(frozen=True)
class Role:
    """Equal workers of one kind."""

    name: str
    """`rollout`, `reward` or `learner`."""
    replicas: int
    """Workers."""
    num_cpus: float
    """CPUs that Ray reserves for one worker."""
    num_gpus: float
    """GPUs that Ray reserves for one worker."""


@dataclass(frozen=True)
class Worker:
    """One worker on its node."""

    role: str
    gpus: tuple[int, ...]
    """GPUs of the node that the worker uses, wholly or in part."""


@dataclass
class Node:
    """What is left of one node."""

    free_cpus: float
    free_gpus: list[float]
    workers: list[Worker] = field(default_factory=list)

    def place(self, role: Role) -> bool:
        """Put a worker here if there is room."""
        gpus = self._choose_gpus(role.num_gpus)
        if gpus is None or self.free_cpus + EPSILON < role.num_cpus:
            return False
        self.free_cpus -= role.num_cpus
        for gpu in gpus:
            self.free_gpus[gpu] -= min(role.num_gpus, 1.0)
        self.workers.append(Worker(role.name, gpus))
        return True

    def _choose_gpus(self, num_gpus: float) -> tuple[int, ...] | None:
        needed = math.ceil(num_gpus - EPSILON)
        share = min(num_gpus, 1.0)
        room = [i for i, free in enumerate(self.free_gpus) if free + EPSILON >= share]
        return tuple(room[:needed]) if len(room) >= needed else None


@dataclass(frozen=True)
class Placement:
    """Workers on nodes, largest first, each on the first node with room."""

    nodes: tuple[Node, ...]
    unplaced: tuple[Role, ...]
    """Roles of workers that found no room; `replicas` counts only those."""


def roles_of(config: AnyRunConfig) -> tuple[Role, ...]:
    """The roles of a run."""
    learner = Role("learner", config.learner.num_ranks, config.learner.num_cpus, config.learner.num_gpus)
    if not isinstance(config, RunConfig):
        return (learner,)
    return (
        Role("rollout", config.rollout.replicas, config.rollout.num_cpus, config.rollout.num_gpus),
        Role("reward", config.reward.replicas, config.reward.num_cpus, config.reward.num_gpus),
        learner,
    )


def place(roles: Iterable[Role], *, num_nodes: int, cpus_per_node: float, gpus_per_node: int) -> Placement:
    """First fit, decreasing by GPUs and then CPUs: whole engines, then single GPUs, then shares, then CPU workers."""
    nodes = tuple(Node(cpus_per_node, [1.0] * gpus_per_node) for _ in range(num_nodes))
    unplaced = []
    for role in sorted(roles, key=lambda role: (-role.num_gpus, -role.num_cpus)):
        missing = sum(not any(node.place(role) for node in nodes) for _ in range(role.replicas))
        if missing:
            unplaced.append(Role(role.name, missing, role.num_cpus, role.num_gpus))
    return Placement(nodes, tuple(unplaced))


def place_config(config: AnyRunConfig) -> Placement:
    """The placement of a run on the cluster that its settings describe."""
    cluster = config.cluster
    return place(
        roles_of(config),
        num_nodes=cluster.num_nodes,
        cpus_per_node=cluster.cpus_per_node,
        gpus_per_node=cluster.gpus_per_node,
    )
