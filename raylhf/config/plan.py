"""What a run will do and take, worked out from its settings alone: no engine, model or cluster is touched."""

from dataclasses import dataclass

from raylhf.config.architecture import Architecture, architecture_of
from raylhf.config.memory import (
    BYTES,
    GIB,
    RUNTIME,
    MemoryEstimate,
    estimate_learner,
    estimate_rollout,
    kv_bytes_per_token,
    saved_bytes,
)
from raylhf.config.placement import Node, Role, place_config, roles_of
from raylhf.config.run import AnyRunConfig, RunConfig

TIGHT_SHARE = 0.9
"""An estimate above this share of a memory is worth a warning: fragmentation is not in it."""


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic from prompts to optimizer steps."""

    prompts_per_step: int
    responses_per_step: int
    responses_per_rank: int
    responses_per_minibatch: int
    """Of one rank."""
    micro_batches_per_minibatch: int
    """Of one rank, at most: shorter responses share more."""
    optimizer_steps_per_rollout: int
    total_optimizer_steps: int
    """Most that the run takes: critic warm-up and approx_kl_limit make them fewer."""
    sampled_tokens_per_step: int
    """Response tokens at most."""
    tokens_per_step: int
    """Prompt and response tokens at most, in one pass of the learner."""


@dataclass(frozen=True)
class Plan:
    """A run, resolved."""

    roles: tuple[Role, ...]
    batch: BatchPlan
    weight_transfer: str
    """Transport of weights."""
    parameters: int | None
    """Of the policy; None where the model is not known without a download."""
    trained_parameters: int | None
    """Of the policy or of its adapters."""
    critic_parameters: int | None
    """Of a critic with its own trunk; 0 without one, None where not known."""
    memory: tuple[MemoryEstimate, ...]
    """One worker of each role; empty where the model is not known."""
    kv_cache_tokens: int | None
    """Tokens that the KV cache of one engine holds."""
    gpu_peak_bytes: float
    """On the fullest GPU."""
    host_peak_bytes: float
    """On the fullest node."""
    warnings: tuple[str, ...]
    """What may not fit, each with a remedy."""


def resolve_plan(config: RunConfig) -> Plan:
    """The plan of settings that passed `check_config`."""
    policy = architecture_of(config.model.path)
    critic = _critic_architecture(config, policy)
    has_own_critic = _has_own_critic(config)
    is_known = policy is not None and (critic is not None or not has_own_critic)
    memory = _memory(config, policy, critic) if is_known and policy is not None else ()
    gpu_peak, host_peak, fullest = _peaks(config, memory)
    kv_tokens = _kv_cache_tokens(config, policy, memory)
    lora = config.learner.lora
    parameters = policy.parameters if policy else None
    return Plan(
        roles=roles_of(config),
        batch=plan_batch(config),
        weight_transfer=config.weight_transfer,
        parameters=parameters,
        trained_parameters=policy.lora_parameters(lora.rank) if policy and lora else parameters,
        critic_parameters=(critic.trunk_parameters + critic.hidden if critic else None) if has_own_critic else 0,
        memory=memory,
        kv_cache_tokens=kv_tokens,
        gpu_peak_bytes=gpu_peak,
        host_peak_bytes=host_peak,
        warnings=tuple(_warnings(config, gpu_peak, host_peak, fullest, kv_tokens)),
    )


def checkpoint_bytes(config: AnyRunConfig) -> float | None:
    """What one checkpoint takes on the disk, about; None where the model is not known without a download."""
    policy = architecture_of(config.model.path)
    if policy is None:
        return None
    total = saved_bytes(config, policy, policy.parameters)
    if isinstance(config, RunConfig) and _has_own_critic(config):
        critic = _critic_architecture(config, policy)
        if critic is None:
            return None
        total += saved_bytes(config, critic, critic.trunk_parameters + critic.hidden)
    return total


def export_bytes(config: AnyRunConfig) -> float | None:
    """What the export takes on the disk, about; None where the model is not known without a download."""
    policy = architecture_of(config.model.path)
    if not config.checkpoint.export:
        return 0.0
    return None if policy is None else BYTES[config.model.dtype] * policy.parameters


def plan_batch(config: RunConfig) -> BatchPlan:
    """The batch arithmetic."""
    objective, learner, sampling = config.objective, config.learner, config.rollout.sampling
    responses = config.responses_per_step
    per_rank = responses // learner.num_ranks
    per_minibatch = per_rank // objective.num_minibatches
    steps = objective.num_epochs * objective.num_minibatches
    return BatchPlan(
        prompts_per_step=config.rollout.prompts_per_step,
        responses_per_step=responses,
        responses_per_rank=per_rank,
        responses_per_minibatch=per_minibatch,
        micro_batches_per_minibatch=-(-per_minibatch // max(1, learner.micro_batch_tokens // config.max_model_len)),
        optimizer_steps_per_rollout=steps,
        total_optimizer_steps=steps * config.num_steps,
        sampled_tokens_per_step=responses * sampling.max_response_tokens,
        tokens_per_step=responses * (config.data.max_prompt_tokens + sampling.max_response_tokens),
    )


def _has_own_critic(config: RunConfig) -> bool:
    return config.critic is not None and config.critic.trunk == "own"


def _critic_architecture(config: RunConfig, policy: Architecture | None) -> Architecture | None:
    if config.critic is None or config.critic.trunk != "own":
        return None
    path = config.critic.path
    return architecture_of(path) if path else policy


def _memory(config: RunConfig, policy: Architecture, critic: Architecture | None) -> tuple[MemoryEstimate, ...]:
    reward = MemoryEstimate("reward", host={"runtime": RUNTIME["reward"]})
    return (estimate_rollout(config, policy), reward, estimate_learner(config, policy, critic))


def _kv_cache_tokens(config: RunConfig, policy: Architecture | None, memory: tuple[MemoryEstimate, ...]) -> int | None:
    if policy is None or not memory:
        return None
    rollout = memory[0]
    cache = (rollout.device or rollout.host)["KV cache"]
    return int(cache / kv_bytes_per_token(config, policy))


def _peaks(config: RunConfig, memory: tuple[MemoryEstimate, ...]) -> tuple[float, float, Node | None]:
    """Bytes on the fullest GPU, bytes on the fullest node, and that node."""
    by_role = {estimate.role: estimate for estimate in memory}
    nodes = place_config(config).nodes
    if not by_role:
        return 0.0, 0.0, None
    store = config.cluster.object_store_gib * GIB
    gpus = [
        sum(by_role[worker.role].device_bytes for worker in node.workers if gpu in worker.gpus)
        for node in nodes
        for gpu in range(config.cluster.gpus_per_node)
    ]
    hosts = [store + sum(by_role[worker.role].host_bytes for worker in node.workers) for node in nodes]
    fullest = max(range(len(nodes)), key=hosts.__getitem__)
    return max(gpus, default=0.0), hosts[fullest], nodes[fullest]


def _warnings(
    config: RunConfig, gpu_peak: float, host_peak: float, fullest: Node | None, kv_tokens: int | None
) -> list[str]:
    if kv_tokens is None:
        return []
    warnings = []
    gpu, host = config.cluster.gpu_memory_gib * GIB, config.cluster.host_memory_gib * GIB
    if gpu_peak > TIGHT_SHARE * gpu:
        warnings.append(
            f"{_verdict(gpu_peak, gpu)}: about {gpu_peak / GIB:.1f} GiB on the fullest GPU of "
            f"{config.cluster.gpu_memory_gib:g} GiB; try {', '.join(_gpu_remedies(config))}"
        )
    if host_peak > TIGHT_SHARE * host:
        names = [worker.role for worker in fullest.workers] if fullest else []
        holds = " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        warnings.append(
            f"{_verdict(host_peak, host)}: about {host_peak / GIB:.1f} GiB in the memory of a node of "
            f"{config.cluster.host_memory_gib:g} GiB ({holds}); try {', '.join(_host_remedies(config))}"
        )
    if kv_tokens < config.max_model_len:
        key = "rollout.gpu_memory_utilization" if config.rollout.num_gpus else "rollout.kv_cache_gib"
        warnings.append(
            f"does not fit: the KV cache of an engine holds about {kv_tokens} tokens, less than one sequence of "
            f"{config.max_model_len}; raise {key} or rollout.tensor_parallel_size"
        )
    return warnings


def _verdict(wanted: float, capacity: float) -> str:
    return "does not fit" if wanted > capacity else "is tight"


def _gpu_remedies(config: RunConfig) -> list[str]:
    learner = config.learner
    options = {
        "learner.zero_stage=3": learner.zero_stage < 3 and learner.num_ranks > 1,
        "learner.gradient_checkpointing=true": not learner.gradient_checkpointing,
        "learner.offload_optimizer=true": not learner.offload_optimizer,
        "learner.lora.rank=16": learner.lora is None,
        "objective.critic.trunk=shared": _has_own_critic(config),
        "a smaller learner.micro_batch_tokens": learner.micro_batch_tokens > config.max_model_len,
        "a smaller rollout.gpu_memory_utilization": config.weight_transfer == "ipc",
        "a larger rollout.tensor_parallel_size": config.weight_transfer == "nccl",
        "more learner.num_ranks": learner.zero_stage > 0,
    }
    return [remedy for remedy, helps in options.items() if helps]


def _host_remedies(config: RunConfig) -> list[str]:
    learner = config.learner
    is_cpu = learner.num_gpus == 0
    options = {
        "learner.lora.rank=16": learner.lora is None,
        "objective.critic.trunk=shared": _has_own_critic(config),
        "learner.gradient_checkpointing=true": is_cpu and not learner.gradient_checkpointing,
        "a smaller learner.micro_batch_tokens": is_cpu and learner.micro_batch_tokens > config.max_model_len,
        "a smaller rollout.kv_cache_gib": config.rollout.num_gpus == 0,
        "fewer workers on a node": config.cluster.num_nodes > 1,
        "a smaller cluster.object_store_gib": config.cluster.object_store_gib > 1,
        "learner.offload_params=false": learner.offload_params,
        "learner.offload_optimizer=false": learner.offload_optimizer,
        "a smaller model": True,
    }
    return [remedy for remedy, helps in options.items() if helps]
