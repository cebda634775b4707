"""How long the parts of a step take at most: a roofline of arithmetic, memory and links. Times are seconds.

Every response is taken to be as long as the settings allow. A pass over tokens costs 2 operations a weight and token
forward and 4 backward (2001.08361), and attention 4 a layer, head dimension and pair of tokens, half of which causality
leaves. Decoding reads all weights and the KV cache for each token of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raylhf.config.architecture import Architecture
from raylhf.config.devices import Device
from raylhf.config.learner_memory import trained_parameters
from raylhf.config.memory import BYTES, kv_bytes_per_token, reward_models_of
from raylhf.config.placement import Placement
from raylhf.config.reward_model import RewardModelConfig
from raylhf.config.run import AnyRunConfig, RunConfig
from raylhf.config.workload import (
    Pass,
    longest_row,
    max_prompt_tokens,
    max_response_tokens,
    optimizer_steps_of,
    passes_of,
    passes_per_step,
    positions_in_pass,
    tokens_of,
)

Limit = Literal["arithmetic", "reading weights and KV cache", "links"]


@dataclass(frozen=True)
class Part:
    """One part of a step."""

    name: str
    seconds: float
    limit: Limit
    """What takes the time."""


@dataclass(frozen=True)
class Models:
    """The shapes of the models that a run trains or reads."""

    policy: Architecture
    critic: Architecture | None

    def of(self, name: str) -> Architecture:
        """A frozen reference and a guide have the policy's shape."""
        return self.critic if name == "critic" and self.critic is not None else self.policy


def forward_flops(shape: Architecture, *, tokens: int, rows: int, length: int, positions: int) -> float:
    """Operations of one forward pass over `tokens` tokens of `rows` rows, each of `length` with the prompt that it may
    share; `positions` of a row reach the output layer."""
    weights = shape.layers * (shape.layer_parameters - 2 * shape.hidden)
    attention = shape.layers * shape.heads * shape.head_dim * 4 * length * length / 2
    return 2.0 * weights * tokens + rows * (attention + 2.0 * positions * shape.vocab * shape.hidden)


def training_flops(config: AnyRunConfig, shape: Architecture, *, rows: int, has_logits: bool) -> float:
    """Operations of forward and backward passes. Frozen weights need no gradient of their own: half of the backward
    pass. Checkpointing computes the layers twice; the chunked log-softmax all but the last chunk of a pass."""
    positions = max_response_tokens(config) if has_logits else 0
    tokens, length = tokens_of(config, rows), longest_row(config)
    layers = forward_flops(shape, tokens=tokens, rows=rows, length=length, positions=0)
    head = rows * 2.0 * positions * shape.vocab * shape.hidden
    factor = 2.0 if config.learner.lora else 3.0
    objective = config.objective
    if isinstance(objective, RewardModelConfig) and objective.trainable_layers is not None:
        layers *= min(1.0, objective.trainable_layers / shape.layers)  # those below are computed once, at the start
    again = max(0.0, 1 - config.learner.logprob_chunk / positions_in_pass(config))
    return layers * (factor + config.learner.gradient_checkpointing) + head * (factor + again)


def step_parts(
    config: AnyRunConfig, models: Models, device: Device, placement: Placement, kv_tokens: int | None
) -> tuple[Part, ...]:
    """The parts in their order."""
    parts: list[Part] = []
    if isinstance(config, RunConfig):
        parts += _rollout(config, models.policy, device, kv_tokens or 0)
        parts += _reward(config, device)
    parts += _learning(config, models, device, placement)
    if isinstance(config, RunConfig):
        parts.append(_sync(config, models.policy, device))
    return tuple(parts)


def step_seconds(config: AnyRunConfig, parts: tuple[Part, ...]) -> float:
    """One step: the parts one after the other or, where responses may be stale, sampling beside learning."""
    total = sum(part.seconds for part in parts)
    if not isinstance(config, RunConfig) or config.rollout.max_staleness == 0:
        return total
    sampling = sum(part.seconds for part in parts if part.name.startswith(("rollout", "reward")))
    sync = sum(part.seconds for part in parts if part.name == "weight sync")
    return max(sampling, total - sampling - sync) + sync


