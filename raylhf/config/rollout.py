"""How responses are sampled."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings
from raylhf.config.cluster import PlacementStrategy


class SamplingConfig(Settings):
    """One object for engine and learner: the learner divides its logits by the same temperature."""

    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of policy, old policy and reference alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass; must be 1 for PPO, whose ratio needs the untruncated distribution."""
    top_k: int = Field(default=-1, ge=-1)
    """Keep the k likeliest tokens; must be -1 (off) for PPO."""
    max_response_tokens: int = Field(default=256, ge=1)
    """Longest response; reaching it ends a response with finish_reason `length`."""


class RolloutConfig(Settings):
    prompts_per_step: int = Field(ge=1)
    """Prompts drawn in one step."""
    group_size: int = Field(default=1, ge=1)
    """Responses sampled per prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampling distribution."""
    replicas: int = Field(default=1, ge=1)
    """Rollout workers at the start, if there is room for those beyond min_replicas; each is one vLLM engine."""
    min_replicas: int | None = Field(default=None, ge=1)
    """Fewest workers that the run may shrink to by itself; null means replicas."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most workers that the run may grow to by itself, where sampling takes longer than learning; null: replicas."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one vLLM engine."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves for one worker."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for one worker; a fraction shares one GPU with the learner."""
    resources: dict[str, float] = {}
    """Further Ray resources that one worker reserves; custom ones pin it to the nodes that have them."""
    placement: PlacementStrategy = "PACK"
    """How Ray lays workers over nodes: PACK on few, SPREAD over many, STRICT_PACK on one, STRICT_SPREAD on one each."""
    threads: int = Field(default=2, ge=1)
    """Compute threads of one worker on a CPU."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus response that the engine serves; null means max_prompt_tokens + max_response_tokens."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of one worker on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU that vLLM may fill."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that one engine decodes at once."""
    enforce_eager: bool = True
    """Skip CUDA graphs and compilation: starts sooner, decodes slower on a GPU."""
    weight_transfer: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """Transport of weights: gloo on CPU, nccl between GPUs, ipc where both share a GPU; auto chooses by num_gpus."""
    max_staleness: int = Field(default=0, ge=0)
    """By how many versions of the weights a token may be older than those that learn from it: 0 samples and learns in
    turn, 1 or more samples the next batches while the learner learns."""
    importance_cap: float | None = Field(default=2.0, gt=0)
    """Cap of the token importance weight learner/rollout (TIS); null turns the correction off."""

    @property
    def least_replicas(self) -> int:
        """Fewest workers."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """Most workers."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def is_elastic(self) -> bool:
        """Whether the run chooses the number of workers by itself."""
        return self.least_replicas < self.most_replicas
