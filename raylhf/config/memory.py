"""What one worker holds in memory, phase by phase; rollout and reward workers. Sizes are bytes.

An estimate, not a measurement: what the allocators keep beyond what is asked for is not in it (docs/planning.md says
how much that was on the machine that it was compared on).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raylhf.config.architecture import Architecture, architecture_of
from raylhf.config.reward import walk
from raylhf.config.reward_leaves import EnsembleReward, ImplicitReward, ModelLeaf
from raylhf.config.run import RunConfig

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
RUNTIME = {"gpu": 1.5 * GIB, "learner": 0.7 * GIB, "rollout": 1.3 * GIB, "reward": 0.3 * GIB}
"""CUDA context, kernels and NCCL on a GPU (assumed); Python with its libraries in host memory, for one worker, an
engine's second process included (measured: docs/planning.md)."""
ENGINE_WORK = 0.55 * GIB
"""What vLLM takes on a CPU beside weights and KV cache: buffers, packed weights, activations (measured there)."""

RECEIVE_BUCKET = {"gloo": 16.0 * 2**20, "nccl": 2.0 * GIB, "ipc": 0.0}
"""Buffers of a weight transfer at the engine's end: two buckets of raylhf's, two packed buffers of vLLM's."""


@dataclass(frozen=True)
class Phase:
    """What a worker holds at one stage of its life."""

    name: str
    device: Mapping[str, float] = field(default_factory=dict)
    """Bytes by item on one GPU; empty on a CPU."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Bytes by item in host memory."""

    @property
    def device_bytes(self) -> float:
        """Bytes on each GPU of the worker."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """Bytes in host memory."""
        return sum(self.host.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """One worker of a role."""

    role: str
    """`rollout`, `reward` or `learner`."""
    phases: tuple[Phase, ...]

    @property
    def device_peak(self) -> Phase:
        """The phase that takes most of a GPU."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> Phase:
        """The phase that takes most host memory."""
        return max(self.phases, key=lambda phase: phase.host_bytes)

    @property
    def device(self) -> Mapping[str, float]:
        """Bytes by item on one GPU, at their peak."""
        return self.device_peak.device

    @property
    def host(self) -> Mapping[str, float]:
        """Bytes by item in host memory, at their peak."""
        return self.host_peak.host

    @property
    def device_bytes(self) -> float:
        """Bytes on each GPU of the worker, at their peak."""
        return self.device_peak.device_bytes

    @property
    def host_bytes(self) -> float:
        """Bytes in host memory, at their peak."""
        return self.host_peak.host_bytes


def kv_bytes_per_token(config: RunConfig, policy: Architecture) -> float:
    """Keys and values of one token on one GPU of an engine (kv heads are copied where there are fewer than GPUs)."""
    heads = max(1.0, policy.kv_heads / config.rollout.tensor_parallel_size)
    return 2.0 * policy.layers * heads * policy.head_dim * BYTES[config.model.dtype]


def estimate_rollout(config: RunConfig, policy: Architecture) -> MemoryEstimate:
    """One rollout worker. On a GPU vLLM fills its share: what weights and runtime leave becomes KV cache; the buffers
    of a weight transfer come on top."""
    rollout = config.rollout
    weights = BYTES[config.model.dtype] * policy.parameters / rollout.tensor_parallel_size
    runtime = RUNTIME["rollout"]
    if rollout.num_gpus == 0:
        host = {
            "parameters": weights,
            "KV cache": rollout.kv_cache_gib * GIB,
            "engine": ENGINE_WORK,
            "runtime": runtime,
        }
        largest = float(BYTES[config.model.dtype] * policy.embedding_parameters)
        syncing = host | {"transfer buffers": RECEIVE_BUCKET["gloo"] + largest}
        return MemoryEstimate("rollout", (Phase("generate", host=host), Phase("weight sync", host=syncing)))
    share = rollout.gpu_memory_utilization * config.cluster.gpu_memory_gib * GIB
    device = {"parameters": weights, "runtime": RUNTIME["gpu"]}
    device["KV cache"] = max(0.0, share - sum(device.values()))
    phases = [Phase("generate", device, {"runtime": runtime})]
    if (buffers := RECEIVE_BUCKET[config.weight_transfer]) > 0:
        syncing = device | {"transfer buffers": min(buffers, weights * rollout.tensor_parallel_size)}
        phases.append(Phase("weight sync", syncing, {"runtime": runtime}))
    return MemoryEstimate("rollout", tuple(phases))


@dataclass(frozen=True)
class RewardModelUse:
    """One model that reward workers hold."""

    shape: Architecture | None
    """None where it is not known without a download."""
    parameters: int
    dtype: str
    max_tokens: int


def reward_models_of(config: RunConfig) -> tuple[RewardModelUse, ...]:
    """The models of the reward graph's leaves."""
    found = []
    for _, node in walk(config.reward.graph, ""):
        if isinstance(node, EnsembleReward):
            paths = node.paths
        elif isinstance(node, ImplicitReward):
            paths = (node.policy, node.reference)
        elif isinstance(node, ModelLeaf):
            paths = (node.path,)
        else:
            continue
        for path in paths:
            shape = architecture_of(path)
            found.append(RewardModelUse(shape, shape.trunk_parameters if shape else 0, node.dtype, node.max_tokens))
    return tuple(found)


def estimate_reward(config: RunConfig) -> MemoryEstimate:
    """One reward worker: its models, and one forward pass of `batch_tokens` (activations of a layer, no gradients)."""
    models = reward_models_of(config)
    items = {"parameters": float(sum(BYTES[m.dtype] * m.parameters for m in models))}
    wide = [BYTES[m.dtype] * (8 * m.shape.hidden + 4 * m.shape.intermediate) for m in models if m.shape]
    items["activations"] = float(max(wide, default=0) * config.reward.batch_tokens)
    items = {name: size for name, size in items.items() if size}
    if config.reward.num_gpus == 0:
        return MemoryEstimate("reward", (Phase("score", host={**items, "runtime": RUNTIME["reward"]}),))
    device = {**items, "runtime": RUNTIME["gpu"]}
    return MemoryEstimate("reward", (Phase("score", device, {"runtime": RUNTIME["reward"]}),))
