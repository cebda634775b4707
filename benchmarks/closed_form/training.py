"""One run on the enumerable problem with the learner that `raylhf train` uses, in this process and without Ray."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from closed_form.enumerable import LENGTH, VOCAB, Problem, as_groups, log_policy, sample
from closed_form.stored import Data, TokenPreferenceWorker
from torch import Tensor

from raylhf.config import RunConfig
from raylhf.config.run import PreferenceRunConfig
from raylhf.learner.worker import LearnerWorker
from raylhf.models.tiny import tiny_model

Settings = dict[str, Any]
LEARNER: Settings = {
    "zero_stage": 0,
    "lr": 2e-3,
    "lr_schedule": "linear",
    "adam_betas": (0.9, 0.95),
    "max_grad_norm": 10.0,
    "micro_batch_tokens": 8192,
}
"""Of every run."""


@dataclass(frozen=True)
class Run:
    """What a run was about and where it went."""

    problem: Problem
    policies: tuple[Tensor, ...]
    """Log-policies [64] after a third, two thirds and all of the steps."""

    @property
    def final(self) -> Tensor:
        """Log-policy [64] at the end."""
        return self.policies[-1]


def train_on_rollouts(
    objective: Settings, *, seed: int, num_steps: int, batch: int, group_size: int, is_noisy: bool = False
) -> Run:
    """Sample, score, update.

    With `is_noisy`, every score has Gumbel noise added. The difference of two Gumbel variables is logistic, so the
    better-scored of two responses is a Bradley-Terry draw, and the order of more a Plackett-Luce draw.
    """
    rng = np.random.default_rng(seed)
    rollout = {
        "prompts_per_step": batch // group_size,
        "group_size": group_size,
        "sampling": {"max_response_tokens": LENGTH},
        "importance_cap": None,
    }
    reward = {"graph": {"kind": "format"}}  # required, but the scores are given
    with _model(seed) as folder:
        common = _common(folder, seed, num_steps, objective)
        config = RunConfig.model_validate(common | {"data": {"path": "unused"}, "rollout": rollout, "reward": reward})
        learner = LearnerWorker(config, folder, folder, rank=0)
        learner.start("127.0.0.1", learner.open_rendezvous())
        lm = learner._models.policy.module.lm
        problem, policies = Problem(log_policy(lm), seed), []
        rewards = problem.rewards.numpy()
        for step in range(num_steps):
            policy = log_policy(lm)
            indexes = sample(policy, batch, rng)
            scores = rewards[indexes] + (rng.gumbel(size=batch) if is_noisy else 0.0)
            learner.update(*as_groups(indexes, scores, policy, group_size))
            if step + 1 in _thirds(num_steps):
                policies.append(log_policy(lm))
        learner.close()
    return Run(problem, tuple(policies))


def train_on_stored(loss: Settings, data: Data, *, seed: int, num_steps: int, batch_size: int = 1) -> Run:
    """Optimizer steps on stored judgements."""
    with _model(seed) as folder:
        objective = {"kind": "preference", "loss": loss, "batch_size": batch_size}
        common = _common(folder, seed, num_steps, objective)
        config = PreferenceRunConfig.model_validate(common | {"data": {"path": "unused", "kind": "pairs"}})
        problem, policies = Problem(log_policy(tiny_model(vocab_size=VOCAB, seed=seed)), seed), []
        learner = TokenPreferenceWorker(config, folder, data(problem, num_steps, np.random.default_rng(seed)))
        learner.start("127.0.0.1", learner.open_rendezvous())
        for step in range(num_steps):
            learner.update(step)
            if step + 1 in _thirds(num_steps):
                policies.append(log_policy(learner._models.policy.module.lm))
        learner.close()
    return Run(problem, tuple(policies))


@contextmanager
def _model(seed: int) -> Iterator[str]:
    """Folder of the reference model; each seed has another."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(vocab_size=VOCAB, seed=seed).save_pretrained(folder)
        yield folder


def _common(folder: str, seed: int, num_steps: int, objective: Settings) -> Settings:
    return {
        "name": "closed_form",
        "seed": seed,
        "num_steps": num_steps,
        "model": {"path": folder},
        "learner": LEARNER,
        "objective": objective,
    }


def _thirds(num_steps: int) -> tuple[int, int, int]:
    return num_steps // 3, 2 * num_steps // 3, num_steps
