"""Padding and packing, which exist only here: ragged rows become one micro-batch, and come back."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raylhf.batch import Rollouts
from raylhf.config.learner import LearnerConfig
from raylhf.models.packing import Segment, Segments


@dataclass(frozen=True)
class MicroBatch:
    """B rows, and their N response positions as flat indexes: each row on a right-padded line of its own, or all on one
    line, packed."""

    tokens: Tensor
    """Prompts and responses, [lines, L] long; what stands after a row's end on a line of its own is never read."""
    position_ids: Tensor | None
    """Position of each token in its row, [1, L] long; None where every row has a line."""
    segments: Segments | None
    """What attends to what on a packed line; None where every row has a line, or positions tell (flash attention)."""
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
class Layout:
    """How rows share a micro-batch."""

    max_tokens: int
    """Most positions of a micro-batch; a row that has more is alone in its own."""
    is_packed: bool = True
    """Rows stand one after the other on one line; otherwise each has a line, padded to the longest."""
    shares_prompts: bool = True
    """On a packed line, responses to one prompt follow a single copy of it."""

    @property
    def knows_segments(self) -> bool:
        """Whether raylhf's own attention keeps rows on a packed line apart."""
        return self.is_packed and self.shares_prompts

    def num_positions(self, sizes: "RowSizes", rows: Collection[int]) -> int:
        """Positions that `rows` take together, padding included."""
        if not self.is_packed:
            return len(rows) * max(sizes.total[row] for row in rows)
        if not self.shares_prompts:
            return sum(sizes.total[row] for row in rows)
        prompts = {sizes.prompt_number[row]: sizes.prompt[row] for row in rows}
        return sum(prompts.values()) + sum(sizes.response[row] for row in rows)

    def fits(self, sizes: "RowSizes", rows: Collection[int]) -> bool:
        """Whether `rows` go into one micro-batch."""
        return len(rows) < 2 or self.num_positions(sizes, rows) <= self.max_tokens


def layout_of(learner: LearnerConfig, *, attention: str) -> Layout:
    """What the settings ask for. Eager attention would hold scores between all tokens of a packed line."""
    is_packed = learner.packing and attention != "eager"
    return Layout(learner.micro_batch_tokens, is_packed, shares_prompts=attention == "sdpa")


@dataclass(frozen=True)
class RowSizes:
    """Tokens of rows, and which of them have one prompt."""

    prompt: Sequence[int]
    response: Sequence[int]
    prompt_number: Sequence[int]
    """Equal for rows with equal prompts."""

    @cached_property
    def total(self) -> list[int]:
        """Prompt and response together."""
        return [p + r for p, r in zip(self.prompt, self.response, strict=True)]


def sizes_of(rows: TokenRows) -> RowSizes:
    """The sizes of all rows."""
    numbers: dict[bytes, int] = {}
    return RowSizes(
        prompt=[len(ids) for ids in rows.prompt_ids],
        response=[len(ids) for ids in rows.response_ids],
        prompt_number=[numbers.setdefault(ids.tobytes(), len(numbers)) for ids in rows.prompt_ids],
    )


# --- which rows -------------------------------------------------------------------------------------------------------


def plan_micro_batches(sizes: RowSizes, rows: Sequence[int], layout: Layout) -> list[list[int]]:
    """Cut `rows` into few micro-batches under the layout's budget.

    Packed: first fit of whole groups of one prompt, the largest first. On lines of their own: neighbours in length
    together, so that little is padded.
    """
    if not layout.is_packed:
        return in_order(sizes, sorted(rows, key=lambda row: (sizes.total[row], row)), layout)
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(sizes.prompt_number[row] if layout.shares_prompts else row, []).append(row)
    units = [unit for group in groups.values() for unit in in_order(sizes, group, layout)]
    units.sort(key=lambda unit: (-layout.num_positions(sizes, unit), unit[0]))
    parts: list[list[int]] = []
    loads: list[int] = []
    for unit in units:
        size = layout.num_positions(sizes, unit)
        found = next((number for number, load in enumerate(loads) if load + size <= layout.max_tokens), len(parts))
        if found == len(parts):
            parts.append([])
            loads.append(0)
        parts[found].extend(unit)
        loads[found] += size
    return parts


def in_order(sizes: RowSizes, rows: Sequence[int], layout: Layout) -> list[list[int]]:
    """`rows` in their order, as many together as fit."""
    parts: list[list[int]] = []
    for row in rows:
        if not parts or not layout.fits(sizes, [*parts[-1], row]):
            parts.append([])
        parts[-1].append(row)
    return parts


