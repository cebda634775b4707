"""Memory of one learner rank, phase by phase, from the settings. Sizes are bytes; docs/planning.md derives each item.

Sources: ZeRO 1910.02054 (states and their partition), ZeRO-Offload 2101.06840, activations 2205.05198, LoRA 2106.09685;
what DeepSpeed 0.19 really keeps (buckets, copies, ZeRO-3's reuse of gathered weights) is from its code.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.architecture import Architecture
from raylhf.config.memory import BYTES, GIB, RUNTIME, MemoryEstimate, Phase
from raylhf.config.objective import PPOConfig
from raylhf.config.preference import OnlineDPOConfig, PreferenceConfig
from raylhf.config.reward_model import EnsembleHead, RewardModelConfig
from raylhf.config.run import AnyRunConfig, CommonConfig, RewardModelRunConfig, RunConfig, guide_of
from raylhf.config.workload import (
    longest_row,
    passes_per_minibatch,
    positions_in_pass,
    rows_per_prompt,
    shares_prompts,
    tokens_in_pass,
)

KEPT = "kept by the allocator"
CRITIC = "critic "
"""Before the name of an item of the critic."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size: gradients travel through a buffer of so many elements."""
REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: a gathered weight that is used again within so many elements stays."""
LOGIT_COPIES = {4: 1.25, 2: 1.5}
"""float32 tensors as large as a chunk's logits that are alive at once in a pass, by bytes of a stored number: the
float32 ones, beside what their product works with, or those in half precision (raylhf/algos/logprobs.py)."""
KL_LOGIT_COPIES = 6.0
"""The same where the KL over the whole vocabulary is computed (5.9 measured)."""
SUBGROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's sub_group_size: stage 3 steps so many elements at a time."""
HEAP_HOLES = 0.3 * GIB
"""What glibc's heap loses between the tensors of a pass: 0.2 to 0.5 GiB were measured (docs/planning.md)."""
LORA_HOLES = 0.6
"""What it loses more with LoRA, by bytes of the layers' activations, kept or computed again: its layers make three
tensors for each that is kept."""
HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc takes smaller blocks from its heap, which does not shrink while anything above lives."""
SEND_BUCKET = {"gloo": 16.0 * 2**20, "nccl": 3.0 * GIB}
"""Buffers of a weight transfer: two buckets of raylhf's; two packed buffers of vLLM's and the copies that fill one."""


@dataclass(frozen=True)
class Trained:
    """One model of a rank that learns."""

    prefix: str
    """Before the names of its items."""
    shape: Architecture
    parameters: int
    trained: int
    """Parameters that have gradients."""
    has_logits: bool
    """Whether its output layer is a vocabulary."""


def trained_parameters(config: CommonConfig, model: Architecture, parameters: int) -> int:
    """Parameters that have gradients: all, those of the adapters, or those of a reward model's upper layers."""
    lora = config.learner.lora
    if isinstance(config, RewardModelRunConfig):
        head = config.objective.head
        copies = head.members if isinstance(head, EnsembleHead) and head.trunk == "lora" else 1
        if lora:
            return copies * model.lora_parameters(lora.rank) + model.hidden
        if (layers := config.objective.trainable_layers) is not None:
            return min(layers, model.layers) * model.layer_parameters + 2 * model.hidden
    return model.lora_parameters(lora.rank) if lora else parameters


def optimizer_width(config: CommonConfig) -> int:
    """Bytes of the optimizer for one trained parameter, over all ranks.

    Adam holds two float32 moments, and ZeRO a float32 master copy of the weights, even where they are float32 already
    (DeepSpeed's stages 1 to 3 keep it); only stage 0 in float32 does without.
    """
    has_master = config.learner.zero_stage > 0 or config.model.dtype == "bfloat16"
    return 12 if has_master else 8


def saved_bytes(config: CommonConfig, model: Architecture, parameters: int) -> float:
    """What a checkpoint holds of one model: the weights that are trained, and their optimizer."""
    trained = trained_parameters(config, model, parameters)
    return (BYTES[config.model.dtype] + optimizer_width(config)) * trained


def has_reference(config: AnyRunConfig) -> bool:
    """Whether a rank holds a frozen copy of the policy."""
    objective = config.objective
    if config.learner.lora is not None or isinstance(config, RewardModelRunConfig):
        return False
    if isinstance(objective, PPOConfig | OnlineDPOConfig):
        return True
    return isinstance(objective, PreferenceConfig) and Need.REFERENCE in LOSSES[objective.loss.kind].needs


