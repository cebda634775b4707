"""Preference optimisation, online and on stored judgements, and supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings
from raylhf.config.preference_losses import DPOLoss, PreferenceLoss


class ReferenceConfig(Settings):
    """The model that the policy is compared with (2404.09656 moves it)."""

    every_steps: int = Field(default=0, ge=0)
    """Move the reference towards the policy every N steps; 0 keeps it fixed."""
    mix: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy in the moved reference: 1 puts the policy in its place; small, every step, is an EMA."""


class PairsConfig(Settings):
    """Which of a prompt's responses are compared, by their scores."""

    kind: Literal["best_worst", "all_pairs", "random_against_best", "pareto", "first_wrong_step"] = "best_worst"
    """`pareto` pairs a response with one that is no better in any of `parts`; `first_wrong_step` the
    response that stays right longest with the one that goes wrong first, up to that step (a process reward)."""
    tie_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are ties: left out and counted."""
    full_weight_gap: float | None = Field(default=None, gt=0)
    """Pairs whose scores differ by less weigh gap / this; null weighs all alike."""
    soft_labels: bool = False
    """The better response is preferred with probability sigmoid(difference of the scores), not for sure (loss `cdpo`,
    all pairs): then online DPO has PPO's optimum, pi_ref exp(score / beta) / Z. With sure labels it has none."""
    parts: tuple[str, ...] = ()
    """Parts of the reward (`<name>` of reward/part/<name>_mean: members of an ensemble, attributes, or parts of a node)
    that `pareto` and `weight_by_agreement` compare by."""
    weight_by_agreement: bool = False
    """Pairs weigh the share of `parts` that agree with their order, from 0 at half to 1 at all."""


class OnlineDPOConfig(Settings):
    """Preference optimisation on pairs of the policy's own responses (2402.04792), scored by any reward graph."""

    kind: Literal["online_dpo"]
    loss: PreferenceLoss = DPOLoss()
    """What is minimised."""
    pairs: PairsConfig = PairsConfig()
    """Which responses are compared."""
    reference: ReferenceConfig = ReferenceConfig()
    """What the policy is compared with."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps in a pass."""
    kl_budget_per_sequence: float | None = Field(default=None, gt=0)
    """Most KL to the reference allowed, in nats per response; a run that passes it saves, reports and stops."""


class PreferenceConfig(Settings):
    """Preference optimisation on stored pairs, rankings or scores."""

    kind: Literal["preference"]
    loss: PreferenceLoss = DPOLoss()
    """What is minimised."""
    reference: ReferenceConfig = ReferenceConfig()
    """What the policy is compared with."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts in one optimizer step, with all their comparisons."""


class SFTConfig(Settings):
    """Supervised fine-tuning: the mean negative log-probability of the response tokens of a batch."""

    kind: Literal["sft"]
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts in one optimizer step."""


def loss_of(objective: PreferenceConfig | SFTConfig) -> PreferenceLoss | SFTConfig:
    """What is minimised; fine-tuning is its own loss."""
    return objective.loss if isinstance(objective, PreferenceConfig) else objective


class PreferenceEvaluationConfig(Settings):
    every_steps: int = Field(default=0, ge=0)
    """Evaluate on the held-out judgements every N steps; 0 means at the start and the end only."""
    num_samples: int = Field(default=3, ge=0)
    """Held-out prompts logged with their implicit rewards at each evaluation."""
