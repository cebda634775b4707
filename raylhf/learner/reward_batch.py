"""Judged examples as tokens, and which of them a step, a rank and a micro-batch holds.

A draw is a pure function of the step, so a resumed run sees the data that it would have seen. The home shape is R rows:
the responses of the examples at hand, one after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylhf.batch import RewardExample
from raylhf.learner.microbatch import Layout, RowSizes, plan_micro_batches, sizes_of
from raylhf.models.reward_text import encode_judged


@dataclass(frozen=True)
class Row:
    """One response of an example behind its prompt, as tokens."""

    ids: np.ndarray
    """Token ids, int64 [L]."""
    response_mask: np.ndarray
    """Tokens that hold a part of the response's text, bool [L]: never empty, the last token stands in for no text."""
    step_tokens: np.ndarray
    """The token that holds the last character of each step, int64 [n]; -1 where the text was cut before it."""
    is_truncated: bool
    """Whether prompt or response were cut to data.max_tokens."""
    is_response_cut: bool
    """Whether the response itself lost tokens."""
    num_shared: int = 0
    """Tokens at the beginning that all rows of the example share; each has at least one more of its own."""

    @cached_property
    def key(self) -> bytes:
        """Equal for equal tokens."""
        return self.ids.tobytes()


@dataclass(frozen=True)
class JudgedRows:
    """Rows as what their example shares, and what follows."""

    rows: Sequence[Row]

    @property
    def prompt_ids(self) -> list[np.ndarray]:
        """The shared beginnings; they may be empty."""
        return [row.ids[: row.num_shared] for row in self.rows]

    @property
    def response_ids(self) -> list[np.ndarray]:
        """The rest of each row."""
        return [row.ids[row.num_shared :] for row in self.rows]

    @cached_property
    def sizes(self) -> RowSizes:
        """Tokens of the two."""
        return sizes_of(self)


@dataclass(frozen=True)
class EncodedExample:
    """A judged prompt and its responses as rows."""

    example: RewardExample
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class RowBatch:
    """R rows of whole examples, with what a loss needs to find its scores among them."""

    examples: tuple[EncodedExample, ...]
    device: torch.device

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in the order of the scores."""
        return tuple(row for encoded in self.examples for row in encoded.rows)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each example."""
        return np.cumsum([0, *(len(encoded.rows) for encoded in self.examples)]).tolist()[:-1]

    def response_mask(self, width: int) -> Tensor:
        """Response tokens, bool [R, width]."""
        mask = np.zeros((len(self.rows), width), dtype=bool)
        for i, row in enumerate(self.rows):
            mask[i, : len(row.response_mask)] = row.response_mask
        return torch.from_numpy(mask).to(self.device)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: RewardExample, *, max_tokens: int) -> EncodedExample:
    """Every response of `example` as a row."""
    rows = []
    for i, response in enumerate(example.responses):
        encoded = encode_judged(tokenizer, example.messages, response, max_tokens=max_tokens)
        response_mask = encoded.in_response.copy()
        if not response_mask.any():
            response_mask[-1] = True
        ends = example.step_ends[i] if example.step_ends else np.zeros(0, dtype=np.int64)
        rows.append(
            Row(
                ids=encoded.ids,
                response_mask=response_mask,
                step_tokens=encoded.tokens_at(ends),
                is_truncated=encoded.is_truncated,
                is_response_cut=encoded.is_response_cut,
            )
        )
    shared = _num_shared([row.ids for row in rows])
    return EncodedExample(example=example, rows=tuple(replace(row, num_shared=shared) for row in rows))


def _num_shared(ids: Sequence[np.ndarray]) -> int:
    """Tokens with which all begin, but for the last of each."""
    width = min(len(row) for row in ids) - 1
    stacked = np.stack([row[:width] for row in ids])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else width


def cut_counts(rows: Sequence[Row]) -> dict[str, float]:
    """What data.max_tokens took from `rows`, by the end of the metric's key."""
    return {
        "truncated_count": float(sum(row.is_truncated for row in rows)),
        "response_cut_count": float(sum(row.is_response_cut for row in rows)),
        "steps_lost_count": float(sum((row.step_tokens < 0).sum() for row in rows)),
    }


def pad_rows_of_tokens(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [R, L] and lengths [R], long; what stands after a row's end is never read."""
    lengths = [len(row.ids) for row in rows]
    tokens = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = row.ids
    return torch.from_numpy(tokens).to(device), torch.tensor(lengths, device=device)


# --- which examples ---------------------------------------------------------------------------------------------------


def draw(step: int, *, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """Positions of the examples of a step (from 0): epochs in a new order each, no example left out of any."""
    epoch, place = divmod(step, math.ceil(num_examples / batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    return order[place * batch_size :][:batch_size].tolist()


def deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions for each rank, so that the largest sum of costs is near the least possible; a rank may get none."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return [sorted(share) for share in shares]


def pack_examples(examples: Sequence[EncodedExample], layout: Layout) -> list[tuple[EncodedExample, ...]]:
    """Whole examples in micro-batches, neighbours in length together so that little is padded.

    An example with more rows than fit has a micro-batch to itself.
    """
    packs: list[list[EncodedExample]] = []
    for encoded in sorted(examples, key=lambda e: (e.longest, e.example.index)):
        if not packs or not fits([*packs[-1], encoded], layout):
            packs.append([])
        packs[-1].append(encoded)
    return [tuple(pack) for pack in packs]


def fits(examples: Sequence[EncodedExample], layout: Layout) -> bool:
    """Whether the rows of `examples` go into one micro-batch."""
    rows = JudgedRows([row for encoded in examples for row in encoded.rows])
    return layout.fits(rows.sizes, range(len(rows.rows)))


def pack_rows(rows: Sequence[Row], layout: Layout) -> list[list[int]]:
    """Positions of rows in micro-batches."""
    return plan_micro_batches(JudgedRows(rows).sizes, range(len(rows)), layout)