def estimate_learner(config: AnyRunConfig, policy: Architecture, critic: Architecture | None) -> MemoryEstimate:
    """One learner rank; `critic` is the architecture of a critic with its own trunk, None where there is none."""
    models = _models(config, policy, critic)
    frozen = _frozen(config, policy)
    held = frozen | _kept_always(config, models)
    for model in models:
        held |= {model.prefix + name: size for name, size in _held(config, model).items()}
    kept = _kept_after_passes(config, models)
    phases = [_phase(config, "load", _loading(config, models, frozen), on_host=True)]
    if not isinstance(config.objective, RewardModelConfig):
        phases.append(_phase(config, "logprobs", held | _pass(config, models[0], is_training=False)))
    for model in models:
        working = held | _gradients(config, model)
        what = (model.prefix or "policy ").strip()
        training = _pass(config, model, is_training=True)
        phases.append(_phase(config, f"{what} update", working | training | _kept_in_pass(config, models, model)))
        phases.append(_phase(config, f"{what} optimizer step", held | _stepping(config, model) | kept))
    if isinstance(config, RunConfig):
        phases.append(_phase(config, "weight sync", held | _sending(config, policy) | kept))
    return MemoryEstimate("learner", tuple(phases))


def _models(config: AnyRunConfig, policy: Architecture, critic: Architecture | None) -> tuple[Trained, ...]:
    is_reward_model = isinstance(config, RewardModelRunConfig)
    count = policy.trunk_parameters + policy.hidden if is_reward_model else policy.parameters
    first = Trained("", policy, count, trained_parameters(config, policy, count), not is_reward_model)
    if critic is None:
        return (first,)
    count = critic.trunk_parameters + critic.hidden
    return (first, Trained(CRITIC, critic, count, trained_parameters(config, critic, count), False))


def _frozen(config: AnyRunConfig, policy: Architecture) -> dict[str, float]:
    """Models for forward passes alone: partitioned by stage 3, whole otherwise."""
    learner = config.learner
    size = BYTES[config.model.dtype] * policy.parameters / (learner.num_ranks if learner.zero_stage == 3 else 1)
    items = {"reference": size} if has_reference(config) else {}
    if guide_of(config.objective) is not None:
        items["guide"] = size  # a model of the policy's family, and taken to be of its size
    return items


def _held(config: CommonConfig, model: Trained) -> dict[str, float]:
    """What stays throughout: weights and optimizer (1910.02054, section 3), stage 3's flat gradients and bucket."""
    learner = config.learner
    width, ranks, stage = BYTES[config.model.dtype], learner.num_ranks, learner.zero_stage
    items = {
        "parameters": width * model.parameters / (ranks if stage == 3 else 1),
        "optimizer": optimizer_width(config) * model.trained / (ranks if stage >= 1 else 1),
    }
    if stage == 3:
        items["gradients"] = width * model.trained / ranks
        items["reduce bucket"] = width * _bucket_elements(config, model)
    return items


def _gradients(config: CommonConfig, model: Trained) -> dict[str, float]:
    """Of the model that learns at the moment, until its optimizer step.

    Stage 0 and 1 keep them whole. Stages 2 and 3 keep a part, but they come whole into a bucket first.
    """
    learner = config.learner
    width, ranks, stage = BYTES[config.model.dtype], learner.num_ranks, learner.zero_stage
    if stage == 3:
        return {}  # held already
    items = {model.prefix + "gradients": width * model.trained / (ranks if stage == 2 else 1)}
    if stage > 0:
        items[model.prefix + "reduce bucket"] = width * _bucket_elements(config, model)
    return items


def _bucket_elements(config: CommonConfig, model: Trained) -> float:
    """On a GPU the bucket is taken whole; on a CPU the pages of what is used."""
    if config.learner.num_gpus > 0:
        return BUCKET_ELEMENTS
    return min(BUCKET_ELEMENTS, model.trained)


def _reduction_copies(config: CommonConfig) -> int:
    """DeepSpeed reduces a flat copy of the bucket; gloo scatters by way of one more. A rank alone without partitions
    reduces nothing."""
    learner = config.learner
    if learner.zero_stage == 0 and learner.num_ranks == 1:
        return 0
    return 2 if learner.zero_stage == 3 and learner.num_gpus == 0 and learner.num_ranks > 1 else 1


