"""What a policy run optimises: PPO with a KL penalty, with a critic (gae) or a group baseline; or online DPO."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from raylhf.config.base import Settings
from raylhf.config.preference import OnlineDPOConfig


class FixedKLControl(Settings):
    """A constant coefficient."""

    kind: Literal["fixed"] = "fixed"


class AdaptiveKLControl(Settings):
    """Ziegler et al. 2019 (1909.08593): proportional control towards a target."""

    kind: Literal["adaptive"]
    target_per_sequence: float = Field(gt=0)
    """Wanted KL to the reference in nats summed over a response (not per token)."""
    horizon: float = Field(default=10_000, gt=0)
    """Responses over which the coefficient follows; smaller reacts sooner."""
    min_coef: float = Field(default=1e-4, gt=0)
    """The coefficient never falls below this."""
    max_coef: float = Field(default=10.0, gt=0)
    """The coefficient never rises above this."""


class KLConfig(Settings):
    coef: float = Field(default=0.05, ge=0)
    """Weight of the KL penalty in reward units per nat (start value where the control is adaptive)."""
    placement: Literal["reward", "loss"] = "reward"
    """In the reward (k1 on each token) or in the loss (k2 gradient, k3 reported)."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """k1 in the reward, k2 in the loss; null chooses it. Other pairs have a wrong gradient and are refused."""
    control: Annotated[FixedKLControl | AdaptiveKLControl, Field(discriminator="kind")] = FixedKLControl()
    """How the coefficient moves."""
    budget_per_sequence: float | None = Field(default=None, gt=0)
    """Most KL to the reference allowed, in nats per response; a run that passes it saves, reports and stops."""


class CriticConfig(Settings):
    """The value function of PPO (only with `advantage: gae`)."""

    trunk: Literal["shared", "own"] = "own"
    """A model of its own, or a head on the policy's trunk (cheap; the value gradient stops at the trunk)."""
    path: str | None = None
    """Model the critic starts from, for instance a reward model; null means the policy's (`trunk: own`)."""
    lr: float = Field(default=9e-6, gt=0)
    """Learning rate of critic or value head (OpenRLHF's default)."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the critic learns."""
    loss_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss (`trunk: shared` only; lm-human-preferences uses 0.1)."""
    value_clip_eps: float | None = Field(default=0.2, gt=0)
    """Clip of the value change in value units; null turns it off."""


class PPOConfig(Settings):
    """PPO with a KL penalty (1707.06347, 1909.08593, 2203.02155); defaults are lm-human-preferences' unless named."""

    kind: Literal["ppo"] = "ppo"
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gdpo"] = "gae"
    """Advantage estimator: gae needs a critic, grpo/dr_grpo/rloo/gdpo need group_size >= 2."""
    gdpo_weights: dict[str, float] = {}
    """Weight of each named part of the reward (`gdpo`): every part is normalised within its group by itself."""
    kl: KLConfig = KLConfig()
    """Penalty for leaving the reference policy."""
    critic: CriticConfig = CriticConfig()
    """The value function (gae)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's trace decay."""
    bootstrap_truncated: bool = False
    """Use the critic's value at the cut of a response that ran into max_response_tokens, instead of 0."""
    whiten_advantages: bool = True
    """Mean 0, deviation 1 over the response tokens of the whole global batch (gae, reinforce_pp and gdpo)."""
    num_epochs: int = Field(default=4, ge=1)
    """Passes over a rollout batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps in a pass."""
    clip_eps: float = Field(default=0.2, gt=0, lt=1)
    """Lower (and, by default, upper) clip width of the probability ratio."""
    clip_eps_high: float | None = Field(default=None, gt=0)
    """Upper clip width (DAPO 2503.14476 uses 0.28); null means clip_eps."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss at negative advantages (1912.09729; verl always has 3.0); null means off."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    aggregation: Literal["token_mean", "seq_mean", "seq_sum_constant"] = "token_mean"
    """Mean over all tokens of an optimizer step (DAPO), over sequences of token means (GRPO), or Dr.GRPO's constant."""
    approx_kl_limit: float | None = Field(default=None, gt=0)
    """Stop the epochs of this batch when KL(old || new) per token passes 1.5 times this; null means off."""


def _kind(value: Any) -> str:
    return value.get("kind", "ppo") if isinstance(value, dict) else getattr(value, "kind", "ppo")


ObjectiveConfig = Annotated[
    Annotated[PPOConfig, Tag("ppo")] | Annotated[OnlineDPOConfig, Tag("online_dpo")], Discriminator(_kind)
]
"""`kind` tells which; a file without one is PPO."""
