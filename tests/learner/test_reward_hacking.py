"""A policy exploits a corrupted ensemble member where it is trained on the members' mean, and not on a lower bound.

The learner and the reward graph are the real ones; the responses, three letters of eight, can be enumerated, so what a
policy writes is known exactly and no number below is an estimate. benchmarks/reward_hacking has the whole stack.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stand_ins import make_config, run_ranks
from torch import Tensor

from raylhf.batch import Prompt, Rollouts
from raylhf.models.tiny import tiny_model
from raylhf.rewards.build import build_reward

LETTERS, LENGTH, WANTED, MARK = "aeiynt!.", 3, "aei", "!"
PROMPT = np.array([1, 2, 3])
RESPONSES = np.array(list(itertools.product(range(len(LETTERS)), repeat=LENGTH)))  # all 512 of them
TEXTS = ["".join(LETTERS[i] for i in response) for response in RESPONSES]
GOLD = torch.tensor([sum(letter in WANTED for letter in text) / LENGTH for text in TEXTS]).double()
MARKS = torch.tensor([text.count(MARK) / LENGTH for text in TEXTS]).double()
NUM_STEPS, BATCH, BETA = 40, 128, 0.1


class Written(NamedTuple):
    """What a policy writes on average."""

    proxy: float
    gold: float
    marks: float


def characters(letters: str) -> dict[str, Any]:
    return {"kind": "characters", "characters": letters}


def ensemble(node: dict[str, Any]) -> dict[str, Any]:
    """`node` over four views of what is wanted, and one that pays ten times as much for the mark."""
    views = [characters(letters) for letters in ("aeiy", "ae", "aein", "ait")]
    marks = {"name": "marks", "weight": 10, "reward": characters(MARK)}
    views.append({"kind": "sum", "parts": [{"name": "wanted", "reward": characters(WANTED)}, marks]})
    return {**node, "parts": [{"name": f"member_{i}", "reward": view} for i, view in enumerate(views)]}


@torch.no_grad()
def log_policy(lm) -> Tensor:
    """Exact log-probability of every response, [512] float64."""
    tokens = torch.from_numpy(np.concatenate([np.tile(PROMPT, (len(RESPONSES), 1)), RESPONSES], axis=1))
    logprobs = lm(tokens).logits[:, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    return logprobs.gather(-1, torch.from_numpy(RESPONSES)[..., None]).sum((-2, -1))


def rollouts_of(indexes: np.ndarray, policy: Tensor) -> Rollouts:
    """The responses with these indexes as sampled from `policy`."""
    size = len(indexes)
    return Rollouts(
        prompts=[Prompt(0, ({"role": "user", "content": "x"},))] * size,
        prompt_ids=[PROMPT] * size,
        response_ids=[RESPONSES[i] for i in indexes],
        rollout_logprobs=[np.full(LENGTH, policy[i].item() / LENGTH, np.float32) for i in indexes],
        response_texts=[TEXTS[i] for i in indexes],
        finish_reasons=("length",) * size,
        policy_versions=[np.zeros(LENGTH, dtype=np.int64)] * size,
        temperature=1.0,
    )


def train(learner, rank: int, graph) -> tuple[Written, Written]:
    """What the policy writes before and after PPO on `graph`."""
    lm, rng = learner._models.policy.module.lm, np.random.default_rng(0)
    reward = build_reward(graph)
    start = log_policy(lm)
    proxy = torch.from_numpy(reward.score(rollouts_of(np.arange(len(TEXTS)), start)).scores)
    for _ in range(NUM_STEPS):
        policy = log_policy(lm)
        rollouts = rollouts_of(rng.choice(len(TEXTS), size=BATCH, p=policy.softmax(0).numpy()), policy)
        learner.update([rollouts], [reward.score(rollouts)])
    return written_by(start, proxy), written_by(log_policy(lm), proxy)


def written_by(log_probabilities: Tensor, proxy: Tensor) -> Written:
    probabilities = log_probabilities.softmax(0)
    return Written(*((probabilities @ values).item() for values in (proxy, GOLD, MARKS)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(node)`: what policies write before and after training on the ensemble under a node."""
    folder = str(tmp_path_factory.mktemp("hacking"))
    tiny_model(vocab_size=len(LETTERS), seed=0).save_pretrained(folder)

    def run(node: dict[str, Any]) -> tuple[Written, Written]:
        config = make_config(
            folder,
            num_steps=NUM_STEPS,
            rollout={
                "prompts_per_step": BATCH,
                "group_size": 1,
                "sampling": {"max_response_tokens": LENGTH},
                "importance_cap": None,
            },
            reward={"graph": ensemble(node)},
            learner={"lr": 4e-3, "micro_batch_tokens": 4096},
            objective={
                "kl": {"coef": BETA},
                "gae_lambda": 1.0,
                "num_epochs": 2,
                "critic": {"trunk": "shared", "lr": 3e-2, "value_clip_eps": None},
            },
        )
        return run_ranks(train, config, config.reward.graph)[0]

    return run


def test_the_mean_is_hacked_and_the_lower_confidence_bound_is_not(trained):
    before, hacked = trained({"kind": "lower_confidence", "coef": 0})
    assert hacked.proxy > before.proxy + 1, "the estimate rose a lot"
    assert hacked.marks > 0.8 > 0.2 > before.marks, "by the mark that one member of five pays for"
    assert hacked.gold < 0.15 < 0.2 < before.gold, "and what is wanted got lost"
    before, bounded = trained({"kind": "lower_confidence", "coef": 1})
    assert bounded.proxy > before.proxy + 0.3
    assert bounded.marks < 0.01 < 0.05 < before.marks, "one standard deviation is more than the mark adds to the mean"
    assert bounded.gold > before.gold + 0.3, "so that only what is wanted pays"