def _pass(config: AnyRunConfig, model: Trained, *, is_training: bool) -> dict[str, float]:
    """One forward pass, or a forward and backward pass, of the longest rows."""
    width, learner = BYTES[config.model.dtype], config.learner
    items = {}
    if learner.zero_stage == 3 and learner.num_ranks > 1:
        items["gathered weights"] = width * _gathered_elements(model)
    layers = activation_bytes(config, model.shape)
    one = layers.one_layer
    if not is_training:
        items["activations"] = one
    elif learner.gradient_checkpointing:
        items["activations"] = layers.kept_inputs + one
    else:
        items["activations"] = _training_layers(config, model.shape) * one
    if model.has_logits:
        items["logits"] = _logits_bytes(config, model, is_training=is_training)
    if is_training:
        copy = _reduction_copies(config) * width * min(BUCKET_ELEMENTS, model.trained)
        items["reduction copy"] = max(0.0, copy - items.get("logits", 0.0))  # whose memory is free by then
    return items


def _logits_bytes(config: AnyRunConfig, model: Trained, *, is_training: bool) -> float:
    """Of one chunk of positions; in the backward pass beside the output layer's gradient, unless that is frozen."""
    width, objective = BYTES[config.model.dtype], config.objective
    copies = LOGIT_COPIES[width]
    if (
        is_training
        and isinstance(objective, PreferenceConfig | OnlineDPOConfig)
        and Need.FULL_VOCABULARY_KL in LOSSES[objective.loss.kind].needs
    ):
        copies = KL_LOGIT_COPIES
    logits = copies * 4.0 * min(config.learner.logprob_chunk, positions_in_pass(config)) * model.shape.vocab
    if is_training and config.learner.lora is None:
        logits += width * model.shape.embedding_parameters
    return logits


@dataclass(frozen=True)
class Activations:
    """Bytes that a pass leaves for its backward pass."""

    one_layer: float
    kept_inputs: float
    """With checkpointing: every layer's input."""


def activation_bytes(config: AnyRunConfig, shape: Architecture) -> Activations:
    """One pass of the longest sequences (the counting of 2205.05198, section 4, for a gated MLP).

    A token leaves in each layer: for each of two norms its input in float32, what is normalised and what comes out;
    queries and the attention output, keys and values; 4 intermediate-wide (gate, up, activation, product). With LoRA
    the norms' weights need no gradient, hence not what is normalised; each of 7 adapters keeps its inner values. Eager
    attention keeps its scores (float32) and weights too. On a packed line raylhf's attention keeps its output once more
    on a CPU, and keys and values behind a shared prompt anywhere.
    """
    width, length, tokens = BYTES[config.model.dtype], longest_row(config), tokens_in_pass(config)
    attention = shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    if shares_prompts(config):
        attention += shape.head_dim * shape.heads * (config.learner.num_gpus == 0)
        attention += shape.head_dim * 2 * shape.kv_heads * (rows_per_prompt(config) > 1)
    lora = config.learner.lora
    norms = 4 * shape.hidden if lora is None else 2 * shape.hidden + 7 * lora.rank
    layer = 2 * 4 * shape.hidden + width * (norms + attention + 4 * shape.intermediate)
    if config.model.attention == "eager":
        layer += shape.heads * length * (4 + width)
    return Activations(float(tokens * layer), float(tokens * shape.layers * width * shape.hidden))


def _training_layers(config: AnyRunConfig, shape: Architecture) -> int:
    """Layers whose activations a backward pass needs."""
    objective = config.objective
    if isinstance(objective, RewardModelConfig) and objective.trainable_layers is not None:
        return min(shape.layers, max(1, objective.trainable_layers))
    return shape.layers


def _gathered_elements(model: Trained) -> float:
    """ZeRO-3's whole weights: the layer at work and the next, and all that is used again within REUSE_ELEMENTS, from
    the last forward layers to the first backward ones."""
    vocabulary = model.shape.embedding_parameters
    live = 2 * model.shape.layer_parameters + max(REUSE_ELEMENTS / 2, vocabulary)
    return min(live, model.parameters)


