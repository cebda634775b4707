"""Forward passes of a reward model over rows, with its frozen lower part computed once a row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from raylhf.config.run import RewardModelRunConfig
from raylhf.learner.microbatch import Layout, Placed, layout_of, place_rows, segments_of
from raylhf.learner.reward_batch import JudgedRows, Row, pad_rows_of_tokens
from raylhf.models.packing import PackedLine
from raylhf.models.reward_model import RewardModel

CACHE_LIMIT_BYTES = 4 * 2**30
"""Host memory of one rank above which what frozen layers or models make of the data is computed again each time."""


def layout_of_rows(config: RewardModelRunConfig, model: RewardModel) -> Layout:
    """Of micro-batches; an encoder's rows have lines of their own."""
    layout = layout_of(config.learner, attention=config.model.attention)
    return layout if model.is_decoder else replace(layout, is_packed=False)


class RowScorer:
    """The engine's scores of rows.

    Where the lower layers do not learn, what they make of a row stays in host memory and later passes start above them.
    Not under ZeRO-3, whose partitioned layers are gathered by the engine's own forward pass alone.
    """

    def __init__(self, engine: Any, layout: Layout, *, device: torch.device, num_tokens: int, zero_stage: int) -> None:
        """`num_tokens` is how many tokens all rows of the run have."""
        model: RewardModel = engine.module
        hidden_bytes = num_tokens * model.hf.config.hidden_size * model.hf.dtype.itemsize
        self.layout = layout
        """Of the micro-batches that are asked for."""
        self._keeps_hidden = model.frozen_depth > 0 and zero_stage < 3 and hidden_bytes <= CACHE_LIMIT_BYTES
        self._engine = engine
        self._device = device
        self._hidden: dict[bytes, Tensor] = {}

    def __call__(self, rows: Sequence[Row], *, member: int | None = None) -> Tensor:
        """fp32 scores [R, H] or, of a token head, [R, L]. Differentiable unless under no_grad."""
        return (self._packed if self.layout.is_packed else self._apart)(rows, member)

    @torch.no_grad()
    def packing_error(self, rows: Sequence[Row]) -> float:
        """The most that packing changes a score of `rows`, as a share of the largest (collective)."""
        lengths = torch.tensor([len(row.ids) for row in rows], device=self._device)
        found, expected = self._packed(rows, None), self._apart(rows, None)
        if self._engine.module.is_token_level:
            is_token = torch.arange(found.shape[1], device=self._device) < lengths[:, None]
            found, expected = (torch.where(is_token, scores, 0.0) for scores in (found, expected))
        return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()

    def _apart(self, rows: Sequence[Row], member: int | None) -> Tensor:
        tokens, lengths = pad_rows_of_tokens(rows, self._device)
        hidden = None
        if self._keeps_hidden:
            hidden = pad_sequence(self._lower(rows), batch_first=True).to(self._device)
        return self._engine(tokens, lengths, member=member, hidden=hidden)

    def _packed(self, rows: Sequence[Row], member: int | None) -> Tensor:
        judged = JudgedRows(rows)
        placed = place_rows(judged.prompt_ids, judged.response_ids, self.layout)
        positions = [_positions(placed, row, i) for i, row in enumerate(rows)]
        lengths = torch.tensor([len(row.ids) for row in rows], device=self._device)
        if self._engine.module.is_token_level:
            reads = pad_sequence([torch.from_numpy(own) for own in positions], batch_first=True)
        else:
            reads = torch.tensor([own[-1] for own in positions])
        assert placed.position_ids is not None
        line = PackedLine(
            position_ids=torch.from_numpy(placed.position_ids).to(self._device),
            segments=segments_of(placed, self.layout, self._device),
            reads=reads.to(self._device),
        )
        hidden = None
        if self._keeps_hidden:
            own = self._lower(rows)
            hidden = own[0].new_empty(1, placed.tokens.shape[1], own[0].shape[1])
            for where, states in zip(positions, own, strict=True):
                hidden[0, where] = states
            hidden = hidden.to(self._device)
        tokens = torch.from_numpy(placed.tokens).to(self._device)
        return self._engine(tokens, lengths, member=member, hidden=hidden, packed=line)

    @torch.no_grad()
    def _lower(self, rows: Sequence[Row]) -> list[Tensor]:
        """Hidden states [L, D] of each row below the first layer that learns, in host memory.

        Each row is computed by itself: in a batch, its last bits would depend on the company that it happened to be in
        when it was first needed, and a resumed run would not repeat them.
        """
        for row in rows:
            if row.key not in self._hidden:
                tokens, lengths = pad_rows_of_tokens([row], self._device)
                self._hidden[row.key] = self._engine.module.lower(tokens, lengths)[0].to("cpu", copy=True)
        return [self._hidden[row.key] for row in rows]


def _positions(placed: Placed, row: Row, i: int) -> np.ndarray:
    """Where the tokens of row `i` stand on the line."""
    shared, rest = np.arange(row.num_shared), np.arange(len(row.ids) - row.num_shared)
    return np.concatenate([placed.prompt_starts[i] + shared, placed.response_starts[i] + rest])
