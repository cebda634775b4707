"""Adapters that arrive alone, added to the frozen weights that the receiver has.

A stream of adapters gives, for each adapted layer, `NAME.lora_A`, `NAME.lora_B` and `NAME.lora_scaling`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raylhf.models.low_rank import with_update

_A, _B, _SCALING = ".lora_A", ".lora_B", ".lora_scaling"


def is_adapter_stream(names: Sequence[str]) -> bool:
    """Whether what is announced is adapters instead of weights."""
    return bool(names) and all(name.endswith((_A, _B, _SCALING)) for name in names)


def with_adapters(
    frozen: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every frozen weight; those that have an adapter in `dtype`, with its update.

    Raises:
        ValueError: an adapter has no weight that it belongs to.
    """
    waiting = {name.removesuffix(_A) for name in adapters if name.endswith(_A)}
    for name, weight in frozen:
        layer = name.removesuffix(".weight")
        if layer in waiting:
            waiting.discard(layer)
            low_a, low_b = adapters[layer + _A], adapters[layer + _B]
            weight = with_update(weight.to(dtype), low_a, low_b, scaling=adapters[layer + _SCALING].item())
        yield name, weight
    if waiting:
        raise ValueError(f"the model folder has no weights of {sorted(waiting)}, which the learner's adapters change")