def _stepping(config: CommonConfig, model: Trained) -> dict[str, float]:
    """The optimizer step. Adam works in place; stages 1 to 3 make a flat float32 copy of this rank's gradients for it,
    and stages 1 and 2 have given up the gradients themselves by then."""
    learner = config.learner
    if learner.offload_optimizer or learner.zero_stage == 0:
        return _gradients(config, model)
    elements = model.trained / learner.num_ranks
    return {"flat gradients": 4.0 * (min(elements, SUBGROUP_ELEMENTS) if learner.zero_stage == 3 else elements)}


def _kept_always(config: CommonConfig, models: tuple[Trained, ...]) -> dict[str, float]:
    """On a CPU, what glibc cannot give back: holes in its heap and, under stage 3, the parts of the weights that were
    small blocks before they were made flat."""
    learner, kept = config.learner, HEAP_HOLES
    if learner.num_gpus > 0:
        return {}
    if learner.zero_stage == 3:
        kept += sum(BYTES[config.model.dtype] * model.parameters / learner.num_ranks for model in models)
    return {KEPT: kept}


def _kept_in_pass(config: AnyRunConfig, models: tuple[Trained, ...], model: Trained) -> dict[str, float]:
    """The same in a forward and backward pass of one of them."""
    always = _kept_always(config, models)
    if not always or config.learner.lora is None:
        return always
    made = _training_layers(config, model.shape) * activation_bytes(config, model.shape).one_layer
    return {KEPT: always[KEPT] + LORA_HOLES * made}


def _kept_after_passes(config: AnyRunConfig, models: tuple[Trained, ...]) -> dict[str, float]:
    """The same beside an optimizer step or a weight sync: what the passes have freed, which the next ones use again.
    Gradients are among it where they were added up over several passes, tensor by tensor."""
    always, learner = _kept_always(config, models), config.learner
    if not always:
        return {}
    sizes = [0.0]
    for model in models:
        items = _pass(config, model, is_training=True)
        size = _kept_in_pass(config, models, model)[KEPT] - always[KEPT]
        if BYTES[config.model.dtype] * tokens_in_pass(config) * model.shape.intermediate < HEAP_BLOCK_BYTES:
            size += items["activations"]
        if learner.zero_stage in (1, 2) and passes_per_minibatch(config) > 1:
            is_whole = model.trained == model.parameters
            large = model.shape.embedding_parameters if is_whole else 0  # a block that is given back
            size += _gradients(config, model)[model.prefix + "gradients"] * (1 - large / model.trained)
        sizes.append(size + items.get("gathered weights", 0.0))
    return {KEPT: always[KEPT] + max(sizes)}


def _sending(config: RunConfig, policy: Architecture) -> dict[str, float]:
    """Publishing the weights: one decoder layer (or vocabulary matrix) gathered and merged, and the buffers."""
    width, learner, transport = BYTES[config.model.dtype], config.learner, config.weight_transfer
    whole = float(width * policy.parameters)
    items = {"transfer buffers": min(SEND_BUCKET[transport], whole) if transport != "ipc" else whole}
    if learner.zero_stage == 3 or learner.lora is not None:
        items["gathered weights"] = width * max(policy.layer_parameters, policy.embedding_parameters)
    return items


def _loading(config: CommonConfig, models: tuple[Trained, ...], frozen: Mapping[str, float]) -> dict[str, float]:
    """Every rank reads every model whole into host memory first; under stage 3 it keeps its part as it reads."""
    width, learner = BYTES[config.model.dtype], config.learner
    share = learner.num_ranks if learner.zero_stage == 3 else 1
    return {"weights as read": float(width) * sum(model.parameters for model in models) / share + sum(frozen.values())}


def _phase(config: CommonConfig, name: str, items: Mapping[str, float], *, on_host: bool = False) -> Phase:
    """The items where they lie: `on_host` all in host memory, else what is offloaded (2101.06840)."""
    learner = config.learner
    if learner.num_gpus == 0:
        return Phase(name, host={**items, "runtime": RUNTIME["learner"]})
    offloaded = set(_offloaded(config))
    host = {item: size for item, size in items.items() if on_host or item.removeprefix(CRITIC) in offloaded}
    device = {item: size for item, size in items.items() if item not in host}
    return Phase(name, {**device, "runtime": RUNTIME["gpu"]}, {**host, "runtime": RUNTIME["learner"]})


def _offloaded(config: CommonConfig) -> Iterator[str]:
    """Items that the settings move to host memory."""
    if config.learner.offload_optimizer:
        yield from ("optimizer", "gradients")
    if config.learner.offload_params:
        yield from ("parameters", "reference", "guide")
