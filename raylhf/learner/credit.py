"""From scores and log-probabilities to advantages, over the whole global batch.

`all_reduce` sums a float64 tensor over ranks in place and returns it; whole groups live on one rank, so group
baselines need no communication.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raylhf.algos.advantages import GROUP_BASELINES, broadcast_to_tokens, gae, reward_to_go, shape_rewards, whiten
from raylhf.algos.diagnostics import ev_moments, explained_variance_from_moments
from raylhf.algos.kl import kl_per_token
from raylhf.algos.masking import mask_out, masked_moments, mean_and_std
from raylhf.config.objective import PPOConfig

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Experience:
    """One rank's share of a rollout batch: R rows, padded to the longest response [R, T]."""

    response_mask: Tensor
    """Tokens that count, bool [R, T]: all False in a row that is empty or whose score is invalid."""
    rollout_logprobs: Tensor
    """As the engine sampled them, [R, T]."""
    old_logprobs: Tensor
    """Of the policy before this batch's first update, [R, T]."""
    ref_logprobs: Tensor
    """Of the reference, [R, T]."""
    values: Tensor | None
    """Of the critic, [R, T]; None without one."""
    scores: Tensor
    """Rewards' scores, [R]; 0 where invalid."""
    valid: Tensor
    """Whether the row counts, bool [R]."""
    group_ids: Tensor
    """The row's group (one draw of a prompt), long [R]."""
    is_truncated: Tensor
    """Whether the response ran into the length limit, bool [R]."""
    end_values: Tensor | None = None
    """Of the critic after each response's last token, [R]; only where cut responses are bootstrapped."""
    token_scores: Tensor | None = None
    """The scores laid out over the responses, [R, T]."""
    advantages: Tensor | None = None
    """[R, T], after `assign_credit`."""
    returns: Tensor | None = None
    """The critic's targets, [R, T], after `assign_credit`."""

    def sequence_kl(self) -> Tensor:
        """KL to the reference (k1) summed over each response, [R]."""
        kl = kl_per_token(self.old_logprobs, self.ref_logprobs, estimator="k1")
        return mask_out(kl, self.response_mask).sum(dim=1)


def assign_credit(
    experience: Experience, objective: PPOConfig, *, kl_coef: float, all_reduce: AllReduce
) -> tuple[Experience, dict[str, float]]:
    """Fill in `advantages` (whitened where asked for) and, with a critic, `returns`; and metrics over all ranks."""
    x = experience
    reward_kl_coef = kl_coef if objective.kl.placement == "reward" else 0.0
    rewards = shape_rewards(
        x.scores, x.old_logprobs, x.ref_logprobs, x.response_mask, kl_coef=reward_kl_coef, token_scores=x.token_scores
    )
    returns = None
    if objective.advantage == "gae":
        assert x.values is not None
        last_values = None if x.end_values is None else torch.where(x.is_truncated, x.end_values, 0.0)
        advantages, returns = gae(
            rewards,
            x.values,
            x.response_mask,
            gamma=objective.gamma,
            gae_lambda=objective.gae_lambda,
            last_values=last_values,
        )
    elif objective.advantage == "reinforce_pp":
        advantages = reward_to_go(rewards, x.response_mask, gamma=objective.gamma)
    else:
        # The KL penalty belongs to the score before the baseline is taken (RLOO, 2402.14740).
        totals = rewards.sum(dim=1)
        baseline = GROUP_BASELINES[objective.advantage](totals, x.group_ids, x.valid)
        advantages = broadcast_to_tokens(baseline, x.response_mask)
    mean, std = mean_and_std(all_reduce(masked_moments(advantages, x.response_mask)))
    metrics = {"advantage/mean": mean.item(), "advantage/std": std.item()}
    if objective.whiten_advantages and objective.advantage in ("gae", "reinforce_pp"):
        advantages = whiten(advantages, x.response_mask, mean=mean, std=std)
    if x.values is not None and returns is not None:
        moments = all_reduce(ev_moments(returns, x.values, x.response_mask))
        value_mean, _ = mean_and_std(all_reduce(masked_moments(x.values, x.response_mask)))
        metrics["critic/explained_variance"] = explained_variance_from_moments(moments).item()
        metrics["critic/value_mean"] = value_mean.item()
    return replace(x, advantages=advantages, returns=returns), metrics
