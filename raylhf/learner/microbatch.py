"""Padding and packing, which exist only here: ragged rows become one micro-batch, and come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raylhf.batch import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """B rows on right-padded lines, and their N response positions as flat indexes. A line holds one row or, packed,
    several, one after the other."""

    tokens: Tensor
    """Prompts and responses, [lines, L] long; what stands after a line's end is never read."""
    position_ids: Tensor | None
    """Position of each token in its row, [lines, L] long, by which attention keeps packed rows apart; None where every
    line is one row."""
    lines: Tensor
    """Line of each response token, [N] long."""
    positions: Tensor
    """Position on the line of the state before each response token, [N] long."""
    rows: Tensor
    """Row of each response token, [N] long."""
    targets: Tensor
    """The response tokens, [N] long."""
    steps: Tensor
    """Index of each response token in its response, [N] long."""
    row_lines: Tensor
    """Line of each row, [B] long."""
    ends: Tensor
    """Position on its line of each row's last token, [B] long."""
    source_rows: Tensor
    """Which of the learner's rows each row is, [B] long."""

    def scatter(self, flat: Tensor, width: int) -> Tensor:
        """Values [N] as [B, width] by row and step, 0 where there is no response token. Differentiable."""
        padded = flat.new_zeros(len(self.source_rows), width)
        return padded.index_put((self.rows, self.steps), flat)


class TokenRows(Protocol):
    """Anything with R prompts and R responses as tokens."""

    @property
    def prompt_ids(self) -> Sequence[np.ndarray]: ...

    @property
    def response_ids(self) -> Sequence[np.ndarray]: ...


@dataclass(frozen=True)
class Packing:
    """How rows share lines."""

    line_tokens: int
    """Most tokens of a line: what a micro-batch holds is counted in such lines."""
    one_line: bool = False
    """Lay out a micro-batch's lines one after the other, as one: what flash attention takes for packed."""


def make_micro_batch(
    rollouts: TokenRows, rows: Sequence[int], device: torch.device, *, packing: Packing | None = None
) -> MicroBatch:
    """Lay out the given rows of `rollouts`, whose responses must not be empty (see `without_empty`): each on a line of
    its own or, with `packing`, several on a line."""
    sequences = [np.concatenate([rollouts.prompt_ids[i], rollouts.response_ids[i]]) for i in rows]
    sizes = [len(sequence) for sequence in sequences]
    if packing is None:
        lines = [[i] for i in range(len(rows))]
    else:
        lines = [list(range(len(rows)))] if packing.one_line else pack_lines(sizes, packing.line_tokens)
    width = max(sum(sizes[i] for i in line) for line in lines)
    tokens, position_ids = np.zeros((2, len(lines), width), dtype=np.int64)
    row_lines, row_starts = np.zeros((2, len(rows)), dtype=np.int64)
    for number, line in enumerate(lines):
        start = 0
        for i in line:
            row_lines[i], row_starts[i] = number, start
            tokens[number, start : start + sizes[i]] = sequences[i]
            position_ids[number, start:] = np.arange(width - start)  # what pads the line goes on with the last row
            start += sizes[i]
    lengths = [len(rollouts.response_ids[i]) for i in rows]
    befores = row_starts + [len(rollouts.prompt_ids[i]) - 1 for i in rows]
    steps = np.concatenate([np.arange(length) for length in lengths])

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        tokens=on_device(tokens),
        position_ids=on_device(position_ids) if len(lines) < len(rows) else None,
        lines=on_device(np.repeat(row_lines, lengths)),
        positions=on_device(np.repeat(befores, lengths) + steps),
        rows=on_device(np.repeat(np.arange(len(rows)), lengths)),
        targets=on_device(np.concatenate([rollouts.response_ids[i] for i in rows])),
        steps=on_device(steps),
        row_lines=on_device(row_lines),
        ends=on_device(row_starts + sizes - 1),
        source_rows=torch.tensor(list(rows), dtype=torch.long, device=device),
    )


def pack_lines(sizes: Sequence[int], line_tokens: int) -> list[list[int]]:
    """Which rows stand on which line, by first fit, the longest first. A row above `line_tokens` has one to itself."""
    lines: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found = next((number for number, left in enumerate(room) if left >= sizes[i]), None)
        if found is None:
            found = len(lines)
            lines.append([])
            room.append(line_tokens)
        lines[found].append(i)
        room[found] -= sizes[i]
    return lines


def plan_micro_batches(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut `rows` into micro-batches of at most `size`, neighbours in length together so that little is padded.

    The number of micro-batches depends only on the number of rows, so ranks with equally many rows run equally many
    collectives.
    """
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def without_empty(rollouts: Rollouts) -> Rollouts:
    """Give each zero-length response one placeholder token, which no mask ever selects.

    The row then takes part in every forward pass: ranks keep equal numbers of collectives although it counts nothing.
    """
    if all(len(ids) for ids in rollouts.response_ids):
        return rollouts
    token, logprob = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    return Rollouts(
        prompts=rollouts.prompts,
        prompt_ids=rollouts.prompt_ids,
        response_ids=[ids if len(ids) else token for ids in rollouts.response_ids],
        rollout_logprobs=[values if len(values) else logprob for values in rollouts.rollout_logprobs],
        response_texts=rollouts.response_texts,
        finish_reasons=rollouts.finish_reasons,
        policy_versions=[versions if len(versions) else token for versions in rollouts.policy_versions],
        temperature=rollouts.temperature,
    )


def pad_rows(rows: Sequence[np.ndarray], width: int, device: torch.device) -> Tensor:
    """Ragged rows as float32 [R, width], 0 after each row's end."""
    padded = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded).to(device)
