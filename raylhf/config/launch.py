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


class KubernetesConfig(Settings):
    image: str | None = None
    """Container image with raylhf in it, made from k8s/Containerfile; every pod runs it."""
    namespace: str = Field(default="raylhf", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Namespace, made by k8s/base."""
    runs_claim: str = "raylhf-runs"
    """PersistentVolumeClaim for the runs' folders; every pod mounts it, so it must be ReadWriteMany."""
    models_claim: str = "raylhf-models"
    """PersistentVolumeClaim for the cache of models and data sets, ReadWriteMany too."""
    secret_name: str = "raylhf-secrets"
    """Secret with WANDB_API_KEY and HF_TOKEN, each of which may be missing."""
    head_cpus: int = Field(default=4, ge=1)
    """CPUs of the head's pod, where the driver runs and no worker."""
    head_memory_gib: float = Field(default=16.0, gt=0)
    """Memory of the head's pod."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes for pods with GPUs; all pods where the run has none."""
    scheduler: Literal["none", "kueue", "volcano"] = "none"
    """What admits the run as a whole; Kueue admits no run whose rollouts the autoscaler changes."""
    queue: str | None = None
    """Queue of that scheduler."""
    max_retries: int = Field(default=3, ge=0)
    """Times that KubeRay makes the whole cluster again after a failure of any kind; the run goes on from its
    checkpoint."""
    wait_s: int = Field(default=3600, ge=1)
    """Longest wait for the pods: nodes may have to be bought, and images pulled."""
    idle_timeout_s: int = Field(default=120, ge=1)
    """A rollout pod without a worker is taken away after this time."""
    grace_s: int = Field(default=300, ge=30)
    """Time to save when pods are evicted or the RayJob is deleted; a step and a checkpoint must take less."""
    egress_ports: tuple[int, ...] = (443, 6443)
    """TCP ports outside of the run that pods may call: model hub and W&B, the API server, remote rewards."""


class LaunchConfig(Settings):
    doctor: bool = True
    """The job runs raylhf doctor before it trains, and ends where that finds a failure."""
    slurm: SlurmConfig = SlurmConfig()
    """`raylhf launch slurm`."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """`raylhf launch k8s`."""
