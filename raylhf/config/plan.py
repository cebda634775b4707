"""What a run will do and take, worked out from its settings alone: no engine, model or cluster is touched."""

from dataclasses import dataclass

from raylhf.config.architecture import architecture_of
from raylhf.config.devices import DEVICES, NAME_OF_GPU, Device
from raylhf.config.fitting import Assessment, Shortage, assess, critic_architecture, has_own_critic
from raylhf.config.learner_memory import saved_bytes, trained_parameters
from raylhf.config.memory import BYTES, MemoryEstimate
from raylhf.config.placement import Role, roles_of
from raylhf.config.remedies import find_remedy, show
from raylhf.config.run import AnyRunConfig, RewardModelRunConfig, RunConfig
from raylhf.config.step_time import Models, Part, step_parts
from raylhf.config.workload import longest_row


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
    weight_transfer: str | None
    """Transport of weights; None where nothing is sampled."""
    parameters: int | None
    """Of the trained model; None where it is not known without a download."""
    trained_parameters: int | None
    """Of the trained model or of its adapters."""
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
    parts: tuple[Part, ...]
    """Of the time of a step; empty where the model is not known."""
    shortages: tuple[Shortage, ...]
    """What does not fit, or is tight."""
    warnings: tuple[str, ...]
    """The same as sentences, each with a remedy that was tried."""


def resolve_plan(config: AnyRunConfig, device: Device | None = None) -> Plan:
    """The plan of settings that passed their checks; `device` is what the learner and the engines run on."""
    found = assess(config)
    policy = architecture_of(config.model.path)
    critic = critic_architecture(config, policy)
    parameters = None
    if policy is not None:
        is_reward_model = isinstance(config, RewardModelRunConfig)
        parameters = policy.trunk_parameters + policy.hidden if is_reward_model else policy.parameters
    return Plan(
        roles=roles_of(config),
        weight_transfer=config.weight_transfer if isinstance(config, RunConfig) else None,
        parameters=parameters,
        trained_parameters=trained_parameters(config, policy, parameters) if policy and parameters else None,
        critic_parameters=(critic.trunk_parameters + critic.hidden if critic else None)
        if has_own_critic(config)
        else 0,
        memory=found.memory if found else (),
        kv_cache_tokens=found.kv_cache_tokens if found else None,
        gpu_peak_bytes=found.gpu_peak_bytes if found else 0.0,
        host_peak_bytes=found.host_peak_bytes if found else 0.0,
        parts=_parts(config, found, device or device_of(config)) if found else (),
        shortages=found.shortages if found else (),
        warnings=_warnings(config, found) if found else (),
    )


def device_of(config: AnyRunConfig) -> Device:
    """What the learner runs on, where nothing else is said."""
    return DEVICES["cpu" if config.learner.num_gpus == 0 else NAME_OF_GPU]


def _parts(config: AnyRunConfig, found: Assessment, device: Device) -> tuple[Part, ...]:
    return step_parts(config, Models(found.policy, found.critic), device, found.placement, found.kv_cache_tokens)


def _warnings(config: AnyRunConfig, found: Assessment) -> tuple[str, ...]:
    if not found.shortages:
        return ()
    remedy = find_remedy(config)
    cure = "room" if not any(shortage.is_fatal for shortage in found.shortages) else "it fits"
    told = (
        f"with {show(remedy)} {cure if cure == 'it fits' else 'there is room'}"
        if remedy
        else "no change of the settings that was tried makes it fit; take a smaller model, or more memory"
    )
    return tuple(f"{shortage.sentence}; {told}" for shortage in found.shortages)


def checkpoint_bytes(config: AnyRunConfig) -> float | None:
    """What one checkpoint takes on the disk, about; None where the model is not known without a download."""
    policy = architecture_of(config.model.path)
    if policy is None:
        return None
    total = saved_bytes(config, policy, policy.parameters)
    if has_own_critic(config):
        critic = critic_architecture(config, policy)
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
        micro_batches_per_minibatch=-(-per_minibatch // max(1, learner.micro_batch_tokens // longest_row(config))),
        optimizer_steps_per_rollout=steps,
        total_optimizer_steps=steps * config.num_steps,
        sampled_tokens_per_step=responses * sampling.max_response_tokens,
        tokens_per_step=responses * (config.data.max_prompt_tokens + sampling.max_response_tokens),
    )
