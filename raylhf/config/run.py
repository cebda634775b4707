"""The whole run."""

import math

from pydantic import Field

from raylhf.config.base import Settings
from raylhf.config.cluster import ClusterConfig
from raylhf.config.data import DataConfig
from raylhf.config.learner import LearnerConfig
from raylhf.config.model import ModelConfig
from raylhf.config.objective import ObjectiveConfig, PPOConfig
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.reward_model import RewardDataConfig, RewardEvaluationConfig, RewardModelConfig
from raylhf.config.rollout import RolloutConfig
from raylhf.config.tracking import TrackingConfig


class EvaluationConfig(Settings):
    every_steps: int = Field(default=0, ge=0)
    """Evaluate on the held-out prompts every N steps; 0 means at the start and the end only."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses sampled for each held-out prompt."""
    num_samples: int = Field(default=3, ge=0)
    """Responses printed, and logged, at each evaluation."""


class CheckpointConfig(Settings):
    every_steps: int = Field(default=10, ge=0)
    """Save every N steps; 0 means at the end (and on Ctrl-C or SIGTERM) only."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    resume: bool = True
    """Continue from the newest checkpoint of the run's folder, if there is one."""
    export: bool = True
    """Write the final policy as an ordinary Hugging Face folder (`export/`)."""


class CommonConfig(Settings):
    """What every kind of run has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder that holds the folders of runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of data order, sampling, initialisation."""
    model: ModelConfig
    """The model that is trained."""
    learner: LearnerConfig = LearnerConfig()
    """Training workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster."""


class RunConfig(CommonConfig):
    """A policy run."""

    num_steps: int = Field(ge=1)
    """Rollout batches to train on."""
    data: DataConfig
    """The prompts."""
    rollout: RolloutConfig
    """Sampling workers."""
    reward: RewardPlaneConfig
    """The reward plane."""
    objective: ObjectiveConfig = PPOConfig()
    """The optimisation method."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""

    @property
    def responses_per_step(self) -> int:
        """Sequences in one rollout batch."""
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response, in tokens."""
        needed = self.data.max_prompt_tokens + self.rollout.sampling.max_response_tokens
        return self.rollout.max_model_len or needed

    @property
    def weight_transfer(self) -> str:
        """The transport of weights after `auto` is decided."""
        if self.rollout.weight_transfer != "auto":
            return self.rollout.weight_transfer
        if self.rollout.num_gpus == 0:
            return "gloo"
        return "ipc" if self.rollout.num_gpus < 1 else "nccl"

    @property
    def has_critic(self) -> bool:
        """Whether a value function is trained."""
        return self.objective.advantage == "gae"


class RewardModelRunConfig(CommonConfig):
    """A run that trains a reward model."""

    num_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; null means what objective.num_epochs passes take."""
    data: RewardDataConfig
    """The judgements."""
    objective: RewardModelConfig
    """Loss and head."""
    evaluation: RewardEvaluationConfig = RewardEvaluationConfig()
    """Held-out evaluation."""

    def total_steps(self, num_prompts: int) -> int:
        """Optimizer steps of the run over `num_prompts` training prompts."""
        per_epoch = math.ceil(num_prompts / self.objective.batch_size)
        return self.num_steps or self.objective.num_epochs * per_epoch


AnyRunConfig = RunConfig | RewardModelRunConfig
"""What a config file may describe; `objective.kind` tells which."""
