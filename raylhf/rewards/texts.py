"""Texts from outside of a run, in the record that rewards score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raylhf.batch import Prompt, Rollouts

CHARACTERS_PER_TOKEN = 4
"""Of English under usual tokenizers, roughly."""
MAX_NUM_TOKENS = 10_000_000
"""A response that says it has more is refused where it is read."""


@dataclass(frozen=True)
class TextSample:
    """One response to be scored."""

    messages: tuple[Mapping[str, str], ...]
    """The prompt's chat turns, each {role, content}; the last one is the user's."""
    response: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further fields, for rewards that read them."""
    is_truncated: bool = False
    """Whether the response was cut at a length limit."""
    num_tokens: int | None = None
    """Tokens of the response, at most MAX_NUM_TOKENS, for rewards that count them; None where nobody knows."""


def rollouts_of_texts(rows: Sequence[TextSample]) -> Rollouts:
    """Rollouts with the rows' texts and placeholders for what only a policy knows. A prompt's index is its position.

    Token ids are zeros, without memory of their own: a caller says how many there are. A response without a known
    length has one, so that it does not count as empty; prompts have about as many as prompt and response together
    would have, so that batches by tokens keep their size.
    """
    lengths = [1 if row.num_tokens is None else row.num_tokens for row in rows]
    characters = [sum(len(turn["content"]) for turn in row.messages) + len(row.response) for row in rows]
    return Rollouts(
        prompts=[Prompt(index=i, messages=row.messages, metadata=row.metadata) for i, row in enumerate(rows)],
        prompt_ids=[np.broadcast_to(np.int64(0), 1 + count // CHARACTERS_PER_TOKEN) for count in characters],
        response_ids=[np.broadcast_to(np.int64(0), length) for length in lengths],
        rollout_logprobs=[np.broadcast_to(np.float32(0), length) for length in lengths],
        response_texts=[row.response for row in rows],
        finish_reasons=["length" if row.is_truncated else "stop" for row in rows],
        policy_versions=[np.broadcast_to(np.int64(0), length) for length in lengths],
        temperature=1.0,
    )
