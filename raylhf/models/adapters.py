"""LoRA adapters inside a language model (PEFT): adding them, switching them off, merging them into full weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTER = "raylhf"


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: int, target_modules: tuple[str, ...] | str, seed: int
) -> None:
    """Freeze `model` and put a trainable adapter into its linear layers (not into the output layer).

    The adapters' start is drawn by `seed`; as B is zero, the model's outputs are unchanged at first.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(settings, adapter_name=ADAPTER)
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


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def merged_weight(layer: Any, base: Tensor) -> Tensor:
    """`base` plus the update of `layer` (a LoraLayer), added in float32: bfloat16 would round small updates away."""
    update = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    return (base.float() + layer.scaling[ADAPTER] * update).to(base.dtype)
