"""The trained modules: a policy that returns log-probabilities of given tokens, and a critic.

Only response positions reach the output layers: no logits and no values are spent on prompts and padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from raylhf.algos.logprobs import logprobs_and_entropy_from_hidden, logprobs_and_kl_from_hidden
from raylhf.models.load import load_causal_lm, load_model_config, load_weights, without_dropout
from raylhf.models.packing import Segments, trunk_states

_LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class TokenHead(nn.Module):
    """The language model's output layer, in chunks. It holds the weight itself, so that ZeRO-3 gathers it once a call
    however many chunks there are: a count that differs between ranks must not be a count of collectives."""

    def __init__(self, weight: nn.Parameter, *, chunk_size: int) -> None:
        super().__init__()
        self.weight = weight
        self.chunk_size = chunk_size

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N] of `targets` [N] and entropies [N] after hidden states [N, D]."""
        return logprobs_and_entropy_from_hidden(
            hidden, self.weight, targets, temperature=temperature, chunk_size=self.chunk_size
        )

    def with_kl(
        self, hidden: Tensor, targets: Tensor, temperature: float, ref_hidden: Tensor, ref_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N], and KL(reference || policy) [N] with the reference's states [N, D] and layer."""
        return logprobs_and_kl_from_hidden(
            hidden, self.weight, targets, ref_hidden, ref_weight, temperature=temperature, chunk_size=self.chunk_size
        )


class ValueHead(nn.Module):
    """A linear value of each hidden state; starts at zero, so that the first advantages are the returns."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [N] of hidden states [N, D]."""
        return self.linear(hidden).squeeze(-1).float()


class PolicyModel(nn.Module):
    """A causal language model that scores given response tokens; with a value head on its trunk if asked for."""

    def __init__(self, lm: PreTrainedModel, *, logprob_chunk: int, with_value_head: bool) -> None:
        super().__init__()
        _refuse_changed_logits(lm)
        self.lm = lm
        output_layer: Any = lm.get_output_embeddings()
        self.token_head = TokenHead(output_layer.weight, chunk_size=logprob_chunk)
        self.value_head = ValueHead(lm.config.hidden_size, lm.dtype) if with_value_head else None

    def forward(
        self,
        tokens: Tensor,
        lines: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities [N], entropies [N] and values [N] (None without a value head).

        tokens [B, L] are right-padded: under causal attention no real token sees the padding, so no attention mask is
        needed. (lines[n], positions[n]) is the state before response token targets[n]. `position_ids` and `segments`
        are those of a packed line (see `trunk_states`).
        """
        hidden = self.hidden(tokens, lines, positions, position_ids, segments)
        logprobs, entropies = self.token_head(hidden, targets, temperature)
        # The value gradient stops here: the trunk belongs to the policy.
        values = None if self.value_head is None else self.value_head(hidden.detach())
        return logprobs, entropies, values

    def hidden(
        self,
        tokens: Tensor,
        lines: Tensor,
        positions: Tensor,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The states [N, D] at (lines[n], positions[n]) of tokens [B, L]."""
        return trunk_states(self.lm.base_model, position_ids, segments, input_ids=tokens)[lines, positions]

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Of the top transformer layer.

        Raises:
            ValueError: the architecture does not say which it is.
        """
        layers = getattr(self.lm.base_model, "layers", None)
        if layers is None:
            raise ValueError(f"objective.loss aux_dpo: raylhf finds no layers in {type(self.lm).__name__}; use another")
        return list(layers[-1].parameters())


class CriticModel(nn.Module):
    """A trunk of its own with a value head."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_head = head

    def forward(
        self,
        tokens: Tensor,
        lines: Tensor,
        positions: Tensor,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Values [N] of the states (lines[n], positions[n]) of tokens [B, L], as in PolicyModel."""
        return self.value_head(trunk_states(self.trunk, position_ids, segments, input_ids=tokens)[lines, positions])


def load_policy(
    folder: str,
    *,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool,
    logprob_chunk: int,
    with_value_head: bool,
) -> PolicyModel:
    """The policy (or, without a value head, the reference)."""
    lm = load_causal_lm(folder, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
    return PolicyModel(lm, logprob_chunk=logprob_chunk, with_value_head=with_value_head)


def load_critic(folder: str, *, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> CriticModel:
    """A critic from a language model (value head at zero) or from a reward model with one output (head taken over)."""
    settings = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": trust_remote_code}
    config = load_model_config(folder, trust_remote_code=trust_remote_code)
    is_reward_model = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if not is_reward_model:
        trunk = load_weights(AutoModel.from_pretrained, folder, **settings)
        return CriticModel(without_dropout(trunk), ValueHead(config.hidden_size, dtype))
    model = load_weights(AutoModelForSequenceClassification.from_pretrained, folder, **settings)
    if model.config.num_labels != 1:
        raise ValueError(
            f"objective.critic.path {folder!r} has {model.config.num_labels} outputs; a critic starts from a reward "
            "model with one"
        )
    head = ValueHead(config.hidden_size, dtype)
    with torch.no_grad():
        head.linear.weight.copy_(model.score.weight)
        if model.score.bias is not None:
            head.linear.bias.copy_(model.score.bias)
    return CriticModel(without_dropout(model.base_model), head)


def _refuse_changed_logits(lm: PreTrainedModel) -> None:
    """Models that scale, cap or shift their logits after the output layer would get wrong log-probabilities here."""
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(lm.config, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(f"model {lm.config.model_type!r} sets {name} = {value}, which raylhf does not support yet")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"model {lm.config.model_type!r} has a bias in its output layer, which is not supported yet")
