"""DeepSpeed: process group, engine settings, gathering. Only this file and `changed_shape` import deepspeed."""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from raylhf.config.learner import LearnerConfig
from raylhf.config.run import CommonConfig


class Rendezvous:
    """How one rank meets the others: rank 0 hosts a store, and every rank joins the group over it."""

    def __init__(self, config: CommonConfig, *, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._store: dist.TCPStore | None = None

    def open(self) -> int:
        """On rank 0: host the store and return its port."""
        self._store = open_store(timeout_s=self._config.cluster.start_timeout_s)
        return self._store.port

    def join(self, host: str, port: int) -> None:
        """Set this process's threads and seed, and join the other ranks."""
        learner, cluster = self._config.learner, self._config.cluster
        torch.set_num_threads(learner.threads)
        torch.manual_seed(self._config.seed)
        join_group(
            self._store,
            host=host,
            port=port,
            rank=self._rank,
            world_size=learner.num_ranks,
            use_gpu=learner.num_gpus > 0,
            timeout_s=max(cluster.start_timeout_s, cluster.step_timeout_s),
        )

    def leave(self) -> None:
        """Leave the group, if it was joined."""
        if dist.is_initialized():
            dist.destroy_process_group()


def open_store(*, timeout_s: float) -> dist.TCPStore:
    """Rank 0's rendezvous store, on a port that the system chooses: no race for a free port."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_group(
    store: dist.TCPStore | None, *, host: str, port: int, rank: int, world_size: int, use_gpu: bool, timeout_s: float
) -> None:
    """Join the learners' process group, within a deadline; DeepSpeed then uses it."""
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray shows each rank its own device
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if not use_gpu:
        # DeepSpeed would compile a shared-memory op with g++ here: up to a minute, a lock that a killed build leaves
        # behind, and nothing gained for a handful of small reductions.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def engine_settings(config: LearnerConfig, *, use_bf16: bool, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulation is 1: the learner itself sets the boundaries and owns the denominator."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10 * hidden_size, "stage3_prefetch_bucket_size": 0}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": use_bf16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Reductions in the parameters' own type: float32 stays float32.
        "communication_data_type": "bf16" if use_bf16 else "fp32",
    }


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Within it, `from_pretrained` partitions weights as it reads them if the stage is 3: no rank holds the model."""
    keep_alive = HfDeepSpeedConfig(settings) if settings["zero_optimization"]["stage"] == 3 else None
    try:
        yield
    finally:
        del keep_alive


def build_engine(
    module: nn.Module, groups: Sequence[dict[str, Any]], config: LearnerConfig, settings: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """A training engine over `module` with AdamW on the given parameter groups."""
    options = {"betas": config.adam_betas, "eps": config.adam_eps, "weight_decay": config.weight_decay}
    if config.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(list(groups), adamw_mode=True, **options)
    else:
        optimizer = torch.optim.AdamW(list(groups), fused=True, **options)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    if engine.zero_optimization_stage() == 0:
        # For half precision DeepSpeed has allocated Adam's moments by a step without gradients, and leaves it counted.
        for group in range(len(groups)):
            restart_adam(engine, group=group)
    return engine


def build_frozen(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A frozen model for forward passes: partitioned under stage 3, an ordinary module otherwise."""
    module.requires_grad_(False).eval()
    if settings["zero_optimization"]["stage"] != 3:
        return module
    engine, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    return engine


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The full values of `parameters` on every rank, for reading. Not to be nested: leaving it partitions again."""
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=None):
        yield


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape before partitioning (a partitioned parameter has 0 elements)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine, micro_losses: Sequence[Callable[[], Tensor]], lrs: Sequence[float]
) -> float:
    """One optimizer step over losses that are computed one after the other; returns the gradient's norm.

    Each loss is already divided by the step's global denominator. DeepSpeed takes the mean over ranks, so the loss is
    multiplied by their number: what is minimised is the sum over all micro-batches and ranks.
    """
    optimizer: Any = engine.optimizer
    # Alone, and without partitions, there is nobody to reduce with: DeepSpeed would still copy every gradient twice.
    is_alone = dist.get_world_size() == 1 and engine.zero_optimization_stage() == 0
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    for i, compute in enumerate(micro_losses):
        engine.set_gradient_accumulation_boundary(i == len(micro_losses) - 1)
        with engine.no_sync() if is_alone else nullcontext():
            engine.backward(compute() * dist.get_world_size())
    norm = _plain_gradient_norm(engine.module) if engine.zero_optimization_stage() == 0 else None
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak from here on: what loading took is not what training takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not on Linux, or not allowed: the peak counts from the process's start then
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """The largest peak over ranks (collective) since `forget_peak_memory`: device memory, on a CPU resident memory."""
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_resident_bytes()
    peak = torch.tensor(used / 2**30, dtype=torch.float64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def _peak_resident_bytes() -> int:
    """The high-water mark of this process's resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> Any:
    """The Adam that DeepSpeed wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def adam_states(engine: deepspeed.DeepSpeedEngine, group: int) -> list[dict[str, Any]]:
    """Adam's states of a parameter group on this rank: of its parameters (ZeRO 0), or of flat parts of them."""
    inner, outer = inner_optimizer(engine), engine.optimizer
    owners: list[Any] = inner.param_groups[group]["params"]
    if engine.zero_optimization_stage() == 3:  # which has the groups empty between its steps
        flat: Any = outer
        owners = [p for i, p in enumerate(flat.fp32_partitioned_groups_flat) if flat.sub_group_to_group_id[i] == group]
    return [state for owner in owners if (state := inner.state.get(owner))]


def restart_adam(engine: deepspeed.DeepSpeedEngine, *, group: int) -> None:
    """Forget the steps that a parameter group took without gradients, while another group learnt.

    They left its moments at zero but advanced its step count; without bias correction, Adam's first real updates would
    be several times the learning rate.
    """
    for state in adam_states(engine, group):
        state["step"] = 0 * state["step"]  # a tensor, or a number in DeepSpeed's Adam


def _plain_gradient_norm(module: Any) -> float | None:
    """DeepSpeed keeps no norm of unpartitioned float32 gradients; they are reduced and unclipped at this point."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None
