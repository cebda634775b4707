"""The models of one rank, and forward passes over micro-batches: policy, critic, frozen reference, guide."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylhf.config.objective import CriticConfig
from raylhf.config.run import CommonConfig
from raylhf.learner.engine import build_engine, build_frozen, engine_settings, partitioned_loading
from raylhf.learner.microbatch import Layout, MicroBatch, layout_of, make_micro_batch
from raylhf.models.adapters import adapters_off, add_lora
from raylhf.models.load import load_model_config
from raylhf.models.packing import not_packable, require_packable, sliding_window, use_segments
from raylhf.models.policy import PolicyModel, load_critic, load_policy


@dataclass(frozen=True)
class LearnerModels:
    """Engines and modules of one rank."""

    policy: Any
    """DeepSpeed engine over a PolicyModel."""
    critic: Any
    """DeepSpeed engine over a CriticModel; None where there is none or where it is a head on the policy's trunk."""
    reference: nn.Module | None
    """Frozen PolicyModel; None with LoRA, where the policy without its adapters is the reference, or where none is
    needed."""
    layout: Layout
    """Of the micro-batches that these models get."""
    guide: nn.Module | None = None
    """Frozen PolicyModel, whose log-ratio to the reference weights tokens (TGDPO)."""
    reference_moves: bool = False
    """Whether the reference follows the policy, and is a part of a checkpoint."""

    def policy_forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flat log-probabilities [N], entropies [N] and, with a shared trunk, values [N]."""
        return _forward(self.policy, batch, temperature)

    def policy_forward_past_engine(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Flat log-probabilities [N] and entropies [N] that may be differentiated by activations: DeepSpeed takes any
        gradient behind its own forward pass for the step's. Weights must be whole on every rank (below ZeRO-3)."""
        logprobs, entropies, _ = _forward(self.policy.module, batch, temperature)
        return logprobs, entropies

    def reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Flat log-probabilities [N] of the reference."""
        if self.reference is not None:
            return _forward(self.reference, batch, temperature)[0]
        with adapters_off(self.policy.module):
            return _forward(self.policy, batch, temperature)[0]

    def guide_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Flat log-probabilities [N] of the guide."""
        assert self.guide is not None
        return _forward(self.guide, batch, temperature)[0]

    def policy_forward_with_kl(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Flat log-probabilities [N], and the KL [N] from the reference to the policy over the whole vocabulary at
        each response position. Weights must be whole on every rank (below ZeRO-3)."""
        policy: PolicyModel = self.policy.module
        reference: Any = policy if self.reference is None else self.reference
        where = (batch.tokens, batch.lines, batch.positions, batch.position_ids, batch.segments)
        with torch.no_grad(), adapters_off(policy) if self.reference is None else nullcontext():
            ref_hidden = reference.hidden(*where)
        weight = reference.token_head.weight.detach()
        return policy.token_head.with_kl(policy.hidden(*where), batch.targets, temperature, ref_hidden, weight)

    @torch.no_grad()
    def move_reference(self, mix: float) -> None:
        """Put `mix` of the policy into the reference (2404.09656). Weights must be whole on every rank."""
        assert self.reference is not None
        policy = dict(self.policy.module.named_parameters())
        for name, parameter in self.reference.named_parameters():
            parameter.lerp_(policy[name].to(parameter.dtype), mix)

    def critic_forward(self, batch: MicroBatch) -> Tensor:
        """Flat values [N] of the critic with a trunk of its own."""
        return self.critic(batch.tokens, batch.lines, batch.positions, batch.position_ids, batch.segments)

    def end_values(self, batch: MicroBatch) -> Tensor:
        """The critic's value of the state after each row's last token, [B]: what a cut response would go on from."""
        if self.critic is not None:
            return self.critic(batch.tokens, batch.row_lines, batch.ends, batch.position_ids, batch.segments)
        no_targets = torch.zeros_like(batch.row_lines)  # the log-probabilities are not wanted here
        return _forward(self.policy, replace(batch, lines=batch.row_lines, positions=batch.ends, targets=no_targets))[2]


def _forward(model: Any, batch: MicroBatch, temperature: float = 1.0) -> Any:
    """What a PolicyModel, or the engine over one, returns."""
    inputs = (batch.tokens, batch.lines, batch.positions, batch.targets)
    return model(*inputs, temperature=temperature, position_ids=batch.position_ids, segments=batch.segments)


PACKING_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""Most that packing may change a row's mean log-probability (nats a token) or its score (of the largest), by dtype:
rounding is well below it, tokens that see another row are well above."""
NUM_TRIED = 8
"""Tokens at the end of each row that are compared."""


@dataclass(frozen=True)
class _TrialRows:
    """Two prompts with two responses each."""

    prompt_ids: list[np.ndarray]
    response_ids: list[np.ndarray]


@torch.no_grad()
def try_out(models: LearnerModels, dtype: str, device: torch.device, *, longest: int) -> None:
    """Compare the policy with itself on random tokens: twice, and packed with apart (collective). A row of the run has
    at most `longest` tokens, which matters to layers that look back so far only.

    Raises:
        ValueError: the model gives other numbers every time, or does not keep rows on a packed line apart.
    """
    config, layout = models.policy.module.lm.config, models.layout
    window = sliding_window(config)
    last = window + NUM_TRIED if window is not None and window < longest else NUM_TRIED
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, size) for size in (5, 9)]
    responses = [rng.integers(0, config.vocab_size, size) for size in (7, 3, 4, last)]
    rows = _TrialRows([prompts[i // 2] for i in range(4)], responses)

    def means(layout: Layout) -> Tensor:
        micro = make_micro_batch(rows, range(4), device, layout)
        logprobs = models.policy_forward(micro, 1.0)[0].split([len(ids) for ids in responses])
        return torch.stack([own[-NUM_TRIED:].mean() for own in logprobs])

    apart = replace(layout, is_packed=False)
    expected = means(apart)
    if not (error := (means(apart) - expected).abs().max().item()) <= PACKING_LIMIT[dtype]:
        raise ValueError(
            f"model {config.model_type!r}: the same tokens get log-probabilities that differ by {error:.2g} nats from "
            "one time to the next: it has dropout that raylhf does not find, or a kernel that is not deterministic"
        )
    if layout.is_packed:
        try:
            found = means(layout)
        except (TypeError, AttributeError, KeyError) as error:  # of code that does not know what it is given
            raise ValueError(not_packable(config, f"cannot be given a packed line ({error!r})")) from error
        require_packing((found - expected).abs().max().item(), dtype)


def require_packing(error: float, dtype: str) -> None:
    """Raises: ValueError: the model does not keep rows on a packed line apart."""
    limit = PACKING_LIMIT[dtype]
    if not error <= limit:
        raise ValueError(
            f"learner.packing: sequences that share a line get log-probabilities or scores that differ by {error:.2g} "
            f"from those that they get apart (limit {limit:g}): this model's attention does not keep packed sequences "
            "apart; set learner.packing: false"
        )


def build_models(
    config: CommonConfig,
    folder: str,
    device: torch.device,
    *,
    critic: CriticConfig | None = None,
    has_reference: bool = True,
    moves_reference: bool = False,
    has_guide: bool = False,
    second_folder: str = "",
    longest: int,
) -> LearnerModels:
    """Load and wrap what this rank trains or reads; `second_folder` holds the critic's start or the guide. No row will
    have more than `longest` tokens."""
    learner = config.learner
    shares_trunk = critic is not None and critic.trunk == "shared"
    architecture = load_model_config(folder, trust_remote_code=config.model.trust_remote_code)
    settings = engine_settings(learner, use_bf16=config.model.dtype == "bfloat16", hidden_size=architecture.hidden_size)
    layout = layout_of(learner, attention=config.model.attention)
    source = {
        "dtype": getattr(torch, config.model.dtype),
        "attention": config.model.attention,
        "trust_remote_code": config.model.trust_remote_code,
    }
    frozen = {**source, "logprob_chunk": learner.logprob_chunk, "with_value_head": False}
    with partitioned_loading(settings):
        policy = load_policy(folder, logprob_chunk=learner.logprob_chunk, with_value_head=shares_trunk, **source)
        own_critic = load_critic(second_folder, **source) if critic is not None and not shares_trunk else None
        reference = load_policy(folder, **frozen) if has_reference and learner.lora is None else None
        guide = load_policy(second_folder, **frozen) if has_guide else None
    if layout.is_packed:
        trunks = {"policy": policy.lm, "reference": reference and reference.lm, "guide": guide and guide.lm}
        trunks["critic"] = own_critic and own_critic.trunk
        _prepare_packing({name: trunk for name, trunk in trunks.items() if trunk is not None}, layout)
    _make_trainable(policy, policy.lm, config)
    critic_engine = None
    if own_critic is not None:
        _make_trainable(own_critic, own_critic.trunk, config)
        critic_engine = build_engine(own_critic.to(device), [_group(own_critic, ())], learner, settings)
    models = LearnerModels(
        policy=build_engine(policy.to(device), _policy_groups(policy), learner, settings),
        critic=critic_engine,
        reference=None if reference is None else build_frozen(reference.to(device), settings),
        layout=layout,
        guide=None if guide is None else build_frozen(guide.to(device), settings),
        reference_moves=moves_reference,
    )
    try_out(models, config.model.dtype, device, longest=longest)
    return models


def _prepare_packing(trunks: dict[str, Any], layout: Layout) -> None:
    """Have models attend by segments where the layout is of that kind.

    Raises:
        ValueError: one of them cannot, or is of another kind than the policy, on which alone packing is tried.
    """
    kind = trunks["policy"].config.model_type
    for name, trunk in trunks.items():
        require_packable(trunk.config)
        if trunk.config.model_type != kind:
            finding = f"is the {name}, and packing is tried on the policy alone, which is a {kind!r}"
            raise ValueError(not_packable(trunk.config, finding))
        if layout.knows_segments:
            use_segments(trunk)


def _make_trainable(module: nn.Module, trunk: Any, config: CommonConfig) -> None:
    module.train()  # dropout is off by construction; gradient checkpointing works in this mode only
    if (lora := config.learner.lora) is not None:
        trunk.requires_grad_(False)
        add_lora(trunk, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, seed=config.seed)
    if config.learner.gradient_checkpointing:
        enable_checkpointing(trunk)


def enable_checkpointing(trunk: Any) -> None:
    """Recompute activations in the backward pass, below frozen layers too."""
    trunk.enable_input_require_grads()
    trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _policy_groups(policy: PolicyModel) -> list[dict[str, Any]]:
    """The policy's weights, and the value head with a learning rate of its own."""
    if policy.value_head is None:
        return [_group(policy, ())]
    head = list(policy.value_head.parameters())
    return [_group(policy, head), {"params": head}]


def _group(module: nn.Module, without: Sequence[nn.Parameter]) -> dict[str, Any]:
    excluded = {id(p) for p in without}
    return {"params": [p for p in module.parameters() if p.requires_grad and id(p) not in excluded]}