def cut_further(parts: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` parts out of fewer, or as many as there are rows: those with most rows are halved."""
    result = [list(part) for part in parts]
    while len(result) < count and (longest := max(result, key=len, default=[])) and len(longest) > 1:
        place = result.index(longest)
        half = len(longest) // 2
        result[place : place + 1] = [longest[:half], longest[half:]]
    return result


# --- one micro-batch --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """Rows on lines, and where they are."""

    tokens: np.ndarray
    """[lines, L]."""
    lines: np.ndarray
    """Line of each row, [B]."""
    prompt_starts: np.ndarray
    """Position of each row's first prompt token, [B]."""
    response_starts: np.ndarray
    """Position of each row's first response token, [B]."""
    position_ids: np.ndarray | None = None
    segments: Sequence[Segment] = ()


def _apart(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> Placed:
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    tokens = np.zeros((len(sizes), max(sizes)), dtype=np.int64)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[i, : sizes[i]] = np.concatenate([prompt, response])
    starts = np.zeros(len(sizes), dtype=np.int64)
    return Placed(tokens, np.arange(len(sizes)), starts, starts + [len(prompt) for prompt in prompts])


def _packed(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, shares_prompts: bool) -> Placed:
    groups: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.tobytes() if shares_prompts and len(prompt) else i, []).append(i)
    pieces, position_ids, segments = [], [], []
    prompt_starts, response_starts = np.zeros((2, len(prompts)), dtype=np.int64)
    end = 0
    for group in groups.values():
        prompt = prompts[group[0]]
        start, end = end, end + len(prompt)
        pieces.append(prompt)
        position_ids.append(np.arange(len(prompt)))
        prefix = len(segments)
        if len(group) > 1:
            segments.append(Segment(len(prompt)))
        for i in group:
            prompt_starts[i], response_starts[i] = start, end
            pieces.append(responses[i])
            position_ids.append(np.arange(len(prompt), len(prompt) + len(responses[i])))
            end += len(responses[i])
            is_alone = len(group) == 1
            segments.append(Segment(end - start) if is_alone else Segment(len(responses[i]), prefix))
    return Placed(
        np.concatenate(pieces)[None],
        np.zeros(len(prompts), dtype=np.int64),
        prompt_starts,
        response_starts,
        position_ids=np.concatenate(position_ids)[None],
        segments=segments,
    )


def place_rows(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], layout: Layout) -> Placed:
    """Put rows on lines."""
    if layout.is_packed:
        return _packed(prompts, responses, shares_prompts=layout.shares_prompts)
    return _apart(prompts, responses)


def segments_of(placed: Placed, layout: Layout, device: torch.device) -> Segments | None:
    """Those of a packed line, for the attention that knows them."""
    return Segments(placed.segments, device) if layout.knows_segments else None


def make_micro_batch(rows: TokenRows, chosen: Sequence[int], device: torch.device, layout: Layout) -> MicroBatch:
    """Lay out the `chosen` ones of `rows`, whose prompts and responses must not be empty (see `without_empty`)."""
    prompts, responses = [rows.prompt_ids[i] for i in chosen], [rows.response_ids[i] for i in chosen]
    placed = place_rows(prompts, responses, layout)
    lengths = [len(response) for response in responses]
    steps = np.concatenate([np.arange(length) for length in lengths])
    prompt_ends = placed.prompt_starts + [len(prompt) - 1 for prompt in prompts]
    # Before a response's first token is the prompt's last, wherever that stands.
    befores = np.where(
        steps == 0, np.repeat(prompt_ends, lengths), np.repeat(placed.response_starts, lengths) + steps - 1
    )

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        tokens=on_device(placed.tokens),
        position_ids=None if placed.position_ids is None else on_device(placed.position_ids),
        segments=segments_of(placed, layout, device),
        lines=on_device(np.repeat(placed.lines, lengths)),
        positions=on_device(befores),
        rows=on_device(np.repeat(np.arange(len(chosen)), lengths)),
        targets=on_device(np.concatenate(responses)),
        steps=on_device(steps),
        row_lines=on_device(placed.lines),
        ends=on_device(placed.response_starts + lengths - 1),
        source_rows=torch.tensor(list(chosen), dtype=torch.long, device=device),
    )


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
