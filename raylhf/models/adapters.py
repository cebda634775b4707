"""LoRA adapters inside a language model (PEFT): adding them, switching them off, merging them into full weights."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from raylhf.models.low_rank import with_update

ADAPTER = "raylhf"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    target_modules: tuple[str, ...] | str,
    seed: int,
    adapters: Sequence[str] = (ADAPTER,),
    without: Sequence[str] = (),
) -> None:
    """Freeze `model` and put trainable adapters into its linear layers (not into the output layer, nor those in
    `without`). Several adapters are all active; `one_adapter` selects among them.

    The adapters' start is drawn by `seed`; as B is zero, the model's outputs are unchanged at first.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        torch.manual_seed(seed)
        for adapter in adapters:
            settings = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=targets,
                exclude_modules=list(without) or None,
                lora_dropout=0.0,
                bias="none",
            )
            model.add_adapter(settings, adapter_name=adapter)
    if len(adapters) > 1:
        model.set_adapter(list(adapters))
    if transposed := [name for name, layer in lora_layers(model).items() if getattr(layer, "fan_in_fan_out", False)]:
        raise ValueError(f"learner.lora: {transposed[0]} stores its weight transposed, which merging does not support")


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within it, the module computes what it computed before it had adapters: the frozen reference.

    Scales go to 0 instead of PEFT's `disable_adapters`, which flips requires_grad and so cuts DeepSpeed's hooks off.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


@contextmanager
def one_adapter(module: nn.Module, adapter: str) -> Iterator[None]:
    """Within it, of the module's adapters only `adapter` counts; by scales, as in `adapters_off`."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        for name in layer.scaling:
            layer.set_scale(name, float(name == adapter))
    try:
        yield
    finally:
        for layer in layers:
            for name in layer.scaling:
                layer.set_scale(name, 1.0)


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def merged_weight(layer: Any, base: Tensor) -> Tensor:
    """`base` plus the update of `layer` (a LoraLayer)."""
    low_a, low_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return with_update(base, low_a, low_b, scaling=layer.scaling[ADAPTER])


def merged_state(module: nn.Module, state: Mapping[str, Tensor], *, adapter: str) -> dict[str, Tensor]:
    """The full weights that `module` would have without adapters, had it learnt what `adapter` adds.

    `state` is full weights by the module's own parameter names (adapters included). Added in float32.
    """
    merged = {}
    for name, tensor in state.items():
        layer_name, is_base, kind = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if is_base and kind == "weight":
            layer: Any = module.get_submodule(layer_name)
            low_a, low_b = (state[f"{layer_name}.lora_{side}.{adapter}.weight"] for side in "AB")
            tensor = with_update(tensor, low_a, low_b, scaling=layer.scaling[adapter])
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged
