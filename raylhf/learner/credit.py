"""From scores and log-probabilities to advantages, over the whole global batch.

`all_reduce` sums a float64 tensor over ranks in place and returns it; whole groups live on one rank, so group
baselines need no communication.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from raylhf.algos.advantages import GROUP_BASELINES, broadcast_to_tokens, gae, gdpo, reward_to_go, shape_rewards, whiten
from raylhf.algos.diagnostics import ev_moments, explained_variance_from_moments
from raylhf.algos.masking import masked_moments, mean_and_std
from raylhf.config.objective import PPOConfig
from raylhf.learner.experience import Experience

AllReduce = Callable[[Tensor], Tensor]


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
    elif objective.advantage == "gdpo":
        weights = torch.tensor(list(objective.gdpo_weights.values()), device=x.scores.device)
        parts = x.columns(list(objective.gdpo_weights), setting="objective.gdpo_weights")
        advantages = broadcast_to_tokens(gdpo(parts, x.group_ids, x.valid, weights), x.response_mask)
    else:
        # The KL penalty belongs to the score before the baseline is taken (RLOO, 2402.14740).
        totals = rewards.sum(dim=1)
        baseline = GROUP_BASELINES[objective.advantage](totals, x.group_ids, x.valid)
        advantages = broadcast_to_tokens(baseline, x.response_mask)
    mean, std = mean_and_std(all_reduce(masked_moments(advantages, x.response_mask)))
    metrics = {"advantage/mean": mean.item(), "advantage/std": std.item()}
    if objective.whiten_advantages and objective.advantage in ("gae", "reinforce_pp", "gdpo"):
        advantages = whiten(advantages, x.response_mask, mean=mean, std=std)
    if x.values is not None and returns is not None:
        moments = all_reduce(ev_moments(returns, x.values, x.response_mask))
        value_mean, _ = mean_and_std(all_reduce(masked_moments(x.values, x.response_mask)))
        metrics["critic/explained_variance"] = explained_variance_from_moments(moments).item()
        metrics["critic/value_mean"] = value_mean.item()
    return replace(x, advantages=advantages, returns=returns), metrics
