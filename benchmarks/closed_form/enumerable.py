"""A response space small enough to know everything about it: 64 responses to one prompt, and the best policy on them.

The policy that maximises E[r] - beta * KL(pi || pi_ref) is proportional to pi_ref(y) * exp(r(y) / beta) (for instance
2305.18290, section 4). Whatever the rewards are, training must end there, not merely at a higher reward: a wrong sign,
mask, denominator or KL estimator anywhere between scores and optimizer shows up as another fixed point.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylhf.batch import Prompt, RewardOutput, Rollouts

VOCAB, LENGTH, BETA = 8, 2, 2.0
PROMPT = np.array([1, 2, 3])
RESPONSES = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
"""All 64 of them, in the order of a table [first token, second token]."""
CHOSEN, REJECTED = np.array(list(itertools.permutations(range(len(RESPONSES)), 2))).T
"""Every two responses in both orders, [4032] each: with the weights p(chosen is preferred), this is all that an
infinite set of comparisons says."""


@dataclass(frozen=True)
class Problem:
    """Rewards r [64], drawn by `seed`, and the reference's log-probabilities [64]; float64."""

    reference: Tensor
    seed: int

    @cached_property
    def rewards(self) -> Tensor:
        """Standard deviation 1/2: KL(pi_ref || pi*) is about 0.4 nats at beta = 1/2."""
        return torch.from_numpy(np.random.default_rng(self.seed).normal(scale=BETA, size=len(RESPONSES)))

    @property
    def optimum(self) -> Tensor:
        """log pi* [64]."""
        return (self.reference + self.rewards / BETA).log_softmax(0)

    def preference(self, noise: float = 0.0) -> Tensor:
        """Bradley-Terry probability [4032] that CHOSEN is preferred to REJECTED, its label flipped with `noise`."""
        clean = (self.rewards[CHOSEN] - self.rewards[REJECTED]).sigmoid()
        return (1 - noise) * clean + noise * (1 - clean)


@torch.no_grad()
def log_policy(lm: Any) -> Tensor:
    """Exact log-probability of every response, [64] float64."""
    tokens = torch.from_numpy(np.concatenate([np.tile(PROMPT, (len(RESPONSES), 1)), RESPONSES], axis=1))
    logprobs = lm(tokens).logits.double().log_softmax(-1)
    rows = torch.arange(len(RESPONSES))
    start = len(PROMPT) - 1  # the logits that predict the first response token
    steps = [logprobs[rows, start + t, torch.from_numpy(RESPONSES[:, t])] for t in range(LENGTH)]
    return torch.stack(steps).sum(0)


def divergence(left: Tensor, right: Tensor) -> float:
    """KL(left || right) in nats of two log-distributions."""
    return (left.exp() * (left - right)).sum().item()


def sample(policy: Tensor, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` responses by index, in random order. One uniform shift for all (systematic sampling): each appears as
    often as its probability says, up to one, so the noise of the estimate is small."""
    cumulative = policy.exp().cumsum(0).numpy()
    points = (np.arange(count) + rng.random()) / count * cumulative[-1]
    return rng.permutation(np.minimum(np.searchsorted(cumulative, points), len(RESPONSES) - 1))


def as_groups(
    indexes: np.ndarray, scores: np.ndarray, policy: Tensor, group_size: int
) -> tuple[list[Rollouts], list[RewardOutput]]:
    """The batch as scored rollouts in groups; `indexes` and `scores` [B]."""
    rollouts, rewards = [], []
    for start in range(0, len(indexes), group_size):
        members = indexes[start : start + group_size]
        rollouts.append(
            Rollouts(
                prompts=[Prompt(start, ({"role": "user", "content": "x"},))] * group_size,
                prompt_ids=[PROMPT] * group_size,
                response_ids=[RESPONSES[i] for i in members],
                rollout_logprobs=[np.full(LENGTH, policy[i].item() / LENGTH, np.float32) for i in members],
                response_texts=[""] * group_size,
                finish_reasons=("length",) * group_size,
                policy_versions=np.zeros(group_size, dtype=np.int64),
                temperature=1.0,
            )
        )
        rewards.append(RewardOutput(scores=scores[start : start + group_size], valid=np.ones(group_size, dtype=bool)))
    return rollouts, rewards
