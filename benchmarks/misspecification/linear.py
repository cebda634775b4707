"""Preferences among responses with features, and log-linear policies: pi(y | x) proportional to exp(theta . f(x, y)).

The reference is uniform, so the gap of a pair's log-ratios is theta . (f_chosen - f_rejected), and everything about a
policy is known: its reward, its KL, how it would fare on other prompts. Minibatches, Adam, raylhf's losses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from raylhf.algos.preference import cdpo_loss, dpo_loss, robust_dpo_loss
from raylhf.algos.preference_robust import (
    Ema,
    beta_dpo_beta,
    beta_dpo_keep,
    dr_dpo_weights,
    kldpo_weights,
    wdpo_penalty,
)

BETA, WIDTH, CANDIDATES = 1.0, 12, 8
BATCH, NUM_STEPS, LR = 64, 400, 0.02

BatchLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(theta [D], differences f_chosen - f_rejected [N, D], step) to the loss of a minibatch."""


def features(num_prompts: int, generator: torch.Generator) -> Tensor:
    """Of every candidate, [P, K, D]."""
    return torch.randn(num_prompts, CANDIDATES, WIDTH, dtype=torch.float64, generator=generator)


def judged(table: Tensor, weights: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Differences [P, D] of two candidates of each prompt; Bradley-Terry in weights . f, flipped with `noise`."""
    gaps = table[:, 0] - table[:, 1]
    sure = (gaps @ weights).sigmoid()
    sure = (1 - noise) * sure + noise * (1 - sure)
    wins = torch.rand(len(sure), dtype=torch.float64, generator=generator) < sure
    return torch.where(wins[:, None], gaps, -gaps)


def train(loss: BatchLoss, differences: Tensor, generator: torch.Generator) -> Tensor:
    """theta [D] after NUM_STEPS minibatches."""
    theta = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, NUM_STEPS)
    for step in range(NUM_STEPS):
        batch = torch.randint(len(differences), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(theta, differences[batch], step).backward()
        optimizer.step()
        schedule.step()
    return theta.detach()


def reward(theta: Tensor, table: Tensor, weights: Tensor) -> float:
    """Mean over prompts of the policy's expected reward; the reference has about 0."""
    return float((((table @ theta).softmax(1)) * (table @ weights)).sum(1).mean())


def objective(theta: Tensor, table: Tensor, weights: Tensor) -> float:
    """Expected reward minus BETA times the KL to the reference: what DPO is to maximise."""
    log_policy = (table @ theta).log_softmax(1)
    uniform = torch.tensor(float(CANDIDATES), dtype=torch.float64).log()
    return float((log_policy.exp() * (table @ weights - BETA * (log_policy + uniform))).sum(1).mean())


# --- losses of a minibatch --------------------------------------------------------------------------------------------


def dpo(beta: float = BETA) -> BatchLoss:
    return lambda theta, differences, step: dpo_loss(differences @ theta, beta=beta).mean()


def cdpo(label_smoothing: float) -> BatchLoss:
    return lambda theta, differences, step: cdpo_loss(
        differences @ theta, beta=BETA, label_smoothing=label_smoothing
    ).mean()


def robust_dpo(label_noise: float) -> BatchLoss:
    return lambda theta, differences, step: robust_dpo_loss(
        differences @ theta, beta=BETA, label_noise=label_noise
    ).mean()


def kldpo(temperature: float) -> BatchLoss:
    def loss(theta: Tensor, differences: Tensor, step: int) -> Tensor:
        losses = dpo_loss(differences @ theta, beta=BETA)
        return (kldpo_weights(losses, temperature=temperature) * losses).mean()

    return loss


def dr_dpo(temperature: float) -> BatchLoss:
    def loss(theta: Tensor, differences: Tensor, step: int) -> Tensor:
        losses = dpo_loss(differences @ theta, beta=BETA)
        return (dr_dpo_weights(losses, temperature=temperature) * losses).mean()

    return loss


def wdpo(rho: float) -> BatchLoss:
    """Of the gradient in the features, which are the inputs here."""

    def loss(theta: Tensor, differences: Tensor, step: int) -> Tensor:
        inputs = differences.clone().requires_grad_()
        losses = dpo_loss(inputs @ theta, beta=BETA)
        (slopes,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        # Chosen and rejected have opposite slopes of one size.
        return losses.mean() + wdpo_penalty(2 * slopes.square().sum(dim=1), rho=rho, form="squared").mean()

    return loss


def beta_dpo(sensitivity: float, filter_share: float, decay: float = 0.9) -> BatchLoss:
    """With running statistics of its own: make a new one for every run."""
    ema = Ema()

    def loss(theta: Tensor, differences: Tensor, step: int) -> Tensor:
        nonlocal ema
        gaps = differences @ theta
        seen = gaps.detach()
        ema = ema.updated(float(seen.mean()), float(seen.std(correction=0)), decay)
        keep = beta_dpo_keep(gaps, center=ema.mean, spread=ema.std, keep_share=1 - filter_share, seed=step)
        beta = beta_dpo_beta(gaps[keep].mean(), beta=BETA, sensitivity=sensitivity, center=ema.mean)
        return dpo_loss(gaps[keep], beta=beta).mean()

    return loss
