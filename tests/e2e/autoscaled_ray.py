"""A Ray on this machine whose autoscaler starts nodes as they are asked for, and ends those that are idle."""

import contextlib
import itertools
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray._private.parameter as ray_parameter
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray_nodes import HEALTH_CHECKS

MARK = "RAYLHF_TEST_RAY"
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
"""Where the monitor finds the provider and what this file imports."""
ADDRESSES = "127.0.1"
"""Each node has a loopback address of its own, from .2 on; Ray takes 127.0.0.1 for the machine's own address."""
IDLE_S = 3.0
STORE_BYTES = 80 * 2**20
START_S = 120.0
END_S = 20.0


class Provider(FakeMultiNodeProvider):
    """Ray's provider of nodes that are processes of this machine, on the loopback; runs in the head's monitor."""

    _numbers = itertools.count(3)

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        def on_loopback(**settings: Any) -> RayParams:
            address = f"{ADDRESSES}.{next(self._numbers)}"
            return RayParams(**settings, node_ip_address=address)

        ray_parameter.RayParams = on_loopback
        try:
            super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        finally:
            ray_parameter.RayParams = RayParams


class AutoscaledRay:
    """A head that holds no worker, and nodes of the given types: `{name: (resources, least, most)}`.

    Its processes are known by a mark in their environment, and only those are ended.
    """

    def __init__(self, folder: Path, types: Mapping[str, tuple[Mapping[str, float], int, int]]) -> None:
        self._folder = folder
        self._mark = secrets.token_hex(8)
        with socket.socket() as free:
            free.bind((f"{ADDRESSES}.2", 0))
            self._port = free.getsockname()[1]
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_ADDRESS": f"{ADDRESSES}.2:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        """What a command needs to join."""
        self._settings = folder / "autoscaler.json"
        self._settings.write_text(json.dumps(self._autoscaler_settings(types)))

    def __enter__(self) -> "AutoscaledRay":
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--num-cpus=0"]
        command += [f"--node-ip-address={ADDRESSES}.2", f"--port={self._port}", "--include-dashboard=false"]
        command += [f"--autoscaling-config={self._settings}", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--temp-dir={self._folder / 'ray'}", "--disable-usage-stats"]
        more = {
            **HEALTH_CHECKS,
            MARK: self._mark,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]),
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_enable_autoscaler_v2": "1",
            "RAY_worker_niceness": "0",
        }
        before = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        log = self._folder / "head.log"
        with log.open("w") as out:
            done = subprocess.run(
                command, env=before | self.environment | more, stdout=out, stderr=out, timeout=START_S, check=False
            )
        if done.returncode != 0:
            self.__exit__()
            raise AssertionError(f"ray start failed:\n{log.read_text()[-3000:]}")
        return self

    def __exit__(self, *_: object) -> None:
        # The monitor first, which would start nodes anew; then what each kill may have left behind.
        for process in sorted(self._processes(), key=lambda process: "monitor.py" not in _command_line(process)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        left = self._processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=END_S)

    def nodes(self, resource: str) -> list[int]:
        """Process numbers of the nodes that have a resource."""
        return [
            process.pid
            for process in self._processes()
            if process.name() == "raylet"
            and re.search(rf"static_resource_list=\S*\b{resource},", _command_line(process))
        ]

    def story(self) -> str:
        """The end of what the autoscaler says, for the message of a failed test."""
        logs = sorted((self._folder / "ray").glob("session_2*/logs/monitor.*"))
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _autoscaler_settings(self, types: Mapping[str, tuple[Mapping[str, float], int, int]]) -> dict[str, Any]:
        head = "ray.head.default"
        kinds: dict[str, Any] = {
            name: {
                "resources": {"object_store_memory": STORE_BYTES, **resources},
                "node_config": {},
                "min_workers": least,
                "max_workers": most,
            }
            for name, (resources, least, most) in types.items()
        }
        kinds[head] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        lists = [f"{kind}_commands" for kind in ("initialization", "setup", "head_setup", "worker_setup")]
        lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"]
        return {
            "cluster_name": "autoscaled",
            "max_workers": sum(most for _, _, most in types.values()),
            "provider": {
                "type": "external",
                "module": f"{Path(__file__).stem}.{Provider.__name__}",
                "gcs_address": self.environment["RAY_ADDRESS"],
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": kinds,
            "head_node_type": head,
            "idle_timeout_minutes": IDLE_S / 60,
            "upscaling_speed": 1.0,
            "file_mounts_sync_continuously": False,
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in (*lists, "rsync_filter")},
        }


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
