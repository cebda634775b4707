"""Token scores of a reward model on the policy's tokens, where the two tokenizers differ: by character offsets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, so tokens that it can be split over."""


def token_ends(tokenizer: Any, response_ids: Sequence[int] | np.ndarray, text: str) -> np.ndarray:
    """How many characters of `text` are complete after each sampled token, int64 [T], never falling.

    `text` is the decoded response without special tokens. The bytes of a split character belong to the token that
    completes it; what no token completes (a response that was cut inside a character) belongs to the last one.
    `tokenizer` is the policy's (a fast one).
    """
    ids = [int(i) for i in response_ids]
    ends = _streamed_ends(tokenizer, ids, text)
    if ends is None:
        ends = _prefix_ends(tokenizer, ids, text)
    if len(ends):
        ends[-1] = len(text)
    return ends


def lay_out_scores(scores: np.ndarray, spans: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Scores of M reward-model tokens on the policy's T tokens, float32 [T]; their sum stays.

    Each score goes to the policy token that completes the last character of its span (`spans` int64 [M, 2], as in
    EncodedText; `ends` int64 [T], as `token_ends` gives them); a score outside the response goes to the last token.
    """
    totals = np.zeros(len(ends), dtype=np.float64)
    if len(ends) == 0:
        return totals.astype(np.float32)
    last = len(ends) - 1
    positions = np.minimum(np.searchsorted(ends, spans[:, 1], side="left"), last)
    np.add.at(totals, np.where(spans[:, 0] < 0, last, positions), np.asarray(scores, dtype=np.float64))
    return totals.astype(np.float32)


def _streamed_ends(tokenizer: Any, ids: Sequence[int], text: str) -> np.ndarray | None:
    """In one pass over the tokens; None where the pieces are not `text` (a tokenizer that tidies white space)."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    ends: list[int] = []
    joined, pending = "", []
    for i in ids:
        piece = stream.step(tokenizer.backend_tokenizer, i) or ""
        joined, pending = joined + piece, [] if piece else [*pending[-_LONGEST_CHARACTER:], i]
        # A token may hold a whole character and the first bytes of the next one, at which the stream waits.
        held = _common_length(_decode(tokenizer, pending), text[len(joined) :]) if pending else 0
        ends.append(min(len(joined) + held, len(text)))
    if joined[: len(text)] != text[: len(joined)]:
        return None
    return np.maximum.accumulate(np.array(ends, dtype=np.int64))


def _prefix_ends(tokenizer: Any, ids: Sequence[int], text: str) -> np.ndarray:
    """By decoding every prefix: as many characters are complete as it has in common with `text`."""
    decoded = (_decode(tokenizer, ids[: t + 1]) for t in range(len(ids)))
    return np.maximum.accumulate(np.array([_common_length(prefix, text) for prefix in decoded], dtype=np.int64))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids` without an unfinished character at its end, for which decoders write U+FFFD."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def _common_length(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)
