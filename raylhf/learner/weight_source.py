"""The policy's full weights under their checkpoint names, one decoder layer at a time, whatever the ZeRO stage."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylhf.learner.engine import full_shape, gathered
from raylhf.models.adapters import lora_layers, merged_weight
from raylhf.models.load import write_model_folder

_BASE = ".base_layer."


@dataclass(frozen=True)
class ParamMeta:
    """Name, type and full shape of one weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """A re-iterable stream of (name, full tensor), adapters merged. Every rank iterates, in lockstep.

    Has the shape of vLLM's `WeightSource`. A yielded tensor is valid until the next one is asked for.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm
        self._lora = lora_layers(lm)
        # named_parameters lists tied weights once, as checkpoints do.
        self._parameters = {name: p for name, p in lm.named_parameters() if ".lora_" not in name}

    def export(self, folder: str, tokenizer: PreTrainedTokenizerBase, *, writes: bool) -> None:
        """Write an ordinary Hugging Face folder: one rank `writes`, all gather and wait."""
        state = {name: weight.to("cpu", copy=True) for name, weight in self if writes}
        if writes:
            write_model_folder(folder, self._lm, state, tokenizer)
        dist.barrier()

    def metadata(self) -> list[ParamMeta]:
        """What iterating yields, without gathering anything."""
        return [ParamMeta(_checkpoint_name(name), p.dtype, full_shape(p)) for name, p in self._parameters.items()]

    @property
    def num_bytes(self) -> int:
        """Bytes of one pass."""
        return sum(math.prod(m.shape) * m.dtype.itemsize for m in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for names in self._layers():
                layers = {name: self._lora.get(name.rpartition(_BASE)[0]) for name in names}
                needed: list[nn.Parameter] = [self._parameters[name] for name in names]
                needed += [p for layer in layers.values() if layer is not None for p in _adapter_parameters(layer)]
                with gathered(needed):
                    for name in names:
                        weight, layer = self._parameters[name].detach(), layers[name]
                        if layer is not None and name.endswith(".weight"):
                            weight = merged_weight(layer, weight)
                        yield _checkpoint_name(name), weight

    def _layers(self) -> list[list[str]]:
        """Names cut at each decoder layer, in order."""
        groups: list[list[str]] = []
        previous: str | None = None
        for name in self._parameters:
            key = ".".join(name.split(".")[:3])  # model.layers.N
            if key != previous:
                groups.append([])
                previous = key
            groups[-1].append(name)
        return groups


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if "lora_" in name]


def _checkpoint_name(name: str) -> str:
    return name.replace(_BASE, ".")
