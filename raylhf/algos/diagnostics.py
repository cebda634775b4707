"""Numbers that say whether training is healthy, in a form that adds up over micro-batches and ranks."""

import torch
from torch import Tensor

from raylhf.algos.kl import clamped_log_ratio, kl_per_token
from raylhf.algos.masking import mask_out, masked_moments, masked_sum, mean_and_std


def ev_moments(returns: Tensor, values: Tensor, response_mask: Tensor) -> Tensor:
    """Moments [2, 3] (float64) of the returns and of the critic's errors, over response tokens; all inputs [B, T].

    All-reduce them with SUM, then call `explained_variance_from_moments`.
    """
    errors = returns.double() - values.double()
    return torch.stack([masked_moments(returns, response_mask), masked_moments(errors, response_mask)])


def explained_variance_from_moments(moments: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) (float64 scalar) of summed `ev_moments` [2, 3].

    1 is a perfect critic, 0 one no better than a constant, and below 0 worse than that. NaN when the returns do not
    vary: there is nothing to explain.
    """
    returns_moments, error_moments = moments.unbind()
    _, returns_std = mean_and_std(returns_moments)
    _, error_std = mean_and_std(error_moments)
    return torch.where(returns_std > 0, 1 - (error_std / returns_std).square(), torch.nan)


@torch.no_grad()
def mismatch_sums(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
    """How far the learner's `old_logprobs` [B, T] are from the `rollout_logprobs` [B, T] that sampled the tokens.

    `abs_dlogp` sums |old - rollout|; `kl` sums k3 of KL(rollout || learner), the direction that samples of the rollout
    engine can estimate; `ratio_max` is the largest learner / rollout probability ratio (0 for an empty mask).
    """
    log_ratio = clamped_log_ratio(old_logprobs, rollout_logprobs)
    return {
        "abs_dlogp": masked_sum((old_logprobs.float() - rollout_logprobs.float()).abs(), response_mask),
        "kl": masked_sum(kl_per_token(rollout_logprobs, old_logprobs, estimator="k3"), response_mask),
        "ratio_max": mask_out(log_ratio.exp(), response_mask).amax(),
    }
