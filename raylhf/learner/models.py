"""The models of one rank, and forward passes over micro-batches: policy, critic, frozen reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylhf.config import RunConfig
from raylhf.learner.engine import build_engine, build_frozen, engine_settings, partitioned_loading
from raylhf.learner.microbatch import MicroBatch
from raylhf.models.adapters import adapters_off, add_lora
from raylhf.models.load import load_model_config
from raylhf.models.policy import PolicyModel, load_critic, load_policy


@dataclass(frozen=True)
class LearnerModels:
    """Engines and modules of one rank."""

    policy: Any
    """DeepSpeed engine over a PolicyModel."""
    critic: Any
    """DeepSpeed engine over a CriticModel; None where there is none or where it is a head on the policy's trunk."""
    reference: nn.Module | None
    """Frozen PolicyModel; None with LoRA, where the policy without its adapters is the reference."""

    def policy_forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flat log-probabilities [N], entropies [N] and, with a shared trunk, values [N]."""
        return self.policy(batch.tokens, batch.rows, batch.positions, batch.targets, temperature=temperature)

    def reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Flat log-probabilities [N] of the reference."""
        inputs = (batch.tokens, batch.rows, batch.positions, batch.targets)
        if self.reference is not None:
            return self.reference(*inputs, temperature=temperature)[0]
        with adapters_off(self.policy.module):
            return self.policy(*inputs, temperature=temperature)[0]

    def critic_forward(self, batch: MicroBatch) -> Tensor:
        """Flat values [N] of the critic with a trunk of its own."""
        return self.critic(batch.tokens, batch.rows, batch.positions)

    def end_values(self, batch: MicroBatch) -> Tensor:
        """The critic's value of the state after each row's last token, [B]: what a cut response would go on from."""
        rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
        if self.critic is not None:
            return self.critic(batch.tokens, rows, batch.ends)
        targets = torch.zeros_like(rows)  # the log-probabilities are not wanted here
        return self.policy(batch.tokens, rows, batch.ends, targets, temperature=1.0)[2]


def build_models(config: RunConfig, folder: str, critic_folder: str, device: torch.device) -> LearnerModels:
    """Load and wrap everything that this rank trains or reads."""
    objective, learner = config.objective, config.learner
    shares_trunk = config.has_critic and objective.critic.trunk == "shared"
    architecture = load_model_config(folder, trust_remote_code=config.model.trust_remote_code)
    settings = engine_settings(learner, use_bf16=config.model.dtype == "bfloat16", hidden_size=architecture.hidden_size)
    source = {
        "dtype": getattr(torch, config.model.dtype),
        "attention": config.model.attention,
        "trust_remote_code": config.model.trust_remote_code,
    }
    with partitioned_loading(settings):
        policy = load_policy(folder, logprob_chunk=learner.logprob_chunk, with_value_head=shares_trunk, **source)
        own_critic = load_critic(critic_folder, **source) if config.has_critic and not shares_trunk else None
        reference = None
        if learner.lora is None:
            reference = load_policy(folder, logprob_chunk=learner.logprob_chunk, with_value_head=False, **source)
    _make_trainable(policy, policy.lm, config)
    critic = None
    if own_critic is not None:
        _make_trainable(own_critic, own_critic.trunk, config)
        critic = build_engine(own_critic.to(device), [_group(own_critic, ())], learner, settings)
    return LearnerModels(
        policy=build_engine(policy.to(device), _policy_groups(policy), learner, settings),
        critic=critic,
        reference=None if reference is None else build_frozen(reference.to(device), settings),
    )


def _make_trainable(module: nn.Module, trunk: Any, config: RunConfig) -> None:
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
