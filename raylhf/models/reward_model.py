"""The module of a reward model: a Hugging Face model whose head scores a response (once, or by attribute or member of
an ensemble) or each token.

Home shapes: tokens [B, L], right-padded; lengths [B]; scores [B, H] (pooled) or [B, L] (token level).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from raylhf.models.adapters import one_adapter
from raylhf.models.calibration import Calibration
from raylhf.models.load import max_positions
from raylhf.models.packing import PackedLine, trunk_states

RewardKind = Literal["scalar", "token", "process", "multi_value", "ensemble"]
Aggregate = Literal["sum", "mean", "last", "steps"]
NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f")


class ScoreLayer(nn.Module):
    """The head's linear layer, in float32 whatever the model's type. It holds the parameters of `linear` themselves,
    so that they keep their names and ZeRO-3 gathers them here."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """Outputs [..., H] of states [..., D]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(states.float(), self.weight.float(), bias)


class RewardModel(nn.Module):
    """A Hugging Face classifier as a reward model. Decoders have a `score` layer over causal layers and are read at the
    last real token; encoders do their own pooling."""

    def __init__(
        self,
        hf: PreTrainedModel,
        *,
        kind: RewardKind,
        names: Sequence[str],
        separator_id: int | None = None,
        calibration: Calibration | None = None,
        aggregate: Aggregate = "mean",
    ) -> None:
        super().__init__()
        self.hf = hf
        self.kind: RewardKind = kind
        self.names = tuple(names)
        """Of the outputs: attributes, members, or `score`."""
        self.calibration = calibration
        self.aggregate: Aggregate = aggregate
        """How the scores of a token head were trained: as a sum, a mean, at the last token, at the ends of steps."""
        self.is_softmax = False
        """Whether the outputs are a classifier's logits, which mean something only against each other."""
        self.lora_members: tuple[str, ...] = ()
        """Adapters of an ensemble whose members have one each; member k reads output k."""
        self.frozen_depth = 0
        """Decoder layers at the bottom that nothing trains: `lower` computes them."""
        self.head_name = _head_name(hf)
        hf.set_submodule(self.head_name, ScoreLayer(hf.get_submodule(self.head_name)))  # type: ignore[arg-type]
        self._separator_id = separator_id

    @property
    def trunk(self) -> Any:
        """The model without its head."""
        return self.hf.base_model

    @property
    def is_token_level(self) -> bool:
        """Whether the model scores each token."""
        return self.kind in ("token", "process")

    @property
    def is_decoder(self) -> bool:
        """Whether no token sees what comes after it."""
        return self.head_name == "score"

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model can read, in tokens; None where it does not say."""
        return max_positions(self.hf.config)

    def forward(
        self,
        tokens: Tensor | None,
        lengths: Tensor,
        *,
        member: int | None = None,
        hidden: Tensor | None = None,
        packed: PackedLine | None = None,
    ) -> Tensor:
        """Scores, float32: [B, H] of a pooled head, [B, 1] of one member, [B, L] of a token-level head.

        `hidden` [B, L, D] is what `lower` gave, and then `tokens` is not read. With LoRA members, `member` None runs
        them all, one after the other. With `packed` (decoders only), tokens [1, N] or hidden [1, N, D] are those of a
        line.
        """
        if not self.lora_members:
            scores = self._scores(tokens, lengths, hidden, packed)
            return scores if member is None else scores[:, member : member + 1]
        if self.training and self.hf.is_gradient_checkpointing:
            raise ValueError(
                "learner.gradient_checkpointing recomputes layers when another LoRA member may be selected; switch it "
                "off, or use trunk: shared"
            )
        columns = []
        for k in range(len(self.lora_members)) if member is None else (member,):
            with one_adapter(self.hf, self.lora_members[k]):
                columns.append(self._scores(tokens, lengths, hidden, packed)[:, k : k + 1])
        return torch.cat(columns, dim=1)

    @torch.no_grad()
    def lower(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The states [B, L, D] that enter decoder layer `frozen_depth`; they stay the same throughout training."""
        caught: list[Tensor] = []
        norm = getattr(self.trunk, norm_name(self.trunk))
        handle = norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            with _layers(self.trunk, slice(0, self.frozen_depth)):
                self.trunk(input_ids=tokens, use_cache=False)
        finally:
            handle.remove()
        return caught[0]

    def _scores(
        self, tokens: Tensor | None, lengths: Tensor, hidden: Tensor | None, packed: PackedLine | None
    ) -> Tensor:
        if self.is_decoder:
            scores = self._decoder_scores(tokens, lengths, hidden, packed)
        else:
            scores = self._encoder_scores(tokens, lengths)
        if not self.is_token_level:
            return scores
        # Two outputs are those of a classifier into wrong and right: their difference is the log-odds of right.
        return scores[..., 0] if scores.shape[-1] == 1 else scores[..., 1] - scores[..., 0]

    def _decoder_scores(
        self, tokens: Tensor | None, lengths: Tensor, hidden: Tensor | None, packed: PackedLine | None
    ) -> Tensor:
        states = self._states(tokens, hidden, packed)
        if packed is not None:
            states = states[0][packed.reads]
        elif not self.is_token_level:
            states = states[torch.arange(len(lengths), device=states.device), lengths - 1]
        return self.hf.get_submodule(self.head_name)(states)

    def _encoder_scores(self, tokens: Tensor | None, lengths: Tensor) -> Tensor:
        assert tokens is not None, "an encoder has no frozen_depth, so it reads tokens"
        is_real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        inputs = {"attention_mask": is_real.long()}
        if self._separator_id is not None:
            is_separator = (tokens == self._separator_id).long()
            inputs["token_type_ids"] = (is_separator.cumsum(1) - is_separator).clamp(max=1)
        return self.hf(input_ids=tokens, **inputs).logits.float()

    def _states(self, tokens: Tensor | None, hidden: Tensor | None, packed: PackedLine | None) -> Tensor:
        """Last hidden states [B, L, D]. Causal attention lets no real token see the padding: no mask is needed."""
        layout = (None, None) if packed is None else (packed.position_ids, packed.segments)
        if hidden is None:
            assert tokens is not None
            return trunk_states(self.trunk, *layout, input_ids=tokens)
        with _layers(self.trunk, slice(self.frozen_depth, None)):
            first = self.trunk.layers[0] if len(self.trunk.layers) else getattr(self.trunk, norm_name(self.trunk))
            # Some models scale what they take for embeddings; the states enter behind that.
            handle = first.register_forward_pre_hook(lambda _, inputs: (hidden, *inputs[1:]))
            try:
                return trunk_states(self.trunk, *layout, inputs_embeds=hidden)
            finally:
                handle.remove()


def _head_name(hf: PreTrainedModel) -> str:
    """The last linear layer outside of the trunk with one output a label."""
    outside = [
        name
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == hf.config.num_labels
        and not name.startswith(f"{hf.base_model_prefix}.")
    ]
    if not outside:
        raise ValueError(f"raylhf finds no output layer in {type(hf).__name__}; use a model with a linear classifier")
    return outside[-1]


def norm_name(trunk: Any) -> str:
    """The attribute of the final norm; empty where none is found."""
    return next((name for name in NORMS if isinstance(getattr(trunk, name, None), nn.Module)), "")


@contextmanager
def _layers(trunk: Any, part: slice) -> Iterator[None]:
    """Within it, the trunk consists of a part of its layers."""
    everything = trunk.layers
    trunk.layers = everything[part]
    try:
        yield
    finally:
        trunk.layers = everything
