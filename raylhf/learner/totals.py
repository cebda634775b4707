"""Sums and maxima that become metrics: gathered locally, reduced over ranks once, then divided."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(values)
    return values


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest `count` of all ranks (a collective)."""
    most = torch.tensor(float(count), dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


class Totals:
    """Named sums and maxima of one rank. Every rank must add the same names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add to sums."""
        self._fold(self._sums, values, torch.add)

    def raise_to(self, **values: Tensor | float) -> None:
        """Raise maxima."""
        self._fold(self._maxima, values, torch.maximum)

    def _fold(
        self, into: dict[str, Tensor], values: Mapping[str, Tensor | float], fold: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        for name, value in values.items():
            new = torch.as_tensor(value, dtype=torch.float64, device=self._device).detach()
            into[name] = fold(into[name], new) if name in into else new

    def reduced(self) -> dict[str, float]:
        """Global sums and maxima by name, equal on every rank (two collectives)."""
        result: dict[str, float] = {}
        for table, operation in ((self._sums, dist.ReduceOp.SUM), (self._maxima, dist.ReduceOp.MAX)):
            if not table:
                continue
            names = sorted(table)
            stacked = torch.stack([table[name] for name in names])
            dist.all_reduce(stacked, op=operation)
            result |= dict(zip(names, stacked.tolist(), strict=True))
        return result

    def local(self) -> dict[str, float]:
        """This rank's own sums and maxima."""
        return {name: value.item() for table in (self._sums, self._maxima) for name, value in table.items()}
