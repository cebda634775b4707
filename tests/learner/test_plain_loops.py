"""The whole PPO step against plain loops: one response at a time, no padding, no masks, torch's own AdamW.

Nothing of raylhf but the settings is used on this side. Three updates in a row must give the same weights, over
responses of which one is empty and another one's score is invalid.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import make_config, run_ranks, share_of, weights_of, write_model
from transformers import AutoModelForCausalLM

from raylhf.config import RunConfig
from raylhf.config.objective import PPOConfig

SEEDS = (0, 1, 2)
TEMPERATURE = 0.8  # of stand_ins.scored_groups
TOLERANCE = 5e-6

CASES: dict[str, dict[str, Any]] = {
    "gae": {
        "kl": {"coef": 0.1},
        "dual_clip": 1.5,
        "entropy_coef": 0.02,
        "gamma": 0.9,
        "critic": {"trunk": "shared", "lr": 1e-2},
    },
    "gae with the KL in the loss": {
        "kl": {"coef": 0.5, "placement": "loss"},
        "aggregation": "seq_mean",
        "critic": {"trunk": "shared", "lr": 1e-2},
    },
    "gae with a bootstrap": {"bootstrap_truncated": True, "critic": {"trunk": "shared", "lr": 1e-2}},
    "rloo": {"advantage": "rloo", "kl": {"coef": 0.5}, "aggregation": "seq_sum_constant", "clip_eps_high": 0.3},
    "grpo": {"advantage": "grpo", "kl": {"coef": 0.5}},
    "reinforce_pp": {"advantage": "reinforce_pp", "kl": {"coef": 0.5}},
}


class PlainPolicy:
    """The model, a value head and AdamW."""

    def __init__(self, folder: str, config: RunConfig) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.reference = copy.deepcopy(self.model)
        self.head = torch.nn.Linear(64, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        groups = [{"params": list(self.model.parameters()), "lr": config.learner.lr}]
        if config.critic is not None:
            groups.append({"params": list(self.head.parameters()), "lr": config.critic.lr})
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.learner.adam_betas, eps=config.learner.adam_eps, weight_decay=0.0
        )

    def look_at(self, model, row):
        """Log-probability, entropy and value at each response token, and the value after the last one."""
        tokens = torch.tensor(np.concatenate([row["prompt"], row["response"]]))[None]
        output = model(tokens, output_hidden_states=True)
        start, length = len(row["prompt"]) - 1, len(row["response"])
        log_policy = (output.logits[0, start : start + length] / TEMPERATURE).log_softmax(-1)
        logprobs = torch.stack([log_policy[t, token] for t, token in enumerate(row["response"])])
        values = self.head(output.hidden_states[-1][0].detach())[:, 0]
        entropies = -(log_policy.exp() * log_policy).sum(-1)
        return logprobs, entropies, values[start : start + length], values[start + length]


def ppo_of(config: RunConfig) -> PPOConfig:
    """The objective's settings."""
    assert isinstance(config.objective, PPOConfig)
    return config.objective


def rows_of(seed: int) -> list[dict[str, Any]]:
    """The responses that count, one dictionary each."""
    rows = []
    for group, (rollouts, rewards) in enumerate(zip(*share_of(0, 1, seed=seed), strict=True)):
        for j in range(2):
            if rewards.valid[j]:
                rows.append(
                    {
                        "group": group,
                        "prompt": rollouts.prompt_ids[j],
                        "response": rollouts.response_ids[j],
                        "rollout": rollouts.rollout_logprobs[j],
                        "score": float(rewards.scores[j]),
                        "is_cut": rollouts.finish_reasons[j] == "length",
                    }
                )
    return rows


