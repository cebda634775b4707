"""What `raylhf doctor` runs on each node: facts of the node, a look at the shared storage, a small collective."""

import os
import re
import resource
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from raylhf.config.devices import cpu_has_bfloat16
from raylhf.driver.folder import installed_versions
from raylhf.driver.manifest import sync

CUDA_DRIVER = "CUDA driver"
APPEAR_S = 5.0
"""Within which a node must see what the driver wrote before it asked."""
POLL_S = 0.2
NUM_VALUES = 2**20
"""float32 values of the collective: 4 MiB, a small bucket of gradients."""
DRIVER_FILE = "driver"
TEMPORARY_FOLDER = "/tmp"
"""Ray keeps logs there, and values for which the object store has no room."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node says of itself. Sizes are bytes."""

    versions: Mapping[str, str | None]
    """By package; None where it is not installed."""
    memory_bytes: int
    """What processes of the job may use: the least of the node's memory and its cgroups' limits."""
    has_memory_limit: bool
    """A cgroup allows less than the node has."""
    shm_bytes: int
    """Size of /dev/shm."""
    tmp_bytes: int
    """Size of the file system of TEMPORARY_FOLDER."""
    tmp_free_bytes: int
    open_files: int
    """Soft limit of a worker process."""
    has_bfloat16: bool
    """Whether the CPU has instructions for it."""


def node_facts() -> NodeFacts:
    """The facts of the node that this runs on."""
    whole = psutil.virtual_memory().total
    limit = memory_limit()
    tmp = shutil.disk_usage(TEMPORARY_FOLDER)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NodeFacts(
        versions=versions(),
        memory_bytes=min(whole, limit or whole),
        has_memory_limit=limit is not None and limit < whole,
        shm_bytes=shutil.disk_usage("/dev/shm").total,
        tmp_bytes=tmp.total,
        tmp_free_bytes=tmp.free,
        open_files=2**63 if soft == resource.RLIM_INFINITY else soft,
        has_bfloat16=cpu_has_bfloat16(),
    )


def versions() -> dict[str, str | None]:
    """Versions of Python, packages, raylhf's git commit and the CUDA driver; None where there is none."""
    return {**installed_versions(), CUDA_DRIVER: cuda_driver()}


def cuda_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the kernel's NVIDIA module."""
    if not file.is_file():
        return None
    match = re.search(r"Module\b.*?\s(\d+(?:\.\d+)+)\s", file.read_text())
    return match[1] if match else None


def memory_limit(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least limit, in bytes, of this process's cgroups and those above them (v2 and v1); None without one."""
    lines = [line.split(":", 2) for line in groups.read_text().splitlines()] if groups.is_file() else []
    files: list[Path] = []
    for _, controllers, name in lines:
        if not controllers:
            files += [root / "memory.max" for top in (mount, mount / "unified") for root in _upwards(top, name)]
        elif "memory" in controllers.split(","):
            files += [root / "memory.limit_in_bytes" for root in _upwards(mount / "memory", name)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return min((int(text) for text in texts if text.isdigit()), default=None)  # v2 writes "max" where there is none


def _upwards(mount: Path, name: str) -> Iterable[Path]:
    """The folder of a cgroup and those above it. In a container it is often mounted without its path."""
    parts = [part for part in name.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def clock() -> float:
    """This node's clock: seconds since the epoch."""
    return time.time()


def leave_canary(folder: str, name: str, secret: str) -> str:
    """Read what the driver wrote, and write `name` beside it as checkpoints are written: by a rename onto it.

    Returns an empty string, or what does not work, in words.
    """
    place = Path(folder)
    deadline = time.monotonic() + APPEAR_S
    while not (place / DRIVER_FILE).is_file():
        if time.monotonic() > deadline:
            return f"does not see what the driver wrote into {place.parent}"
        time.sleep(POLL_S)
    try:
        if (place / DRIVER_FILE).read_text() != secret:
            return f"reads something else than the driver wrote into {place.parent}"
        replace_file(place / name, secret)
    except OSError as error:
        return f"cannot write and rename files in {place.parent} ({error.strerror})"
    return ""


def replace_file(file: Path, text: str) -> None:
    """Put `text` where something else is, by an atomic rename.

    Raises:
        OSError: it cannot be done, or what is there afterwards is not the text.
    """
    file.write_text("replaced")
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    sync(new)
    os.replace(new, file)
    if file.read_text() != text or new.exists():
        raise OSError(0, "a rename left the old file in place")


class CollectiveMember:
    """One process of an all-reduce."""

    def __init__(self, backend: Literal["gloo", "nccl"]) -> None:
        self._backend = backend
        self._store: Any = None

    def open(self) -> int:
        """Load torch, touch the GPU if there is to be one, and offer a meeting point; returns its port."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        torch.zeros(1, device=self._device)  # fails here where a GPU is broken, and not in the middle of the others
        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def reduce(self, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> float:
        """Sum NUM_VALUES values over all processes; returns the seconds that it took.

        Raises:
            RuntimeError: the others do not come, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        if rank:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        dist.init_process_group(self._backend, store=self._store, rank=rank, world_size=world_size, timeout=timeout)
        expected = world_size * (world_size + 1) / 2
        seconds = 0.0
        for _ in range(2):  # the first one connects
            values = torch.full((NUM_VALUES,), float(rank + 1), device=self._device)
            started = time.perf_counter()
            dist.all_reduce(values)
            least, most = values.min().item(), values.max().item()  # waits for a GPU
            seconds = time.perf_counter() - started
            if (least, most) != (expected, expected):
                raise RuntimeError(f"the sum over {world_size} processes is {least:g} to {most:g}, not {expected:g}")
        dist.barrier()  # who ends first takes the connections of the others along
        return seconds

    @property
    def _device(self) -> str:
        return "cuda" if self._backend == "nccl" else "cpu"


def gloo_member() -> CollectiveMember:
    """A process on a CPU."""
    return CollectiveMember("gloo")


def nccl_member() -> CollectiveMember:
    """A process on a GPU."""
    return CollectiveMember("nccl")
