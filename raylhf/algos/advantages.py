"""From scores to advantages: KL-shaped token rewards, GAE, reward-to-go, group baselines, whitening.

The results are targets, constants for the losses: no gradient flows through them. Sequence-level tensors are [B].
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from raylhf.algos.kl import kl_per_token
from raylhf.algos.masking import last_response_index, mask_out


@torch.no_grad()
def shape_rewards(
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    token_scores: Tensor | None = None,
) -> Tensor:
    """Rewards [B, T]: -kl_coef * k1 at each response token, plus `scores` [B] at the last one (arXiv 1909.08593).

    old_logprobs and ref_logprobs [B, T] are the learner's, not the rollout engine's. k1 is the only estimator that has
    the gradient of the reverse KL when it sits in the reward (see `kl`). `token_scores` [B, T] lay the score out over
    the response instead; the last token gets what is left of it (a penalty added later, a token score that stands
    outside the mask), so that a response's rewards add to its score minus the KL penalty in any case. A row without
    response tokens gets nothing, whatever its score.
    """
    rewards = -kl_coef * kl_per_token(old_logprobs, ref_logprobs, estimator="k1")
    if token_scores is not None:
        dense = mask_out(token_scores, response_mask)
        rewards, scores = rewards + dense, scores - dense.sum(dim=1)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = positions == last_response_index(response_mask)[:, None]
    return mask_out(rewards, response_mask) + broadcast_to_tokens(scores, is_last)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of generalised advantage estimation (arXiv 1506.02438), 0 outside the mask.

    rewards and values [B, T]. Positions outside the mask are not states: the next value and the running sum pass over
    them unchanged, so a response with holes gives the same numbers as the one with its holes cut out. The value after
    the last response token is 0, as the episode ended there; `last_values` [B] replaces it, to bootstrap responses that
    were cut at the length limit (0 in the rows that ended by themselves). returns = advantages + values, so whiten the
    advantages afterwards.
    """
    rewards, values = mask_out(rewards, response_mask), mask_out(values, response_mask)
    advantages = torch.zeros_like(values)
    next_values = values.new_zeros(values.shape[0]) if last_values is None else last_values.float()
    running = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        is_state = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = torch.where(is_state, delta + gamma * gae_lambda * running, running)
        next_values = torch.where(is_state, values[:, t], next_values)
        advantages[:, t] = torch.where(is_state, running, 0.0)
    return advantages, advantages + values


def reward_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum [B, T] of `rewards` [B, T] from each response token to the end, 0 outside the mask.

    Of KL-shaped rewards with gamma = 1 and then whitened over the global batch, this is the advantage of REINFORCE++
    (arXiv 2501.03262). Holes are passed over as in `gae`, of which this is the case without a critic.
    """
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma=gamma, gae_lambda=1.0)[0]


def whiten(values: Tensor, mask: Tensor, *, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """(values - mean) / std [B, T] under the mask and 0 outside it.

    mean and std come from `masking.mean_and_std` of moments summed over the global batch. The 1e-8 under the root
    (as in lm-human-preferences) makes a constant batch 0 instead of amplified rounding.
    """
    return mask_out((values.float() - mean) * (std * std + 1e-8) ** -0.5, mask)


def broadcast_to_tokens(sequence_values: Tensor, response_mask: Tensor) -> Tensor:
    """`sequence_values` [B] at every True position of `response_mask` [B, T], 0 elsewhere."""
    return mask_out(sequence_values[:, None], response_mask)


def grpo_advantages(
    scores: Tensor, group_ids: Tensor, valid: Tensor, *, normalize_std: bool = True, eps: float = 1e-4
) -> Tensor:
    """Advantages [B] of GRPO (arXiv 2402.03300): (score - group mean) / (group std + eps), std with ddof 1.

    scores [B]; group_ids [B] (long) names the prompt of each response, in any order, and whole groups must be present;
    valid [B] (bool) is False where no score could be had. An invalid member, NaN included, gets 0 and does not touch
    its group; a group with one valid member or with equal scores gets 0. `normalize_std=False` is Dr. GRPO
    (arXiv 2503.20783): the division by std favours prompts that are almost always or almost never solved.
    """
    centered, num_valid = _center_by_group(scores, group_ids, valid)
    if normalize_std:
        std = (_sum_by_group(centered.square(), group_ids) / (num_valid - 1).clamp(min=1)).sqrt()
        centered = centered / (std + eps)
    return centered.float()


def rloo_advantages(scores: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """Advantages [B] of RLOO (arXiv 2402.14740): the score minus the mean score of the group's other valid members.

    Arguments and edge cases as in `grpo_advantages`. In RLOO the KL penalty belongs to the score: subtract
    kl_coef * (k1 summed over the response) before calling.
    """
    centered, num_valid = _center_by_group(scores, group_ids, valid)
    # n / (n - 1) turns the distance from the group's mean into the distance from the mean of the others.
    return (centered * num_valid / (num_valid - 1).clamp(min=1)).float()


def gdpo(vector: Tensor, group_ids: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum [R] of the columns of `vector` [R, J], each normalised within its group first (arXiv 2601.05242).

    Every reward thus has a say by its weight [J], whatever its scale; summed first and normalised afterwards, the one
    that varies most decides alone. Columns are normalised as in `grpo_advantages`, whose other arguments and edge
    cases these are. NaN in a column means that it does not apply: it adds 0, and the column's other members are a
    group without it. Whiten the result over the global batch, since its scale grows with the number of columns.
    """
    columns = [grpo_advantages(column, group_ids, valid & ~column.isnan()) for column in vector.unbind(dim=1)]
    return (torch.stack(columns, dim=1) * weights).sum(dim=1)


GroupBaseline = Callable[[Tensor, Tensor, Tensor], Tensor]

GROUP_BASELINES: dict[str, GroupBaseline] = {
    "grpo": grpo_advantages,
    "dr_grpo": partial(grpo_advantages, normalize_std=False),
    "rloo": rloo_advantages,
}


def _center_by_group(scores: Tensor, group_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scores minus their group's mean over valid members, 0 where invalid; and each row's number of those members.

    float64 [B] both, so that equal scores do not leave a rounding error for the division by std to amplify.
    """
    num_valid = _sum_by_group(valid.double(), group_ids)
    valid_scores = torch.where(valid, scores.double(), 0.0)
    mean = _sum_by_group(valid_scores, group_ids) / num_valid.clamp(min=1)
    return torch.where(valid, valid_scores - mean, 0.0), num_valid


def _sum_by_group(values: Tensor, group_ids: Tensor) -> Tensor:
    """At each row [B], the sum of `values` [B] over the rows of its group."""
    _, group_index = torch.unique(group_ids, return_inverse=True)
    return torch.zeros_like(values).index_add(0, group_index, values)[group_index]
