"""Several Ray nodes on this machine."""

import os
from contextlib import ExitStack
from typing import Any

from ray.cluster_utils import Cluster

from raylhf.cluster.private import private_folder
from raylhf.cluster.session import use_private_token

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""By default Ray notices after 15 to 20 seconds that a node is gone."""


class RayNodes:
    """A cluster that begins with a head which holds no worker. Nodes have two CPUs each and the resources given.

    Each node has a loopback address of its own, from 127.0.0.2 on: Ray takes 127.0.0.1 for the machine's own address.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._nodes: dict[str, Any] = {}
        self._addresses = (f"127.0.0.{number}" for number in range(2, 255))

    def __enter__(self) -> "RayNodes":
        self._before = dict(os.environ)
        self._variables = use_private_token(self._open.enter_context(private_folder())) | HEALTH_CHECKS
        os.environ.update(self._variables, RAY_worker_niceness="0", HF_HUB_OFFLINE="1")
        self._cluster = Cluster(initialize_head=True, head_node_args=self._settings(num_cpus=1))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._cluster.shutdown()
        finally:
            os.environ.clear()
            os.environ.update(self._before)
            self._open.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to join."""
        return {**self._variables, "RAY_ADDRESS": str(self._cluster.address)}

    def add(self, name: str, **resources: float) -> None:
        """Start a node."""
        self._nodes[name] = self._cluster.add_node(**self._settings(num_cpus=2, resources=resources))

    def lose(self, name: str) -> None:
        """Kill a node with all that runs on it."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def _settings(self, **more: Any) -> dict[str, Any]:
        address = next(self._addresses)
        return {"node_ip_address": address, "include_dashboard": False, "object_store_memory": 10**8, **more}