def shape_and_credit(rows, policy: PlainPolicy, config: RunConfig) -> None:
    """Token rewards, then advantages (and returns) by the definition of each estimator."""
    objective = ppo_of(config)
    for row in rows:
        with torch.no_grad():
            row["old"], _, row["values"], after = policy.look_at(policy.model, row)
            row["ref"] = policy.look_at(policy.reference, row)[0]
        coef = objective.kl.coef if objective.kl.placement == "reward" else 0.0
        row["rewards"] = [
            -coef * (old - ref) for old, ref in zip(row["old"].tolist(), row["ref"].tolist(), strict=True)
        ]
        row["rewards"][-1] += row["score"]
        row["after"] = after.item() if objective.bootstrap_truncated and row["is_cut"] else 0.0
    for row in rows:
        length = len(row["response"])
        if objective.advantage == "gae":
            deltas = [
                row["rewards"][t]
                + objective.gamma * (row["values"][t + 1].item() if t + 1 < length else row["after"])
                - row["values"][t].item()
                for t in range(length)
            ]
            decay = objective.gamma * objective.gae_lambda
            row["advantages"] = [sum(decay ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
            row["returns"] = [a + v for a, v in zip(row["advantages"], row["values"].tolist(), strict=True)]
        elif objective.advantage == "reinforce_pp":
            row["advantages"] = [sum(row["rewards"][t:]) for t in range(length)]
        else:
            row["advantages"] = [group_advantage(row, rows, objective.advantage)] * length
    if objective.advantage in ("gae", "reinforce_pp"):
        everything = np.array([a for row in rows for a in row["advantages"]])
        for row in rows:
            row["advantages"] = [
                (a - everything.mean()) / math.sqrt(everything.var() + 1e-8) for a in row["advantages"]
            ]


def group_advantage(row, rows, estimator: str) -> float:
    """The response's total against those of its group."""
    total = sum(row["rewards"])
    group = [sum(other["rewards"]) for other in rows if other["group"] == row["group"]]
    if len(group) < 2:
        return 0.0
    if estimator == "rloo":
        return total - (sum(group) - total) / (len(group) - 1)
    return (total - float(np.mean(group))) / (float(np.std(group, ddof=1)) + 1e-4)


def token_loss(row, t: int, logprob, entropy, value, config: RunConfig):
    """(policy loss, value loss) of one token, before any averaging."""
    objective = ppo_of(config)
    ratio, advantage = torch.exp(logprob - row["old"][t]), row["advantages"][t]
    high = objective.clip_eps_high or objective.clip_eps
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - objective.clip_eps, 1 + high) * advantage)
    if objective.dual_clip and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-objective.dual_clip * advantage))
    assert config.rollout.importance_cap is not None
    loss = loss * min(math.exp(row["old"][t].item() - row["rollout"][t]), config.rollout.importance_cap)
    loss = loss - objective.entropy_coef * entropy
    if objective.kl.placement == "loss":
        loss = loss + objective.kl.coef * ratio.detach() * (logprob - row["ref"][t]) ** 2 / 2
    if not config.critic is not None:
        return loss, torch.zeros(())
    target, width, old = row["returns"][t], objective.critic.value_clip_eps, row["values"][t]
    assert width is not None
    errors = (value - target) ** 2, (value.clamp(old - width, old + width) - target) ** 2
    return loss, torch.maximum(*errors) / 2


def train_by_loops(folder: str, config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights after one update for each seed."""
    objective, policy = ppo_of(config), PlainPolicy(folder, config)
    for seed in SEEDS:
        rows = rows_of(seed)
        shape_and_credit(rows, policy, config)
        num_tokens = sum(len(row["response"]) for row in rows)
        for _ in range(objective.num_epochs):
            total = torch.zeros(())
            for row in rows:
                length = len(row["response"])
                weight = {
                    "token_mean": 1 / num_tokens,
                    "seq_mean": 1 / length / len(rows),
                    "seq_sum_constant": 1 / config.rollout.sampling.max_response_tokens / len(rows),
                }[objective.aggregation]
                logprobs, entropies, values, _ = policy.look_at(policy.model, row)
                for t in range(length):
                    loss, value_loss = token_loss(row, t, logprobs[t], entropies[t], values[t], config)
                    total = total + weight * loss + objective.critic.loss_coef * value_loss / num_tokens
            policy.optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters, config.learner.max_grad_norm)
            policy.optimizer.step()
    return {name: p.detach() for name, p in policy.model.named_parameters()}


def train_by_learner(learner, rank: int) -> dict[str, torch.Tensor]:
    for seed in SEEDS:
        learner.update(*share_of(rank, 1, seed=seed))
    return weights_of(learner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(str(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("case", CASES)
def test_three_updates_give_the_weights_that_plain_loops_give(folder, case):
    config = make_config(
        folder,
        rollout={"sampling": {"max_response_tokens": 9}},
        learner={"lr": 3e-3},
        objective={"num_epochs": 3, **CASES[case]},
    )
    expected = train_by_loops(folder, config)
    weights = run_ranks(train_by_learner, config)[0]
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert max((weights[name] - start[name]).abs().max().item() for name in weights) > 1e-2
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=TOLERANCE, msg=name)
