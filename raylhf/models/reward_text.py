"""From a prompt and a response to what a reward model reads, and back from its tokens to the response's characters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
_STAND_IN = "raylhf-stands-in-for-the-response"


@dataclass(frozen=True)
class EncodedText:
    """L tokens of a conversation."""

    ids: np.ndarray
    """Token ids, int64 [L]."""
    spans: np.ndarray
    """First character of the response in each token and the one after its last, int64 [L, 2]; (-1, -1) outside."""
    is_truncated: bool
    """Whether the conversation was longer than max_tokens."""
    is_response_cut: bool
    """Whether max_tokens cut tokens of the response, not of the prompt alone."""

    @property
    def in_response(self) -> np.ndarray:
        """Which tokens hold a part of the response, bool [L]."""
        return self.spans[:, 0] >= 0

    def tokens_at(self, ends: np.ndarray) -> np.ndarray:
        """Position of the token that completes the character before each of `ends` (positions in the response),
        int64 [n]; -1 where max_tokens cut it off."""
        starts = np.where(self.in_response, self.spans[:, 0], np.iinfo(np.int64).max)
        last_end = int(self.spans[:, 1].max(initial=-1))
        # White space that a tokenizer leaves out belongs to the token before it: the last one that starts earlier.
        found = [np.flatnonzero(starts < end) for end in ends]
        return np.array(
            [
                tokens[-1] if len(tokens) and (end <= last_end or not self.is_response_cut) else -1
                for tokens, end in zip(found, ends, strict=True)
            ],
            dtype=np.int64,
        )


def encode_judged(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, response: str, *, max_tokens: int
) -> EncodedText:
    """The prompt's turns and the response in the form that a reward model judges.

    With a chat template: the rendered conversation, the response as the assistant's turn. Without: an encoder reads
    the pair (prompt, response), another model prompt, blank line, response and end-of-sequence token. No messages:
    the response alone. Too long: the prompt's beginning is cut first, then the response's end. What stands between
    the last turn and the response (the assistant's header) stays, unless it takes more than half of max_tokens.

    Raises:
        ValueError: the tokenizer is not a fast one, or its chat template refuses the conversation.
    """
    backend = _backend(tokenizer)
    if tokenizer.chat_template is not None:
        framed = _framed(tokenizer, messages, response)
        if framed is not None:
            return _encode_framed(tokenizer, messages, *framed, max_tokens=max_tokens)
    prompt = "\n\n".join(message["content"] for message in messages)
    if tokenizer.cls_token is None or tokenizer.sep_token is None:
        before = prompt + "\n\n" if prompt else ""
        frame = (before, response, "", 0)
        return _encode_framed(tokenizer, messages, *frame, max_tokens=max_tokens, with_special_tokens=True)
    encoding = backend.encode(prompt, response) if prompt else backend.encode(response)
    sequence = np.array([-1 if s is None else s for s in encoding.sequence_ids])
    in_response = sequence == (1 if prompt else 0)
    return _cut(
        ids=np.array(encoding.ids, dtype=np.int64),
        spans=np.where(in_response[:, None], np.array(encoding.offsets, dtype=np.int64), -1),
        is_prompt=(sequence == 0) & ~in_response,
        max_tokens=max_tokens,
    )


def encode_prompt_alone(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, max_tokens: int) -> EncodedText:
    """The prompt's turns without a response, for a classifier of prompts. Too long: its beginning is cut."""
    backend = _backend(tokenizer)
    if tokenizer.chat_template is None:
        encoding = backend.encode("\n\n".join(message["content"] for message in messages))
    else:
        encoding = backend.encode(_render(tokenizer, messages), add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    is_prompt = np.array([s is not None for s in encoding.sequence_ids], dtype=bool)
    is_prompt[:1] &= ids[:1] != tokenizer.bos_token_id
    return _cut(ids=ids, spans=np.full((len(ids), 2), -1), is_prompt=is_prompt, max_tokens=max_tokens)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one without character offsets; give a model folder "
            "with a tokenizer.json"
        )
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 -- the base class does not declare it
    backend.no_truncation()  # tokenizer.json may ask for both (sentence-transformers' do)
    backend.no_padding()
    return backend


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
    except TemplateError as error:
        raise ValueError(f"the reward model's chat template refuses the conversation: {error}") from error


def _framed(tokenizer: PreTrainedTokenizerBase, messages: Messages, response: str) -> tuple[str, str, str, int] | None:
    """(text before, the response as rendered, text after, where that begins in `response`).

    A template may strip the response or leave out a part (thoughts): what it renders counts while it is one piece of
    the response, else the response as it is. None where the template wants a prompt and there is none.
    """
    try:
        stand_in = _render(tokenizer, [*messages, {"role": "assistant", "content": _STAND_IN}])
    except ValueError:
        if messages:
            raise
        return None
    before, _, after = stand_in.partition(_STAND_IN)
    rendered = _render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    if rendered.startswith(before) and rendered.endswith(after) and len(rendered) >= len(before) + len(after):
        middle = rendered[len(before) : len(rendered) - len(after)]
        if middle in response:
            return before, middle, after, response.rfind(middle)
    return before, response, after, 0


def _encode_framed(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    before: str,
    middle: str,
    after: str,
    shift: int,
    *,
    max_tokens: int,
    with_special_tokens: bool = False,
) -> EncodedText:
    """Tokens of before + middle + after; `shift` is the position of `middle` in the response."""
    encoding = _backend(tokenizer).encode(before + middle + after, add_special_tokens=with_special_tokens)
    ids = np.array(encoding.ids, dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    start, end = len(before), len(before) + len(middle)
    in_response = np.minimum(offsets[:, 1], end) > np.maximum(offsets[:, 0], start)
    spans = np.where(in_response[:, None], np.clip(offsets, start, end) - start + shift, -1)
    is_frame = np.array(encoding.special_tokens_mask, dtype=bool)
    is_prompt = ~in_response & (offsets[:, 0] < start) & ~is_frame
    is_prompt[:1] &= ids[:1] != tokenizer.bos_token_id
    is_header = is_prompt & (offsets[:, 0] >= _header_start(messages, before))
    if 2 * is_header.sum() <= max_tokens:  # else it would crowd out the response
        is_prompt &= ~is_header
    eos: Any = tokenizer.eos_token_id
    if with_special_tokens and eos is not None and (len(ids) == 0 or ids[-1] != eos):
        ids = np.append(ids, eos)
        spans = np.concatenate([spans, [[-1, -1]]])
        is_prompt = np.append(is_prompt, False)
    return _cut(ids=ids, spans=spans, is_prompt=is_prompt, max_tokens=max_tokens)


def _header_start(messages: Messages, before: str) -> int:
    """Where the last turn's content ends in `before`; the end of `before` where a template has rewritten it."""
    if not messages:
        return 0
    content = (messages[-1].get("content") or "").strip()  # templates strip contents
    start = before.rfind(content) if content else -1
    return len(before) if start < 0 else start + len(content)


def _cut(*, ids: np.ndarray, spans: np.ndarray, is_prompt: np.ndarray, max_tokens: int) -> EncodedText:
    """Drop the first prompt tokens, then the last response tokens, until max_tokens are left. The frame stays."""
    excess = max(len(ids) - max_tokens, 0)
    from_prompt = np.flatnonzero(is_prompt)[:excess]
    in_response = np.flatnonzero(spans[:, 0] >= 0)
    from_response = in_response[max(len(in_response) - (excess - len(from_prompt)), 0) :]
    kept = np.delete(np.arange(len(ids)), np.concatenate([from_prompt, from_response]))
    return EncodedText(
        ids=ids[kept],
        spans=spans[kept].astype(np.int64),
        is_truncated=excess > 0,
        is_response_cut=len(from_response) > 0,
    )