def _rollout(config: RunConfig, policy: Architecture, device: Device, kv_tokens: int) -> Iterator[Part]:
    """One engine's share of the prompts, in as many waves as it decodes at once."""
    rollout, tp = config.rollout, config.rollout.tensor_parallel_size
    lanes = tp if rollout.num_gpus > 0 else rollout.threads * tp
    prompts = -(-rollout.prompts_per_step // rollout.replicas)
    sequences = prompts * rollout.group_size
    prompt, response = max_prompt_tokens(config), max_response_tokens(config)
    flops = _flops(config, device) * lanes
    prefill = forward_flops(policy, tokens=prompts * prompt, rows=prompts, length=prompt, positions=1)
    prefill /= flops * device.prefill_share
    yield Part("rollout: prefill", prefill, "arithmetic")
    at_once = max(1, min(sequences, rollout.max_num_seqs, kv_tokens // longest_row(config)))
    waves = -(-sequences // at_once)
    context = prompt + response / 2
    weights = BYTES[config.model.dtype] * policy.parameters / tp
    cache = kv_bytes_per_token(config, policy) * at_once * context
    bandwidth = device.memory_bytes * (1 if rollout.num_gpus > 0 else rollout.threads) * device.read_share
    reading = (weights + cache) / bandwidth
    weights_at_work = policy.layers * policy.layer_parameters + policy.embedding_parameters
    attention = 4.0 * policy.layers * policy.heads * policy.head_dim * context
    computing = at_once * (2.0 * weights_at_work + attention) / (flops * device.decode_share)
    limit: Limit = "arithmetic" if computing > reading else "reading weights and KV cache"
    yield Part("rollout: decode", waves * response * max(reading, computing), limit)


def _reward(config: RunConfig, device: Device) -> Iterator[Part]:
    """Reward models whose shape is known; rules cost next to nothing, and a remote service is not known."""
    models = [m for m in reward_models_of(config) if m.shape is not None]
    if not models:
        return
    reward, length = config.reward, longest_row(config)
    lanes = reward.num_gpus if reward.num_gpus > 0 else reward.threads
    rows = -(-config.responses_per_step // reward.replicas)
    total = sum(
        forward_flops(m.shape, tokens=rows * min(length, m.max_tokens), rows=rows, length=length, positions=0)
        / (device.flops if m.dtype == "bfloat16" else device.float32_flops)
        for m in models
        if m.shape is not None
    )
    yield Part("reward", total / (lanes * device.prefill_share), "arithmetic")


def _learning(config: AnyRunConfig, models: Models, device: Device, placement: Placement) -> Iterator[Part]:
    learner, passes = config.learner, passes_of(config)
    lanes = learner.num_ranks * (1 if learner.num_gpus > 0 else learner.threads)
    rate = _flops(config, device) * lanes * device.learn_share
    names = {"logprobs": "logprobs and values", "update": "update: passes"}
    for phase, name in names.items():
        flops = sum(_pass_flops(config, models, each) for each in passes if each.phase == phase)
        if flops:
            yield Part(name, flops / rate, "arithmetic")
    if learner.num_ranks > 1:
        seconds = sum(_communication_bytes(config, models, each) for each in passes) / _link(config, device, placement)
        yield Part("ZeRO: gather and reduce", seconds, "links")


def _pass_flops(config: AnyRunConfig, models: Models, each: Pass) -> float:
    shape, has_logits = models.of(each.model), each.model != "critic"
    has_logits = has_logits and not isinstance(config.objective, RewardModelConfig)
    if each.is_training:
        return training_flops(config, shape, rows=each.rows, has_logits=has_logits)
    positions = max_response_tokens(config) if has_logits else 0
    tokens = tokens_of(config, each.rows)
    return forward_flops(shape, tokens=tokens, rows=each.rows, length=longest_row(config), positions=positions)


def _communication_bytes(config: AnyRunConfig, models: Models, each: Pass) -> float:
    """What one rank sends for one model in a step (1910.02054, section 7; (n-1)/n of a ring over n ranks).

    Stage 3 gathers the weights for every pass; DeepSpeed's stages 2 and 3 reduce gradients after every backward pass,
    stages 0 and 1 once an optimizer step. Stages 1 and 2 gather the updated weights once a step.
    """
    learner, shape = config.learner, models.of(each.model)
    width, ranks, stage = BYTES[config.model.dtype], learner.num_ranks, learner.zero_stage
    has_logits = each.model != "critic" and not isinstance(config.objective, RewardModelConfig)
    parameters = shape.parameters if has_logits else shape.trunk_parameters + shape.hidden
    passes = passes_per_step(config, tokens_of(config, each.rows))
    ring = width * (ranks - 1) / ranks
    trained = trained_parameters(config, shape, parameters)
    gathers = passes * (1 + each.is_training) if stage == 3 else 0  # recomputed layers stay for their backward pass
    if not each.is_training:
        return ring * parameters * gathers
    steps = optimizer_steps_of(config)
    reduced = {0: 2 * steps, 1: 2 * steps, 2: 2 * passes, 3: passes}[stage]
    updated = steps if stage in (1, 2) else 0
    return ring * (parameters * gathers + trained * (reduced + updated))


def _link(config: AnyRunConfig, device: Device, placement: Placement) -> float:
    """Bytes a second that reach one rank in a collective: over the links of its node and, between nodes, over the
    networks of all ranks on a node together (a ring enters and leaves a node once for each)."""
    counts = [sum(worker.role == "learner" for worker in node.workers) for node in placement.nodes]
    holding = [count for count in counts if count]
    if len(holding) <= 1:
        return device.send_share * device.link_bytes
    return device.send_share * min(device.link_bytes, min(holding) * device.network_bytes)


def _sync(config: RunConfig, policy: Architecture, device: Device) -> Part:
    """One broadcast of the policy's weights. Inside of a GPU they are copied, read and written; so they are by an
    engine that gets adapters alone (over gloo), and puts them into the weights of its folder."""
    size = BYTES[config.model.dtype] * policy.parameters
    if config.weight_transfer == "ipc":
        return Part("weight sync", 2 * size / (device.memory_bytes * device.read_share), "links")
    rate = device.link_bytes if config.cluster.num_nodes == 1 else device.network_bytes
    if config.learner.lora is None or config.weight_transfer != "gloo":
        return Part("weight sync", size / (rate * device.send_share), "links")
    adapters = BYTES[config.model.dtype] * trained_parameters(config, policy, 0)
    merging = 2 * size / (device.memory_bytes * device.read_share)
    return Part("weight sync", adapters / (rate * device.send_share) + merging, "links")


def _flops(config: AnyRunConfig, device: Device) -> float:
    return device.flops if config.model.dtype == "bfloat16" else device.float32_flops
