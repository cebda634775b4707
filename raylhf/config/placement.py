"""What each role asks of the cluster, and whether the nodes can hold it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from raylhf.config.cluster import PlacementStrategy
from raylhf.config.learner import LearnerConfig
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.rollout import RolloutConfig
from raylhf.config.run import AnyRunConfig, RunConfig

EPSILON = 1e-6
"""Fractions of a GPU are sums of decimals."""
COLOCATED = "rollout and learner"
"""The role that both are, as far as reserving goes, where they share a GPU."""


@dataclass(frozen=True)
class Role:
    """Equal workers of one kind."""

    name: str
    """`rollout`, `reward`, `learner` or `COLOCATED`."""
    replicas: int
    """Workers."""
    num_cpus: float
    """CPUs that Ray reserves for one worker."""
    num_gpus: float
    """GPUs that Ray reserves for one worker."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Further Ray resources of one worker, by name."""
    placement: PlacementStrategy = "PACK"
    """How the workers are laid over nodes."""
    num_apart: int = 0
    """Of the workers, those that may leave: each has a reservation of its own, which is freed then."""

    @property
    def num_staying(self) -> int:
        """Workers that the run cannot start without."""
        return self.replicas - self.num_apart

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker reserves, in Ray's names; empty if that is nothing."""
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in needs.items() if amount > 0}

    def describe(self) -> str:
        """`one rollout (0.5 CPU, 1 GPU, 1 big_node)`, for messages."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return f"one {self.name} ({', '.join(f'{amount:g} {name}' for name, amount in amounts.items())})"


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
    learner = _role("learner", config.learner.num_ranks, config.learner)
    if not isinstance(config, RunConfig):
        return (learner,)
    rollout = _role("rollout", config.rollout.replicas, config.rollout)
    return (
        replace(rollout, num_apart=rollout.replicas - config.rollout.least_replicas),
        _role("reward", config.reward.replicas, config.reward),
        learner,
    )


def reserved_roles(config: RunConfig, *, num_rollout: int) -> tuple[Role, ...]:
    """What a run reserves when it starts with `num_rollout` rollout workers.

    Where weights go by CUDA IPC, rollout and learner are one: only processes in one bundle are sure to share a GPU.
    """
    rollout, reward, learner = roles_of(config)
    least = config.rollout.least_replicas
    count = max(num_rollout, least)
    if config.weight_transfer == "ipc":
        return (_in_one_bundle(rollout, learner), reward)
    return (replace(rollout, replicas=count, num_apart=count - least), reward, learner)


def _in_one_bundle(one: Role, other: Role) -> Role:
    names = dict.fromkeys([*one.resources, *other.resources])
    return Role(
        COLOCATED,
        replicas=1,
        num_cpus=one.num_cpus + other.num_cpus,
        num_gpus=round(one.num_gpus + other.num_gpus, 4),  # Ray counts to four decimals
        resources={name: one.resources.get(name, 0) + other.resources.get(name, 0) for name in names},
    )


def largest_first(roles: Iterable[Role]) -> list[Role]:
    """By GPUs and then CPUs of a worker: whole engines, then single GPUs, then shares, then CPU workers."""
    return sorted(roles, key=lambda role: (-role.num_gpus, -role.num_cpus))


def _role(name: str, replicas: int, settings: RolloutConfig | RewardPlaneConfig | LearnerConfig) -> Role:
    return Role(name, replicas, settings.num_cpus, settings.num_gpus, dict(settings.resources), settings.placement)


def place(roles: Iterable[Role], *, num_nodes: int, cpus_per_node: float, gpus_per_node: int) -> Placement:
    """First fit, the largest first; those that a run can start without go where the others leave room, or nowhere."""
    nodes = tuple(Node(cpus_per_node, [1.0] * gpus_per_node) for _ in range(num_nodes))
    unplaced = []
    in_order = largest_first(roles)
    for role in in_order:
        missing = sum(not any(node.place(role) for node in nodes) for _ in range(role.num_staying))
        if missing:
            unplaced.append(Role(role.name, missing, role.num_cpus, role.num_gpus))
    for role in in_order:
        for _ in range(role.num_apart):
            next((node for node in nodes if node.place(role)), None)
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
