"""Sequences one after the other on one line, without padding: what attends to what, and the attention that does so.

A segment attends to itself, causally, and to all of its prefix, another segment of the line. Responses to one prompt
can thus follow a single copy of it, each as if it stood alone behind the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENT_ATTENTION = "raylhf_segments"
"""Name of the attention below among those of Transformers; it is `sdpa` where a batch is not packed."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_CHANGES_SCORES = ("s_aux", "position_bias", "softcap")
"""What some models give their attention beside queries, keys and values, and the one below does not know."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the line."""

    size: int
    """Tokens."""
    prefix: int | None = None
    """Number of the segment that it stands behind."""


class Segments:
    """The segments of a line of N tokens, in order and without gaps."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.each = tuple(segments)
        self.sizes = [s.size for s in self.each]
        num_keys = [s.size if s.prefix is None else self.sizes[s.prefix] + s.size for s in self.each]
        self.max_queries, self.max_keys = max(self.sizes), max(num_keys)
        self.query_ends = _ends(self.sizes, device)
        """Where each begins, and N: int32 [S + 1]."""
        self.key_ends = _ends(num_keys, device)
        """The same for the keys."""
        self.key_positions: Tensor | None = None
        """Positions of all keys, segment by segment; None where they are the line."""
        if num_keys != self.sizes:
            stretches = torch.arange(sum(self.sizes)).split(self.sizes)
            parts = [
                (() if s.prefix is None else (stretches[s.prefix],)) + (stretches[i],) for i, s in enumerate(self.each)
            ]
            self.key_positions = torch.cat([stretch for part in parts for stretch in part]).to(device)


@dataclass(frozen=True)
class PackedLine:
    """What a reward model needs beside the tokens [1, N] of rows on one line."""

    position_ids: Tensor
    """Position of each token in its row, [1, N] long."""
    segments: Segments | None
    """What attends to what; None where positions tell (flash attention)."""
    reads: Tensor
    """Where the scores stand: of each row, [B] long, or of each of its tokens, [B, L] long, any place after its end."""


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device=device, dtype=torch.int32)


def trunk_states(trunk: Any, position_ids: Tensor | None, segments: Segments | None, **inputs: Tensor) -> Tensor:
    """The last layer's states [B, L, D] of `input_ids` or `inputs_embeds`.

    position_ids [1, N] and segments are those of a packed line; with positions alone, Transformers keeps sequences
    apart where positions start again (flash attention). Without both, causal attention lets no token see the padding.
    """
    packed: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if segments is None:
        return trunk(use_cache=False, **inputs, **packed).last_hidden_state
    with _needs_no_mask():
        return trunk(use_cache=False, segments=segments, **inputs, **packed).last_hidden_state


def use_segments(model: PreTrainedModel) -> None:
    """Have a model that was loaded with sdpa (which Transformers refuses where it would be wrong) attend by segments.

    Raises:
        ValueError: its attention cannot be exchanged.
    """
    try:
        model.set_attn_implementation(SEGMENT_ATTENTION)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(not_packable(model.config, f"has an attention that cannot be exchanged ({error})")) from error


def not_packable(config: Any, finding: str) -> str:
    """A sentence with the remedy."""
    return f"learner.packing: the model {config.model_type!r} {finding}; set learner.packing: false"


def sliding_window(config: Any) -> int | None:
    """How many tokens back the layers look that do not look at all; None where all do."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def require_packable(config: Any) -> None:
    """Raises: ValueError: some layers attend in a way that segments do not know (chunked or linear attention)."""
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS):
        raise ValueError(
            not_packable(config, f"has layers of {', '.join(unknown)}, which raylhf cannot keep apart on a packed line")
        )


# --- the attention ----------------------------------------------------------------------------------------------------

_is_packed: ContextVar[bool] = ContextVar("is_packed", default=False)


@contextmanager
def _needs_no_mask() -> Iterator[None]:
    """Within it, no mask of N x N positions is made: the attention knows the segments."""
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _is_packed.get() else sdpa_mask(*args, **kwargs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention: query [B, H, L, D], key and value [B, H_kv, L, D] to [B, L, H, D].

    With `segments`, B is 1. On a GPU in half precision this is one call of PyTorch's variable-length flash attention,
    elsewhere one `scaled_dot_product_attention` for each segment.
    """
    if changes := sorted(name for name in _CHANGES_SCORES if settings.get(name) is not None):
        raise ValueError(not_packable(module.config, f"changes its attention's scores by {', '.join(changes)}"))
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    attend = _varlen if query.is_cuda and query.dtype != torch.float32 else _one_by_one
    return attend(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """[H, N, D] to [N, H, D]."""
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    if segments.key_positions is not None:
        key, value = key[segments.key_positions], value[segments.key_positions]
    attended = varlen_attn(
        query,
        key,
        value,
        segments.query_ends,
        segments.key_ends,
        segments.max_queries,
        segments.max_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)  # the log-sum-exp comes with it only where it is asked for
    return attended


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """[H, N, D] to [N, H, D]."""
    outputs = []
    # Split, not sliced: the gradient of each slice would be as large as the line.
    queries, all_keys, all_values = (states.split(segments.sizes, dim=1) for states in (query, key, value))
    for s, own, keys, values in zip(segments.each, queries, all_keys, all_values, strict=True):
        if s.prefix is not None:
            keys = torch.cat([all_keys[s.prefix], keys], dim=1)
            values = torch.cat([all_values[s.prefix], values], dim=1)
        mask = _band(s.size, keys.shape[1], window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                own[None],
                keys[None],
                values[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=len(query) != len(key),
            )[0]
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each of the last tokens attends to, bool [queries, keys]; None where that is plain causality."""
    if num_keys == num_queries and (window is None or window >= num_keys):
        return None
    behind = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
        num_keys, device=device
    )
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, _mask)
