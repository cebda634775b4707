"""Responses with comparisons between them, as tokens, and how they are cut into micro-batches.

The home shape is R rows (responses of whole groups, one group after the other) and N pairs that point at rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from raylhf.algos.preference import Pairs
from raylhf.learner.microbatch import RowSizes, sizes_of


@dataclass(frozen=True)
class PreferenceBatch:
    """One rank's share of an optimizer step."""

    prompt_ids: Sequence[np.ndarray]
    """Token ids of each row's prompt, int64 [P_i]."""
    response_ids: Sequence[np.ndarray]
    """Token ids of each row's response, int64 [T_i], T_i at least 1."""
    group_starts: np.ndarray
    """First row of each of G groups, and R at the end, int64 [G + 1]."""
    chosen: np.ndarray
    """Row of each pair's better response, int64 [N]."""
    rejected: np.ndarray
    """Row of the other one, int64 [N]."""
    weights: np.ndarray
    """Of each pair in the loss, float64 [N]."""
    spans: np.ndarray
    """First token of each response that counts and the one after the last, int64 [R, 2]."""
    ranks: np.ndarray
    """Place of each row in its group, 1 is best, infinity below all places, NaN where not ranked, float64 [R]."""
    is_good: np.ndarray
    """1 for a good response, 0 for a bad one, NaN where it is not judged by itself, float64 [R]."""
    keys: np.ndarray
    """What each pair is known by in every epoch, int64 [N]."""
    smoothing: np.ndarray
    """Probability that the pair's label is wrong, NaN where the data does not say, float64 [N]."""
    reward_gaps: np.ndarray
    """Gap in the other rewards, weighted already, float64 [N]."""
    temperature: float = 1.0
    better_prompt_ids: Sequence[np.ndarray] | None = None
    """Prompts that ask for a better answer (T-REG)."""
    worse_prompt_ids: Sequence[np.ndarray] | None = None
    """Prompts that ask for a worse answer."""

    def __len__(self) -> int:
        return len(self.response_ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, int64 [R]."""
        return np.array([len(ids) for ids in self.response_ids], dtype=np.int64)

    @cached_property
    def row_sizes(self) -> RowSizes:
        """Tokens of each prompt and response."""
        return sizes_of(self)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each prompt and response together, [R]."""
        return self.row_sizes.total

    @property
    def width(self) -> int:
        """Tokens of the longest response."""
        return int(self.lengths.max(initial=1))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each group."""
        return tuple(tuple(range(start, end)) for start, end in pairwise(self.group_starts.tolist()))

    def mask(self, device: torch.device) -> Tensor:
        """Tokens that count, bool [R, width]."""
        places = np.arange(self.width)
        mask = (places >= self.spans[:, :1]) & (places < self.spans[:, 1:])
        return torch.from_numpy(mask).to(device)

    def with_prompts(self, prompt_ids: Sequence[np.ndarray]) -> "PreferenceBatch":
        """The same responses behind other prompts."""
        return replace(self, prompt_ids=prompt_ids)

    @property
    def group_prompts(self) -> list[np.ndarray]:
        """The prompt of each group."""
        return [self.prompt_ids[start] for start in self.group_starts[:-1]]

    def mismatched(self, prompts: Sequence[np.ndarray], *, max_tokens: int | None) -> "PreferenceBatch":
        """Every response behind the prompt that follows its own in `prompts`, which holds those of the batch; that
        prompt's beginning is cut where both are more than `max_tokens`."""
        follows = dict(zip((ids.tobytes() for ids in prompts), [*prompts[1:], *prompts[:1]], strict=True))
        donors = [follows[ids.tobytes()] for ids in self.group_prompts]
        stand_ins = [donors[g] for g, rows in enumerate(self.groups) for _ in rows]
        if max_tokens is not None:
            rooms = np.maximum(max_tokens - self.lengths, 1).tolist()
            stand_ins = [ids[-room:] for ids, room in zip(stand_ins, rooms, strict=True)]
        return self.with_prompts(stand_ins)


@dataclass(frozen=True)
class Part:
    """Rows, and pairs or groups among them, that one micro-batch holds."""

    rows: tuple[int, ...]
    pairs: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    """Positions in `rows`, one tuple a group."""

    def local_pairs(self, batch: PreferenceBatch, device: torch.device) -> Pairs:
        """The pairs as positions in `rows`."""
        place = {row: i for i, row in enumerate(self.rows)}
        chosen, rejected = (
            torch.tensor([place[side[n]] for n in self.pairs], dtype=torch.long, device=device)
            for side in (batch.chosen, batch.rejected)
        )
        return Pairs(chosen, rejected)


Fits = Callable[[Collection[int]], bool]
"""Whether rows go into one micro-batch. What cannot be cut has one to itself, fit or not."""


def parts_of_rows(batch: PreferenceBatch, fits: Fits) -> list[Part]:
    """Every row by itself, neighbours in length together."""
    parts: list[list[int]] = []
    for row in sorted(range(len(batch)), key=lambda row: (batch.sizes[row], row)):
        if not parts or not fits([*parts[-1], row]):
            parts.append([])
        parts[-1].append(row)
    return [Part(tuple(rows)) for rows in parts]


def parts_of_pairs(batch: PreferenceBatch, fits: Fits, *, may_share: bool) -> list[Part]:
    """Pairs with their rows. Pairs of a group share rows where `may_share`.

    A group whose pairs use more rows than fit is cut, and some of its rows stand in several parts.
    """
    units: list[tuple[list[int], list[int]]] = []
    for group in batch.groups:
        inside = np.flatnonzero((batch.chosen >= group[0]) & (batch.chosen <= group[-1])).tolist()
        unit: tuple[list[int], list[int]] | None = None
        for pair in inside:
            rows = [int(batch.chosen[pair]), int(batch.rejected[pair])]
            if unit is None or not may_share or not fits({*unit[0], *rows}):
                unit = ([], [])
                units.append(unit)
            unit[0].extend(row for row in rows if row not in unit[0])
            unit[1].append(pair)
    units.sort(key=lambda unit: (max(batch.sizes[row] for row in unit[0]), unit[1][0]))
    parts: list[tuple[list[int], list[int]]] = []
    for rows, pairs in units:
        overlaps = bool(parts) and not set(parts[-1][0]).isdisjoint(rows)
        if not parts or overlaps or not fits([*parts[-1][0], *rows]):
            parts.append(([], []))
        parts[-1][0].extend(rows)
        parts[-1][1].extend(pairs)
    return [Part(tuple(rows), tuple(pairs)) for rows, pairs in parts]


def parts_of_groups(batch: PreferenceBatch, fits: Fits) -> list[Part]:
    """Whole groups."""
    parts: list[list[tuple[int, ...]]] = []
    for rows in sorted(batch.groups, key=lambda rows: (max(batch.sizes[row] for row in rows), rows[0])):
        if not parts or not fits([row for group in (*parts[-1], rows) for row in group]):
            parts.append([])
        parts[-1].append(rows)
    return [_grouped(part) for part in parts]


def _grouped(groups: Sequence[tuple[int, ...]]) -> Part:
    starts = np.cumsum([0, *map(len, groups)])
    places = tuple(tuple(range(a, b)) for a, b in pairwise(starts.tolist()))
    return Part(tuple(row for rows in groups for row in rows), groups=places)
