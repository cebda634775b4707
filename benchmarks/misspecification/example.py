"""The published example in which DPO ends below the policy that it started from (2510.20413), on raylhf's losses.

Three responses, one parameter: pi is proportional to (e^theta, e^-theta, 1), the reference is theta = 0, rewards are
(1, 2, 0), preferences are Bradley-Terry in them, beta is 1. No theta expresses the rewards: raising the second response
lowers the first. What DPO then finds depends on how often each pair was asked about.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from raylhf.algos.preference import Pairs, Responses, aux_dpo_loss, aux_dpo_penalty, cdpo_loss

FEATURES = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
"""d log pi / d theta at theta = 0, where its mean is 0."""
REWARDS = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
PAIRS = Pairs(chosen=torch.tensor([0, 1, 1]), rejected=torch.tensor([2, 0, 2]))
SKEWED, UNIFORM = (8, 1, 1), (1, 1, 1)
"""How often each of PAIRS is compared."""
SURE = PAIRS.gap(REWARDS).sigmoid()
"""How often its first response wins, [3]."""
BOUND = 1.0
"""Largest offset of AuxDPO."""


def log_policy(theta: Tensor | float) -> Tensor:
    """[3]."""
    return (FEATURES * theta).log_softmax(0)


def reward(theta: Tensor | float) -> float:
    """Expected, of the policy."""
    return float((log_policy(theta).exp() * REWARDS).sum())


def log_ratios(theta: Tensor) -> Tensor:
    """rho [3], by way of the tokens that the learner sees: one each."""
    mask = torch.ones(len(REWARDS), 1, dtype=torch.bool)
    responses = Responses(log_policy(theta)[:, None], mask, ref_logprobs=log_policy(0.0)[:, None])
    return responses.log_ratios()


def dpo_theta(counts: Sequence[int]) -> float:
    """Where DPO ends with infinitely many judgements, in these proportions."""
    shares = _shares(counts)

    def loss(parameters: Tensor) -> Tensor:
        gap = PAIRS.gap(log_ratios(parameters[0]))
        return (shares * cdpo_loss(gap, beta=1.0, label_smoothing=1 - SURE)).sum()

    return float(_minimised(loss, torch.zeros(1, dtype=torch.float64))[0])


def rlhf_theta() -> float:
    """Where the KL-regularised reward is greatest."""

    def loss(parameters: Tensor) -> Tensor:
        rho = log_ratios(parameters[0])
        return (log_policy(parameters[0]).exp() * (rho - REWARDS)).sum()

    return float(_minimised(loss, torch.zeros(1, dtype=torch.float64))[0])


def aux_dpo_theta(
    counts: Sequence[int],
    *,
    offsets_of: Literal["responses", "sides"] = "responses",
    null_coef: float = 1.0,
    amplitude_coef: float = 0.0,
) -> float:
    """Where AuxDPO ends, with an offset for each of the three responses, or for either side of each pair.

    Theta and offsets are minimised together, from 0.
    """
    shares = _shares(counts)
    of_responses = offsets_of == "responses"
    slots = torch.tensor([[0, 2], [1, 0], [1, 2]]) if of_responses else torch.arange(6).view(3, 2)
    slopes = FEATURES if of_responses else FEATURES[torch.stack([PAIRS.chosen, PAIRS.rejected], dim=1)].flatten()

    def loss(parameters: Tensor) -> Tensor:
        offsets = BOUND * parameters[1:].tanh()
        gap = PAIRS.gap(log_ratios(parameters[0]))
        chosen, rejected = offsets[slots].unbind(dim=1)
        won = aux_dpo_loss(gap, chosen, rejected, beta=1.0)
        lost = aux_dpo_loss(-gap, rejected, chosen, beta=1.0)
        null = (offsets * slopes).sum().square()
        penalty = aux_dpo_penalty(null, offsets, null_coef=null_coef, amplitude_coef=amplitude_coef)
        return (shares * (SURE * won + (1 - SURE) * lost)).sum() + penalty

    start = torch.zeros(1 + len(slopes), dtype=torch.float64)
    return float(_minimised(loss, start)[0])


def _shares(counts: Sequence[int]) -> Tensor:
    shares = torch.tensor(counts, dtype=torch.float64)
    return shares / shares.sum()


def _minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The parameters at a minimum of `loss`, by L-BFGS."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach()
