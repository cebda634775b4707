"""How a run's roles become groups of equal pods, each group sized for its workers alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from raylhf.config.placement import EPSILON, Role, reserved_roles, roles_of
from raylhf.config.run import AnyRunConfig, RunConfig

POD_SHARE = 0.9
"""Of a node's memory, what its pods of learners or rollouts may take together."""
PIN = 0.001
"""What a worker takes of its group's custom resource, of which a pod has 1."""


@dataclass(frozen=True)
class Group:
    """Equal pods."""

    name: str
    """`learner`, `rollout` or `reward`."""
    roles: tuple[str, ...]
    """Roles whose workers run here."""
    num_pods: int
    """Pods at the start."""
    least: int
    """Fewest pods."""
    most: int
    """Most pods."""
    is_gang: bool
    """Whether all come and go together."""
    cpus: int
    gpus: int
    memory_gib: int

    @property
    def resource(self) -> str:
        """The custom Ray resource of these pods; workers that ask for it run here and nowhere else."""
        return f"{self.name}_nodes"

    @property
    def pins(self) -> list[str]:
        """Overrides that pin the roles here."""
        return [f"{role}.resources.{self.resource}={PIN}" for role in self.roles]


def groups_of(config: AnyRunConfig) -> tuple[Group, ...]:
    """Learners as one gang, rollouts and rewards a pod for each worker; what shares a GPU shares a pod.

    Raises:
        ValueError: a worker is larger than a node as `cluster` describes it.
    """
    if not isinstance(config, RunConfig):
        (learner,) = roles_of(config)
        return (_gang(config, learner, ("learner",)),)
    if config.weight_transfer == "ipc":
        shared, reward = reserved_roles(config, num_rollout=config.rollout.replicas)
        return (_gang(config, shared, ("rollout", "learner")), *_singles(config, reward))
    rollout, reward, learner = roles_of(config)
    return (_gang(config, learner, ("learner",)), *_singles(config, rollout), *_singles(config, reward))


def _gang(config: AnyRunConfig, role: Role, roles: tuple[str, ...]) -> Group:
    """As many workers on a pod as a node holds, unless they are to be spread."""
    cluster = config.cluster
    room = [role.replicas]
    if role.num_cpus:
        room.append(int(cluster.cpus_per_node / role.num_cpus + EPSILON))
    if role.num_gpus:
        room.append(int(cluster.gpus_per_node / role.num_gpus + EPSILON))
    per_pod = 1 if role.placement in ("SPREAD", "STRICT_SPREAD") else max(min(room), 1)
    num_pods = math.ceil(role.replicas / per_pod)
    return Group("learner", roles, num_pods, num_pods, num_pods, True, *_size(config, role, per_pod))


def _singles(config: RunConfig, role: Role) -> Iterator[Group]:
    least = most = role.replicas
    if role.name == "rollout":
        least, most = config.rollout.least_replicas, config.rollout.most_replicas
    yield Group(role.name, (role.name,), role.replicas, least, most, False, *_size(config, role, 1))


def _size(config: AnyRunConfig, role: Role, num_workers: int) -> tuple[int, int, int]:
    """CPUs, GPUs and GiB of a pod with so many workers; of a node's memory the share that it takes of the rest.

    Kubernetes keeps a part of each node to itself, and the run's small pods must lie somewhere as well.
    """
    cluster = config.cluster
    cpus = max(math.ceil(num_workers * role.num_cpus - EPSILON), 1)
    gpus = math.ceil(num_workers * role.num_gpus - EPSILON)
    if cpus > cluster.cpus_per_node or gpus > cluster.gpus_per_node:
        raise ValueError(
            f"{role.describe()} is larger than a node with {cluster.cpus_per_node} CPUs and {cluster.gpus_per_node} "
            "GPUs (cluster.cpus_per_node, cluster.gpus_per_node); lower what it asks for, or describe larger nodes"
        )
    share = max(cpus / cluster.cpus_per_node, gpus / max(cluster.gpus_per_node, 1))
    return cpus, gpus, max(math.floor(share * POD_SHARE * cluster.host_memory_gib), 1)
