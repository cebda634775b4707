"""How the policy (and critic) are trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from raylhf.config.base import Settings
from raylhf.config.cluster import PlacementStrategy

Decay = Annotated[float, Field(ge=0, lt=1)]


class LoRAConfig(Settings):
    """Low-rank adapters (2106.09685); the reference is the same model with the adapters off."""

    rank: int = Field(ge=1)
    """Rank of the adapters."""
    alpha: int = Field(default=16, ge=1)
    """Scale: the update is alpha / rank times B A."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter."""


class LearnerConfig(Settings):
    num_ranks: int = Field(default=1, ge=1)
    """Data-parallel ranks; each is one Ray actor."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; one rank has nothing to partition, and is fastest with 0."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory (GPU only)."""
    offload_params: bool = False
    """Keep ZeRO-3's parameters in host memory (GPU only)."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights."""
    lr: float = Field(default=1e-6, gt=0)
    """Learning rate of the policy."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Learning rates (policy and critic) stay, or fall linearly to 0 over num_steps."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """Adam's epsilon (lm-human-preferences)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Most tokens, of prompts and responses, in one forward and backward; a longer sequence is alone in its own.
    Changes memory and speed, never the result."""
    packing: bool = True
    """Put sequences one after the other without padding, and responses to one prompt behind a single copy of it
    (decoders with sdpa; without that copy with flash_attention_2; eager and encoders keep sequences apart)."""
    logprob_chunk: int = Field(default=1024, ge=1)
    """Token positions whose logits are held at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for one rank."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for one rank."""
    resources: dict[str, float] = {}
    """Further Ray resources that one worker reserves; custom ones pin it to the nodes that have them."""
    placement: PlacementStrategy = "PACK"
    """How Ray lays workers over nodes: PACK on few, SPREAD over many, STRICT_PACK on one, STRICT_SPREAD on one each."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of one rank on a CPU."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # true == 1 to a Literal
            raise ValueError("must be 0, 1, 2 or 3")
        return value
