"""KL to the reference policy: per-token estimators, the penalty as a loss, and the coefficient's controllers.

With x = logprobs - ref_logprobs of a sampled token: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x
(http://joschu.net/blog/kl-approx.html). A good estimate of the value is not a good gradient (arXiv 2506.09477,
2512.21852), and where the penalty sits decides which one is right:

- inside the reward, only k1 gives the gradient of the reverse KL: see `advantages.shape_rewards`;
- as a loss, only k2 does. k3 gives the gradient of the forward KL, and k1 has an expected gradient of zero, that is, no
  penalty at all. So `kl_loss` offers no choice of estimator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self, assert_never

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from raylhf.algos.masking import mask_out, masked_sum

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated: exp(20) is about 5e8, well inside fp32."""

# Ziegler et al. 2019: the controller's proportional error is clipped to +-0.2.
_MAX_PROPORTIONAL_ERROR = 0.2


def clamped_log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """logprobs - other_logprobs (any shape), in fp32 and within +-MAX_LOG_RATIO; the gradient is 0 beyond it."""
    return (logprobs.float() - other_logprobs.float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def count_clamped(logprobs: Tensor, other_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Number (fp32 scalar) of response tokens whose log-ratio [B, T] `clamped_log_ratio` changes."""
    is_clamped = (logprobs.float() - other_logprobs.float()).abs() > MAX_LOG_RATIO
    return masked_sum(is_clamped, response_mask)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Estimate (any shape, elementwise) of KL(policy || reference) from tokens that the policy sampled.

    k1 is unbiased and may be negative, k2 is biased, k3 is unbiased and never negative.
    """
    log_ratio = clamped_log_ratio(logprobs, ref_logprobs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        # expm1 keeps the digits of exp(-x) - 1 + x when the policies almost agree.
        return torch.expm1(-log_ratio) + log_ratio
    assert_never(estimator)


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    denominator: Tensor | float,
    old_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reverse-KL penalty as a loss: (sum of k2 * token_weights / denominator, sum of k3), both fp32 scalars.

    All tensors [B, T]; `token_weights` and `denominator` as in `ppo.policy_loss`. The gradient in `logprobs` is that of
    k2, whose expectation is the gradient of the reverse KL of each next-token distribution; unlike the KL in the reward
    it does not credit a token with the KL of the tokens after it. The value to report is the second one: k3, unbiased
    and never negative, without gradient and without `token_weights`.

    Give `old_logprobs`, those of the policy that sampled the tokens, as soon as it may differ from the current one:
    every token is then weighted by the detached ratio exp(logprobs - old_logprobs), without which neither number
    estimates the current policy's KL.
    """
    logprobs = mask_out(logprobs, response_mask)
    ref_logprobs = mask_out(ref_logprobs, response_mask)
    # k2 whose slope, not whose value, is held within +-MAX_LOG_RATIO: a clamp of the log-ratio itself would stop
    # pulling back exactly the tokens that are furthest from the reference.
    per_token = huber_loss(logprobs, ref_logprobs, reduction="none", delta=MAX_LOG_RATIO)
    k3 = kl_per_token(logprobs, ref_logprobs, estimator="k3").detach()
    if old_logprobs is not None:
        ratio = clamped_log_ratio(logprobs, mask_out(old_logprobs, response_mask)).detach().exp()
        per_token, k3 = per_token * ratio, k3 * ratio
    if token_weights is not None:
        per_token = per_token * token_weights
    return masked_sum(per_token, response_mask) / denominator, masked_sum(k3, response_mask)


class KLController(Protocol):
    """Decides the KL coefficient from the KL that was observed; immutable, and asked once per rollout batch."""

    @property
    def coef(self) -> float: ...

    def updated(self, *, kl_per_sequence: float, num_sequences: int) -> Self:
        """The controller for the next rollout batch."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        ...

    def with_state(self, state: Mapping[str, float]) -> Self:
        """This controller, continuing from the `state_dict` of an earlier one."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """A constant coefficient. It has no state: after a resume the setting in force decides."""

    coef: float

    def updated(self, *, kl_per_sequence: float, num_sequences: int) -> Self:
        return self

    def state_dict(self) -> dict[str, float]:
        return {}

    def with_state(self, state: Mapping[str, float]) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """The proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2), with bounds.

    The unit of `target_per_sequence` is nats SUMMED over a response, as in the paper, where the target is 6. Fed with
    a mean per token, the same target is too lax by the length of a response, and the coefficient decays to nothing.
    """

    coef: float
    target_per_sequence: float
    horizon: float
    """Number of sequences over which the coefficient may change by about 20 % (10,000 in the paper)."""
    min_coef: float
    max_coef: float

    def __post_init__(self) -> None:
        if self.target_per_sequence <= 0 or self.horizon <= 0:
            raise ValueError(
                f"target_per_sequence = {self.target_per_sequence} and horizon = {self.horizon} must both be positive"
            )
        if not 0 <= self.min_coef <= self.coef <= self.max_coef:
            raise ValueError(
                f"the KL coefficient {self.coef} must lie between min_coef = {self.min_coef} (at least 0) and"
                f" max_coef = {self.max_coef}"
            )

    def updated(self, *, kl_per_sequence: float, num_sequences: int) -> Self:
        """Raise the coefficient when `kl_per_sequence`, the mean over the GLOBAL rollout batch of the KL (k1) summed
        over a response, exceeds the target, and lower it otherwise; `num_sequences` is the size of that batch.

        The paper's multiplier falls to zero and below when a batch exceeds 5 horizons: it is held within [0.5, 2].
        """
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"the KL per sequence is {kl_per_sequence}: the policy or the reference has diverged")
        error = _clip(kl_per_sequence / self.target_per_sequence - 1, -_MAX_PROPORTIONAL_ERROR, _MAX_PROPORTIONAL_ERROR)
        multiplier = _clip(1 + error * num_sequences / self.horizon, 0.5, 2.0)
        return replace(self, coef=_clip(self.coef * multiplier, self.min_coef, self.max_coef))

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def with_state(self, state: Mapping[str, float]) -> Self:
        """Continue at the saved coefficient, moved into the bounds of this controller if they have changed."""
        return replace(self, coef=_clip(state["coef"], self.min_coef, self.max_coef))


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))
