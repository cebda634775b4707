"""The heart of the suite: PPO finds the known optimum of the KL-regularised objective.

For a response space that can be enumerated, the policy that maximises E[r] - beta * KL(pi || pi_ref) is known:
pi*(y) is proportional to pi_ref(y) * exp(r(y) / beta) (for instance 2305.18290, section 4). Whatever the reward table
is, training must end there, not merely at a higher reward. A wrong sign, mask, denominator or KL estimator anywhere
between scores and optimizer shows up as another fixed point.
"""

import itertools

import numpy as np
import pytest
import torch
from stand_ins import make_config, run_ranks
from torch import Tensor

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.models.tiny import tiny_model

VOCAB, LENGTH, BETA = 8, 2, 0.5
NUM_STEPS, BATCH = 80, 256
START_KL, FINAL_KL = 0.3, 0.02
PROMPT = np.array([1, 2, 3])
RESPONSES = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))  # all 64 of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("enumerable"))
    tiny_model(vocab_size=VOCAB, seed=0).save_pretrained(folder)
    return folder


@torch.no_grad()
def log_policy(lm) -> Tensor:
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


def sample(policy: Tensor, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """A batch of responses by index. One uniform shift for all (systematic sampling): each response appears as often
    as its probability says, up to one, so the noise of the estimate is small."""
    cumulative = policy.exp().cumsum(0).numpy()
    points = (np.arange(BATCH) + rng.random()) / BATCH * cumulative[-1]
    indexes = np.minimum(np.searchsorted(cumulative, points), len(RESPONSES) - 1)
    return rng.permutation(indexes) if group_size > 1 else indexes


def as_groups(indexes: np.ndarray, table: Tensor, policy: Tensor, group_size: int):
    """The batch as scored rollouts in groups."""
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
        rewards.append(RewardOutput(scores=table[members].numpy(), valid=np.ones(group_size, dtype=bool)))
    return rollouts, rewards


def train_to_optimum(learner, rank: int, group_size: int) -> tuple[float, float, float]:
    """KL to pi* at the start and at the end, and the final KL to the reference against the optimum's own."""
    lm, rng = learner._models.policy.module.lm, np.random.default_rng(0)
    reference = log_policy(lm)
    table = torch.from_numpy(rng.normal(scale=0.5, size=len(RESPONSES)))
    optimum = (reference + table / BETA).log_softmax(0)
    for _ in range(NUM_STEPS):
        policy = log_policy(lm)
        learner.update(*as_groups(sample(policy, group_size, rng), table, policy, group_size))
    final = log_policy(lm)
    off_by = divergence(final, reference) - divergence(optimum, reference)
    return divergence(reference, optimum), divergence(final, optimum), off_by


@pytest.mark.parametrize(("advantage", "group_size"), [("gae", 1), ("reinforce_pp", 1), ("rloo", 8), ("dr_grpo", 8)])
def test_ppo_with_a_kl_penalty_converges_to_the_closed_form_optimum(folder, advantage, group_size):
    critic = {"trunk": "shared", "lr": 3e-2, "value_clip_eps": None} if advantage == "gae" else {}
    config = make_config(
        folder,
        num_steps=NUM_STEPS,
        rollout={
            "prompts_per_step": BATCH // group_size,
            "group_size": group_size,
            "sampling": {"max_response_tokens": LENGTH},
            "importance_cap": None,
        },
        learner={"lr": 4e-3, "lr_schedule": "linear", "adam_betas": (0.9, 0.95), "micro_batch_size": BATCH},
        objective={
            "advantage": advantage,
            "kl": {"coef": BETA},
            "gae_lambda": 1.0,
            "num_epochs": 2,
            "critic": critic,
        },
    )
    start, end, off_by = run_ranks(train_to_optimum, config, group_size)[0]
    assert start > START_KL
    assert end < FINAL_KL, f"KL(pi || pi*) fell from {start:.3f} to {end:.4f}"
    assert abs(off_by) < 0.1
