"""Losses of PPO and its critic-free relatives, and the weights that decide how tokens add up to one number.

Every loss is sum(per-token loss * token_weights) / denominator. The pair of weights and denominator is the aggregation:
`aggregation_weights` gives the first, and `aggregation_count` the local share of the second, to be summed over all
micro-batches and ranks of the optimizer step before the first loss is computed. Without `token_weights` and with the
number of response tokens as the denominator, a loss is the token mean.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

from raylhf.algos.kl import clamped_log_ratio, kl_per_token
from raylhf.algos.masking import mask_out, masked_sum

AggregationMode = Literal["token_mean", "seq_mean", "seq_sum_constant"]
"""How tokens are averaged: token_mean over all tokens of the step (DAPO, arXiv 2503.14476); seq_mean over the tokens of
a response and then over responses (GRPO, arXiv 2402.03300; a token of a long response weighs less); seq_sum_constant
sums a response, divides by the length limit and averages over responses (Dr. GRPO, arXiv 2503.20783)."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    denominator: Tensor | float,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate of PPO (arXiv 1707.06347): -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), aggregated.

    All tensors [B, T]. `dual_clip` (> 1, commonly 3; arXiv 1912.09729) also bounds the loss of a token with A < 0 by
    dual_clip * |A|. `importance_weights` (see `truncated_importance_weights`) correct for tokens that were sampled by
    another policy than the one of `old_logprobs`; `token_weights` are those of the aggregation.

    Metrics, detached, over response tokens: `clip_frac` counts the tokens whose gradient the clipping removed,
    `approx_kl` sums k3 of KL(old || current), `ratio_sum` and `ratio_max` are of the ratio (0 for an empty mask).
    """
    logprobs, old_logprobs = mask_out(logprobs, response_mask), mask_out(old_logprobs, response_mask)
    advantages = mask_out(advantages, response_mask)
    ratio = clamped_log_ratio(logprobs, old_logprobs).exp()
    unclipped = -ratio * advantages
    per_token = torch.maximum(unclipped, -ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages)
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        per_token = torch.minimum(per_token, bound)
    is_clipped = per_token != unclipped
    for weights in (importance_weights, token_weights):
        if weights is not None:
            per_token = per_token * weights
    ratio = ratio.detach()
    metrics = {
        "clip_frac": masked_sum(is_clipped, response_mask),
        "approx_kl": masked_sum(kl_per_token(old_logprobs, logprobs.detach(), estimator="k3"), response_mask),
        "ratio_sum": masked_sum(ratio, response_mask),
        "ratio_max": mask_out(ratio, response_mask).amax(),
    }
    return masked_sum(per_token, response_mask) / denominator, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    value_clip_eps: float | None,
    denominator: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Critic loss: sum of max((v - R)^2, (clip(v, old_v +- eps) - R)^2) / 2 / denominator.

    All tensors [B, T]. `value_clip_eps` has the unit of the values, so it needs calibrated scores: 0.2 freezes a critic
    whose returns are in the tens. None means no clipping. The metric `clip_frac` counts the response tokens whose
    gradient the clipping removed.
    """
    values, old_values = mask_out(values, response_mask), mask_out(old_values, response_mask)
    returns = mask_out(returns, response_mask)
    unclipped = squared_error = (values - returns).square()
    if value_clip_eps is not None:
        # Not old + clamp(values - old): that rounds, and would count values inside the range as clipped.
        clipped_values = values.clamp(old_values - value_clip_eps, old_values + value_clip_eps)
        squared_error = torch.maximum(unclipped, (clipped_values - returns).square())
    metrics = {"clip_frac": masked_sum(squared_error != unclipped, response_mask)}
    return masked_sum(squared_error, response_mask) / 2 / denominator, metrics


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(exp(old_logprobs - rollout_logprobs), cap) [B, T], 0 outside the mask: token-level TIS.

    The rollout engine's kernels, or weights of an earlier version, make its distribution differ from the learner's even
    for the same tokens (https://fengyao.notion.site/off-policy-rl); the cap trades a little bias for bounded variance.
    The metric `tis_cap_frac` counts the capped response tokens.
    """
    weights = clamped_log_ratio(old_logprobs, rollout_logprobs).exp()
    metrics = {"tis_cap_frac": masked_sum(weights > cap, response_mask)}
    return mask_out(weights.clamp(max=cap), response_mask), metrics


def aggregation_weights(response_mask: Tensor, *, mode: AggregationMode, max_response_length: int) -> Tensor:
    """`token_weights` [B, T] of the losses, 0 outside `response_mask` [B, T].

    `max_response_length` is the limit that sampling ran under (not the longest response of a batch, which would make
    the weights depend on how the batch was cut); only seq_sum_constant uses it.
    """
    weights = response_mask.float()
    if mode == "token_mean":
        return weights
    if mode == "seq_mean":
        return weights / response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    if mode == "seq_sum_constant":
        return weights / max_response_length
    assert_never(mode)


def aggregation_count(response_mask: Tensor, *, mode: AggregationMode) -> Tensor:
    """What `response_mask` [B, T] adds to the denominator (long scalar): its tokens, or its responses.

    A row without response tokens is padding and counts for nothing.
    """
    if mode == "token_mean":
        return response_mask.sum()
    if mode in ("seq_mean", "seq_sum_constant"):
        return response_mask.any(dim=1).sum()
    assert_never(mode)
