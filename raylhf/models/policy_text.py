"""From a prompt and given responses to what a policy learns from: the tokens that it would have sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raylhf.models.chat import encode_prompt


@dataclass(frozen=True)
class EncodedResponse:
    """A prompt and a response to it."""

    prompt_ids: np.ndarray
    """Token ids with the chat template's generation prompt, int64 [P], P at least 1."""
    response_ids: np.ndarray
    """Token ids of the response, with the end-of-sequence token unless it was cut, int64 [T], T at least 1."""
    is_truncated: bool
    """Whether prompt or response lost tokens to max_tokens."""
    is_response_cut: bool
    """Whether the response itself did; it does not end then."""


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    responses: Sequence[str],
    *,
    max_tokens: int,
    prefix: str = "",
    ends: Sequence[bool] | None = None,
) -> list[EncodedResponse]:
    """The prompt's turns and responses to it as tokens.

    All stand behind one prompt, as what compares them supposes. Where the longest is too long, the prompt's beginning
    is cut first, to one token at least; then the end of every response that is still too long. `prefix` is a beginning
    of the assistant's turn that is not learnt from; `ends` says of each response whether the turn ends after it (by
    default it does). A response is tokenized by itself, as a policy samples it after the prompt's last token.
    """
    start: Any = _end(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompt_ids = encode_prompt(tokenizer, messages) if messages else [start]
    prompt_ids = [*prompt_ids, *(_encode(tokenizer, prefix) if prefix else [])] or [start]
    all_ids = [_encode(tokenizer, response) for response in responses]
    for ids, is_end in zip(all_ids, ends or [True] * len(all_ids), strict=True):
        if is_end or not ids:
            ids.append(_end(tokenizer))
    excess = max(len(prompt_ids) + max(map(len, all_ids)) - max_tokens, 0)
    kept = np.array(prompt_ids[min(excess, len(prompt_ids) - 1) :], dtype=np.int64)
    room = max_tokens - len(kept)
    return [
        EncodedResponse(
            prompt_ids=kept,
            response_ids=np.array(ids[:room], dtype=np.int64),
            is_truncated=excess > 0,
            is_response_cut=len(ids) > room,
        )
        for ids in all_ids
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the model's tokenizer has no end-of-sequence token, so a response could never end; add one")
    return int(end)
