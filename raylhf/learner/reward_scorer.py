"""Forward passes of a reward model over rows, with its frozen lower part computed once a row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from raylhf.learner.reward_batch import Row, pad_rows_of_tokens
from raylhf.models.reward_model import RewardModel

CACHE_LIMIT_BYTES = 4 * 2**30
"""Host memory of one rank above which frozen layers are computed again at each forward pass."""


class RowScorer:
    """The engine's scores of rows.

    Where the lower layers do not learn, what they make of a row stays in host memory and later passes start above them.
    Not under ZeRO-3, whose partitioned layers are gathered by the engine's own forward pass alone.
    """

    def __init__(self, engine: Any, *, device: torch.device, num_tokens: int, zero_stage: int) -> None:
        """`num_tokens` is how many tokens all rows of the run have."""
        model: RewardModel = engine.module
        hidden_bytes = num_tokens * model.hf.config.hidden_size * model.hf.dtype.itemsize
        self._keeps_hidden = model.frozen_depth > 0 and zero_stage < 3 and hidden_bytes <= CACHE_LIMIT_BYTES
        self._engine = engine
        self._device = device
        self._hidden: dict[bytes, Tensor] = {}

    def __call__(self, rows: Sequence[Row], *, member: int | None = None) -> Tensor:
        """fp32 scores [R, H] or, of a token head, [R, L]. Differentiable unless under no_grad."""
        tokens, lengths = pad_rows_of_tokens(rows, self._device)
        hidden = self._lower(rows) if self._keeps_hidden else None
        return self._engine(tokens, lengths, member=member, hidden=hidden)

    @torch.no_grad()
    def _lower(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [R, L, D] below the first layer that learns.

        Each row is computed by itself: in a batch, its last bits would depend on the company that it happened to be in
        when it was first needed, and a resumed run would not repeat them.
        """
        for row in rows:
            if row.key not in self._hidden:
                tokens, lengths = pad_rows_of_tokens([row], self._device)
                self._hidden[row.key] = self._engine.module.lower(tokens, lengths)[0].to("cpu", copy=True)
        return pad_sequence([self._hidden[row.key] for row in rows], batch_first=True).to(self._device)
