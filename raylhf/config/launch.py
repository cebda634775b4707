"""What a scheduler must know to give a run its nodes; `cluster` says how many there are and what each has."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings


class SlurmConfig(Settings):
    partition: str | None = None
    """Partition; null leaves it to Slurm."""
    account: str | None = None
    """Account that is charged; null leaves it to Slurm."""
    qos: str | None = None
    """Quality of service; null leaves it to Slurm."""
    time_limit: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d+(:\d{2}){0,2}$")
    """Longest time of one job, as Slurm writes it; the run goes on in the next one."""
    signal_before_s: int = Field(default=180, ge=30, le=65_535)
    """The run saves so long before its time limit, and is queued again; a step and a checkpoint must take less."""
    rollout_nodes: int = Field(default=0, ge=0)
    """Of cluster.num_nodes, those for rollout workers alone, as a second part of a heterogeneous job; 0: one part."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, for instance --exclusive."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run first, for instance module load cuda."""
    image: str | None = None
    """Container image (a file, or a name that image_tool knows) with raylhf in it; null runs this environment."""
    image_tool: Literal["apptainer", "pyxis"] = "apptainer"
    """What runs the image."""


class LaunchConfig(Settings):
    slurm: SlurmConfig = SlurmConfig()
    """`raylhf launch slurm`."""
