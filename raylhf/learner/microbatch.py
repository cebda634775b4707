"""Padding, which exists only here: ragged rows become one right-padded micro-batch, and come back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylhf.batch import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """B right-padded rows, and the N response positions in them as flat indexes."""

    tokens: Tensor
    """Prompt and response, [B, L] long; what stands after a row's end is never read."""
    rows: Tensor
    """Row of each response token, [N] long."""
    positions: Tensor
    """Position in the row of the state before each response token, [N] long."""
    targets: Tensor
    """The response tokens, [N] long."""
    steps: Tensor
    """Index of each response token in its response, [N] long."""
    ends: Tensor
    """Position of each row's last token, [B] long."""
    source_rows: Tensor
    """Which of the learner's rows each row is, [B] long."""

    def scatter(self, flat: Tensor, width: int) -> Tensor:
        """Values [N] as [B, width] by row and step, 0 where there is no response token. Differentiable."""
        padded = flat.new_zeros(len(self.tokens), width)
        return padded.index_put((self.rows, self.steps), flat)


def make_micro_batch(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """Pad the given rows of `rollouts`, whose responses must not be empty (see `without_empty`)."""
    sequences = [np.concatenate([rollouts.prompt_ids[i], rollouts.response_ids[i]]) for i in rows]
    width = max(len(sequence) for sequence in sequences)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    lengths = [len(rollouts.response_ids[i]) for i in rows]
    starts = [len(rollouts.prompt_ids[i]) - 1 for i in rows]
    steps = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(
        tokens=torch.from_numpy(tokens).to(device),
        rows=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)).to(device),
        positions=torch.from_numpy(np.repeat(starts, lengths) + steps).to(device),
        targets=torch.from_numpy(np.concatenate([rollouts.response_ids[i] for i in rows])).to(device),
        steps=torch.from_numpy(steps).to(device),
        ends=torch.tensor([len(sequence) - 1 for sequence in sequences], device=device),
        source_rows=torch.tensor(list(rows), dtype=torch.long, device=device),
    )


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
        policy_versions=rollouts.policy_versions,
        temperature=rollouts.temperature,
    )


def pad_rows(rows: Sequence[np.ndarray], width: int, device: torch.device) -> Tensor:
    """Ragged rows as float32 [R, width], 0 after each row's end."""
    padded = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded).to(device)
