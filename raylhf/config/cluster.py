"""The Ray cluster a run uses, and how long it waits for it."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings

PlacementStrategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Ray's names."""
PRIVATE_FOLDER_VARIABLE = "RAYLHF_PRIVATE_FOLDER"
"""Tells workers of a Ray that raylhf started of a folder that is removed at its end, whatever becomes of them."""


class ClusterConfig(Settings):
    address: str | None = None
    """Ray cluster to join (`auto` or host:port); null starts Ray on this machine for the run alone."""
    num_nodes: int = Field(default=1, ge=1, le=10_000)
    """Nodes the run is planned for (`raylhf check` compares the request with them) and waits for at its start; those
    that an autoscaler brings later do not count."""
    cpus_per_node: int = Field(default=2, ge=1)
    """CPUs of one node; where raylhf starts Ray itself, the number that it offers."""
    gpus_per_node: int = Field(default=0, ge=0, le=128)
    """GPUs of one node."""
    gpu_memory_gib: float = Field(default=80.0, gt=0)
    """Memory of one GPU, for the plan's comparison."""
    host_memory_gib: float = Field(default=16.0, gt=0)
    """Memory of one node, for the plan's comparison."""
    object_store_gib: float = Field(default=0.25, gt=0.07)
    """Object store of a Ray that raylhf starts itself."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of each role's start-up."""
    step_timeout_s: float = Field(default=3600.0, gt=0)
    """Deadline of each phase of a step (rollout with reward, learning, weight sync)."""
    worker_timeout_s: float = Field(default=120.0, gt=0)
    """Silence after which a rollout or reward worker counts as hung and is replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of one worker, or of all learners, without a finished step in between; one loss more ends the run."""
