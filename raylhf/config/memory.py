"""Memory of learner ranks and rollout workers, estimated from the settings. Sizes are bytes.

An estimate, not a measurement: allocator fragmentation, communication buffers and the copies made while a checkpoint
is loaded or weights are sent are not counted one by one, only by RUNTIME below.

Sources: ZeRO 1910.02054 (states and their partition), ZeRO-Offload 2101.06840, activations 2205.05198, LoRA 2106.09685.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raylhf.config.architecture import Architecture
from raylhf.config.run import CommonConfig, RunConfig, guide_of

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
RUNTIME = {"gpu": 1.5 * GIB, "learner": 0.5 * GIB, "rollout": 1.0 * GIB, "reward": 0.3 * GIB}
"""CUDA context, kernels and NCCL on a GPU; Python with its libraries in host memory, for one worker."""
CRITIC = "critic "
"""Before the name of an item of the critic."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What one worker holds at its peak."""

    role: str
    """`rollout` or `learner`."""
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


def estimate_learner(config: RunConfig, policy: Architecture, critic: Architecture | None) -> MemoryEstimate:
    """One learner rank; `critic` is the architecture of a critic with its own trunk, None where there is none."""
    learner = config.learner
    items = _states(config, policy.parameters, trained=_trained(config, policy, policy.parameters))
    if learner.lora is None:
        items["reference"] = items["parameters"]
    if guide_of(config.objective) is not None:
        items["guide"] = items["parameters"]  # a model of the policy's family, and taken to be of its size
    if critic is not None:
        count = critic.trunk_parameters + critic.hidden
        states = _states(config, count, trained=_trained(config, critic, count))
        items |= {CRITIC + name: size for name, size in states.items()}
    if learner.zero_stage == 3 and learner.num_ranks > 1:
        items["gathered layers"] = _gathered_bytes(config, policy)
    items["activations"] = _activation_bytes(config, policy)
    items["logits"] = _logits_bytes(config, policy)
    if learner.num_gpus == 0:
        return MemoryEstimate("learner", host={**items, "runtime": RUNTIME["learner"]})
    offloaded = _offloaded(config)
    host = {name: size for name, size in items.items() if name.removeprefix(CRITIC) in offloaded}
    device = {name: size for name, size in items.items() if name not in host}
    return MemoryEstimate("learner", {**device, "runtime": RUNTIME["gpu"]}, {**host, "runtime": RUNTIME["learner"]})


def _trained(config: CommonConfig, model: Architecture, parameters: int) -> int:
    """Parameters that have gradients: all, or those of the adapters."""
    lora = config.learner.lora
    return model.lora_parameters(lora.rank) if lora else parameters


def _offloaded(config: RunConfig) -> tuple[str, ...]:
    """Items that the settings move to host memory (2101.06840)."""
    optimizer = ("optimizer", "gradients") if config.learner.offload_optimizer else ()
    return (*optimizer, "parameters", "reference") if config.learner.offload_params else optimizer


def _states(config: RunConfig, parameters: int, *, trained: int) -> dict[str, float]:
    """Parameters, gradients and optimizer of one model on one rank (1910.02054, section 3).

    Adam holds two float32 moments, and ZeRO a float32 master copy of the weights, even where they are float32 already
    (DeepSpeed's stages 1 to 3 keep it); only stage 0 in float32 does without.
    """
    learner = config.learner
    width, ranks, stage = BYTES[config.model.dtype], learner.num_ranks, learner.zero_stage
    return {
        "parameters": width * parameters / (ranks if stage == 3 else 1),
        "gradients": width * trained / (ranks if stage >= 2 else 1),
        "optimizer": _optimizer_width(config) * trained / (ranks if stage >= 1 else 1),
    }


def _optimizer_width(config: CommonConfig) -> int:
    """Bytes of the optimizer for one trained parameter, over all ranks."""
    has_master = config.learner.zero_stage > 0 or config.model.dtype == "bfloat16"
    return 12 if has_master else 8


def saved_bytes(config: CommonConfig, model: Architecture, parameters: int) -> float:
    """What a checkpoint holds of one model: the weights that are trained, and their optimizer."""
    return (BYTES[config.model.dtype] + _optimizer_width(config)) * _trained(config, model, parameters)


def _gathered_bytes(config: RunConfig, policy: Architecture) -> float:
    """ZeRO-3's whole modules: the layer at work, the next one prefetched, and the vocabulary matrices."""
    vocabulary = policy.embedding_parameters * (1 if policy.is_tied else 2)
    return BYTES[config.model.dtype] * (2 * policy.layer_parameters + vocabulary)


def pass_tokens(config: RunConfig) -> int:
    """Most tokens of one forward and backward pass: a sequence is never cut."""
    length = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    return max(config.learner.micro_batch_tokens, length)


def _activation_bytes(config: RunConfig, policy: Architecture) -> float:
    """One micro-batch of the longest sequences (the counting of 2205.05198, section 4, for a gated MLP).

    A token leaves in each layer: 6 hidden-wide (two norms with their inputs, two residuals), queries and the attention
    output, keys and values, 4 intermediate-wide (gate, up, activation, product). Eager attention also keeps its scores
    (float32) and weights. With checkpointing only each layer's input stays, and one layer is recomputed at a time.
    """
    width = BYTES[config.model.dtype]
    length = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    tokens = pass_tokens(config)
    attention = policy.head_dim * 2 * (policy.heads + policy.kv_heads)
    layer = width * (6 * policy.hidden + attention + 4 * policy.intermediate)
    if config.model.attention == "eager":
        layer += policy.heads * length * (4 + width)
    if config.learner.gradient_checkpointing:
        return float(tokens * (policy.layers * width * policy.hidden + layer))
    return float(tokens * policy.layers * layer)


def _logits_bytes(config: RunConfig, policy: Architecture) -> float:
    """Logits, log-probabilities and their gradient, in float32, of one chunk of positions."""
    positions = min(config.learner.logprob_chunk, pass_tokens(config))
    return 3.0 * 4 * positions * policy.vocab


def kv_bytes_per_token(config: RunConfig, policy: Architecture) -> float:
    """Keys and values of one token on one GPU of an engine (kv heads are copied where there are fewer than GPUs)."""
    heads = max(1.0, policy.kv_heads / config.rollout.tensor_parallel_size)
    return 2.0 * policy.layers * heads * policy.head_dim * BYTES[config.model.dtype]


def estimate_rollout(config: RunConfig, policy: Architecture) -> MemoryEstimate:
    """One rollout worker. On a GPU vLLM fills its share: what weights and runtime leave becomes KV cache."""
    rollout = config.rollout
    weights = BYTES[config.model.dtype] * policy.parameters / rollout.tensor_parallel_size
    if rollout.num_gpus == 0:
        host = {"weights": weights, "KV cache": rollout.kv_cache_gib * GIB, "runtime": RUNTIME["rollout"]}
        return MemoryEstimate("rollout", host=host)
    share = rollout.gpu_memory_utilization * config.cluster.gpu_memory_gib * GIB
    device = {"weights": weights, "runtime": RUNTIME["gpu"]}
    device["KV cache"] = max(0.0, share - sum(device.values()))
    return MemoryEstimate("rollout", device, {"runtime": RUNTIME["rollout"]})
