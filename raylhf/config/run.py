"""The whole run."""

import math
import sys
from typing import Any

from pydantic import Field

from raylhf.config.base import Settings
from raylhf.config.cluster import ClusterConfig
from raylhf.config.data import DataConfig
from raylhf.config.judgements import JudgementDataConfig
from raylhf.config.launch import LaunchConfig
from raylhf.config.learner import LearnerConfig
from raylhf.config.model import ModelConfig
from raylhf.config.objective import CriticConfig, ObjectiveConfig, PPOConfig
from raylhf.config.preference import PreferenceConfig, PreferenceEvaluationConfig, SFTConfig
from raylhf.config.preference_losses import TGDPOLoss
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.reward_model import RewardEvaluationConfig, RewardModelConfig
from raylhf.config.rollout import RolloutConfig
from raylhf.config.tracking import TrackingConfig


def guide_of(objective: Settings) -> str | None:
    """The third model that the objective's loss names, if any."""
    loss = getattr(objective, "loss", None)
    return loss.guide if isinstance(loss, TGDPOLoss) else None


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
    launch: LaunchConfig = LaunchConfig()
    """How `raylhf launch` asks a scheduler for nodes."""


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
    def rollout_sizes(self) -> range:
        """How many rollout workers the run may have while it goes on."""
        rollout = self.rollout
        if rollout.is_elastic:
            return range(rollout.least_replicas, rollout.most_replicas + 1)
        cannot_grow = self.weight_transfer == "ipc" or rollout.placement.startswith("STRICT")
        return range(1, rollout.replicas + 1 if cannot_grow else sys.maxsize)

    @property
    def critic(self) -> CriticConfig | None:
        """The value function that is trained, if any."""
        objective = self.objective
        return objective.critic if isinstance(objective, PPOConfig) and objective.advantage == "gae" else None

    @property
    def second_model(self) -> str | None:
        """The model that the critic starts from, or a loss's guide, where it is not the policy."""
        return self.critic.path if isinstance(self.objective, PPOConfig) and self.critic else guide_of(self.objective)

    @property
    def kl_budget(self) -> float | None:
        """Most KL to the reference allowed, in nats per response."""
        objective = self.objective
        return (
            objective.kl.budget_per_sequence if isinstance(objective, PPOConfig) else objective.kl_budget_per_sequence
        )


class JudgementRunConfig(CommonConfig):
    """A run on stored judgements: it samples nothing."""

    num_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; null means what objective.num_epochs passes take."""
    data: JudgementDataConfig
    """The judgements."""
    objective: Any
    """The method, of the kinds below."""

    @property
    def second_model(self) -> str | None:
        """A loss's guide."""
        return guide_of(self.objective)

    def total_steps(self, num_prompts: int) -> int:
        """Optimizer steps of the run over `num_prompts` training prompts."""
        per_epoch = math.ceil(num_prompts / self.objective.batch_size)
        return self.num_steps or self.objective.num_epochs * per_epoch


class RewardModelRunConfig(JudgementRunConfig):
    """A run that trains a reward model."""

    objective: RewardModelConfig
    """Loss and head."""
    evaluation: RewardEvaluationConfig = RewardEvaluationConfig()
    """Held-out evaluation."""


class PreferenceRunConfig(JudgementRunConfig):
    """A run that trains a policy on stored comparisons, or on examples of good responses."""

    objective: PreferenceConfig | SFTConfig = Field(discriminator="kind")
    """The optimisation method."""
    evaluation: PreferenceEvaluationConfig = PreferenceEvaluationConfig()
    """Held-out evaluation."""


OfflineRunConfig = RewardModelRunConfig | PreferenceRunConfig
"""Runs on stored judgements."""
AnyRunConfig = RunConfig | OfflineRunConfig
"""What a config file may describe; `objective.kind` tells which."""
