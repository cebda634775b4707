"""The policy's weights, or its adapters alone, one decoder layer at a time, whatever the ZeRO stage."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylhf.learner.engine import full_shape, gathered
from raylhf.models.adapters import ADAPTER, lora_layers, merged_weight
from raylhf.models.load import weight_names, write_model_folder

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
        return _num_bytes(self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for names in by_decoder_layer(self._parameters):
                layers = {name: self._lora.get(name.rpartition(_BASE)[0]) for name in names}
                needed: list[nn.Parameter] = [self._parameters[name] for name in names]
                needed += [p for layer in layers.values() if layer is not None for p in _adapter_parameters(layer)]
                with gathered(needed):
                    for name in names:
                        weight, layer = self._parameters[name].detach(), layers[name]
                        if layer is not None and name.endswith(".weight"):
                            weight = merged_weight(layer, weight)
                        yield _checkpoint_name(name), weight


def published_weights(whole: PolicyWeights, lm: PreTrainedModel, *, folder: str) -> "PolicyWeights | AdapterWeights":
    """What rollout workers need that have loaded the model in `folder`: the adapters, or everything if there are none
    or the folder's files have other names for what they change."""
    adapters = AdapterWeights(lm)
    can_be_merged = adapters.changed and adapters.changed <= weight_names(folder)
    return adapters if can_be_merged else whole


class AdapterWeights:
    """The adapters alone, for a receiver that has the frozen weights: a stream like that of `PolicyWeights`.

    Each adapted layer gives `NAME.lora_A` [r, in], `NAME.lora_B` [out, r] and `NAME.lora_scaling` (a number).
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self._layers: dict[str, Any] = lora_layers(lm)

    @property
    def changed(self) -> set[str]:
        """Checkpoint names of the weights that the adapters change."""
        return {f"{name}.weight" for name in self._layers}

    def metadata(self) -> list[ParamMeta]:
        """What iterating yields, without gathering anything."""
        parts = [part for name in self._layers for part in self._parts(name)]
        return [ParamMeta(name, value.dtype, full_shape(value)) for name, value in parts]

    @property
    def num_bytes(self) -> int:
        """Bytes of one pass."""
        return _num_bytes(self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for names in by_decoder_layer(self._layers):
                parts = [part for name in names for part in self._parts(name)]
                with gathered([value for _, value in parts]):
                    for key, value in parts:
                        yield key, value.detach()

    def _parts(self, name: str) -> list[tuple[str, Any]]:
        layer = self._layers[name]
        scaling = torch.tensor(layer.scaling[ADAPTER], dtype=torch.float64)
        return [
            (f"{name}.lora_A", layer.lora_A[ADAPTER].weight),
            (f"{name}.lora_B", layer.lora_B[ADAPTER].weight),
            (f"{name}.lora_scaling", scaling),
        ]


def by_decoder_layer(names: Iterable[str]) -> list[list[str]]:
    """Names cut at each decoder layer, in order."""
    # model.layers.N
    return [list(group) for _, group in itertools.groupby(names, key=lambda name: name.split(".")[:3])]


def _num_bytes(metadata: Sequence[ParamMeta]) -> int:
    return sum(math.prod(m.shape) * m.dtype.itemsize for m in metadata)


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if "lora_" in name]


def _checkpoint_name(name: str) -> str:
    return name.replace(_BASE, ".")
