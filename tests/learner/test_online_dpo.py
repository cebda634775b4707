"""Online preference optimisation against plain loops over single responses, and what it does where it cannot learn."""

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from preference_stand_ins import (
    make_online_config,
    make_preference_config,
    policy_weights,
    scored_groups,
    share_of,
    write_data,
)
from reward_stand_ins import on_ranks
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM

from raylhf.batch import RewardOutput
from raylhf.config.preference import PairsConfig
from raylhf.config.run import PreferenceRunConfig
from raylhf.learner.online_dpo import pair_weight
from raylhf.learner.preference_update import embedding_penalty
from raylhf.models.tiny import write_tiny_model

NUM_UPDATES = 2
TEMPERATURE = 0.8  # of preference_stand_ins.scored_groups
BETA = 0.5
TOLERANCE = 5e-6

SOFT = "labels that are probabilities"
CASES: dict[str, dict[str, Any]] = {
    "best and worst": {"pairs": {"kind": "best_worst"}},
    "near ties": {"pairs": {"kind": "all_pairs", "tie_margin": 0.4}},
    "small gaps weigh less": {"pairs": {"kind": "all_pairs", "full_weight_gap": 0.8}},
    "members must agree": {
        "pairs": {"kind": "all_pairs", "full_weight_gap": 0.8, "weight_by_agreement": True, "parts": ["a", "b", "c"]}
    },
    "better in no member": {"pairs": {"kind": "pareto", "parts": ["a", "c"]}},
    SOFT: {"pairs": {"kind": "all_pairs", "soft_labels": True}},
    "epochs of minibatches": {"pairs": {"kind": "best_worst"}, "num_epochs": 2, "num_minibatches": 3},
    "the reference follows": {"pairs": {"kind": "best_worst"}, "reference": {"every_steps": 1, "mix": 0.3}},
    "the first wrong step": {"pairs": {"kind": "first_wrong_step"}},
}
"""Settings of the objective."""
NOTHING = ("dpo", "kto", "plackett_luce", "kldpo", "beta_dpo", "alpha_dpo", "tdpo2")
"""Losses that meet batches without a single comparison."""
RESUMED = {
    "a moved reference": {"objective": {"reference": {"every_steps": 1, "mix": 0.3}}},
    "beta-DPO's averages": {"objective": {"loss": {"kind": "beta_dpo"}}},
    "alpha-DPO's averages": {"objective": {"loss": {"kind": "alpha_dpo"}}},
}
"""Runs whose checkpoint must hold more than the policy."""
RESUMED_OFFLINE = {
    "AuxDPO's offsets, offline": {"objective": {"loss": {"kind": "aux_dpo", "offset_lr": 0.3}}},
    "a moved reference, offline": {"objective": {"reference": {"every_steps": 2, "mix": 0.5}}},
}
"""The same of runs on stored judgements."""


def batch_of(update: int, *, with_steps: bool) -> list[Any]:
    """Groups of scored responses; with steps, every second token ends a step whose score is its own."""
    groups = scored_groups(update)
    if not with_steps:
        return groups
    rng, stepped = np.random.default_rng(update), []
    for rollouts, rewards in groups:
        dense = [np.zeros(len(ids), dtype=np.float32) for ids in rollouts.response_ids]
        for own in dense:
            own[1::2] = rng.choice([-0.5, 0.5], len(own[1::2]))
        scores = np.where(rewards.valid, [own.sum() for own in dense], np.nan)
        stepped.append((rollouts, RewardOutput(scores=scores, valid=rewards.valid, token_scores=dense)))
    return stepped


# --- the plain side ---------------------------------------------------------------------------------------------------


def comparisons(rollouts: Any, rewards: Any, pairs: PairsConfig) -> list[tuple[Any, Any, float]]:
    """(chosen, rejected, weight) of one group, a pair in both orders where labels are soft.

    A response is (position, tokens that count).
    """
    rows = [j for j in range(len(rollouts)) if rewards.valid[j]]
    if pairs.kind == "first_wrong_step":
        return wrong_steps(rows, rewards.token_scores)
    scores, found = rewards.scores, []
    every: Iterable[tuple[int, int]] = itertools.combinations(rows, 2)
    if pairs.kind == "best_worst":
        every = [(max(rows, key=lambda j: scores[j]), min(rows, key=lambda j: scores[j]))]
    for pair in every:
        won, lost = sorted(pair, key=lambda j: -scores[j])
        same = rollouts.response_ids[won].tolist() == rollouts.response_ids[lost].tolist()
        gap = scores[won] - scores[lost]
        if (gap <= pairs.tie_margin and not pairs.soft_labels) or same:
            continue
        members = [rewards.parts[name][won] - rewards.parts[name][lost] for name in pairs.parts]
        if pairs.kind == "pareto" and min(members) < 0:
            continue
        weight = 1.0 if pairs.full_weight_gap is None else min(1.0, gap / pairs.full_weight_gap)
        if pairs.weight_by_agreement:
            share = sum(member > 0 for member in members) / 3
            weight *= max(0.0, (share - 0.5) / 0.5)
        right = 1 / (1 + math.exp(-gap)) if pairs.soft_labels else 1.0
        found.append(((won, slice(None)), (lost, slice(None)), weight * right))
        if pairs.soft_labels:
            found.append(((lost, slice(None)), (won, slice(None)), 1 - right))
    return found


def wrong_steps(rows: list[int], token_scores: Any) -> list[tuple[Any, Any, float]]:
    """The response whose first wrong step comes last, up to there, against the first wrong step that comes first."""
    first = {j: next((t for t, s in enumerate(token_scores[j]) if s < 0), math.inf) for j in rows}
    worst = min(rows, key=lambda j: (first[j], token_scores[j].sum(), j))
    best = max(rows, key=lambda j: (first[j], token_scores[j].sum(), -j))
    if first[best] == first[worst]:
        return []
    right = slice(None) if math.isinf(first[best]) else slice(0, int(first[best]) - 1)
    wrong = int(first[worst])
    return [((best, right), (worst, slice(wrong - 1, wrong + 1)), 1.0)]


def log_ratio(model: Any, reference: Any, rollouts: Any, row: int, counted: slice) -> torch.Tensor:
    """Summed over the tokens that count."""
    prompt, response = rollouts.prompt_ids[row].tolist(), rollouts.response_ids[row].tolist()
    tokens, total = torch.tensor([prompt + response]), torch.zeros(())
    with torch.no_grad():
        log_reference = (reference(tokens).logits[0] / TEMPERATURE).log_softmax(-1)
    log_policy = (model(tokens).logits[0] / TEMPERATURE).log_softmax(-1)
    for t in range(len(response))[counted]:
        at = len(prompt) + t - 1
        total = total + log_policy[at, response[t]] - log_reference[at, response[t]]
    return total


def train_by_loops(folder: str, config: Any) -> dict[str, torch.Tensor]:
    """The weights after the updates, and those of the reference."""
    objective, settings = config.objective, config.learner
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.adam_betas, eps=settings.adam_eps, weight_decay=0.0
    )
    for update in range(NUM_UPDATES):
        groups = batch_of(update, with_steps=objective.pairs.kind == "first_wrong_step")
        for epoch in range(objective.num_epochs):
            order = np.random.default_rng((config.seed, update, epoch, 0)).permutation(len(groups))
            for part in np.array_split(order, objective.num_minibatches):
                total, num_pairs = torch.zeros(()), 0
                for rollouts, rewards in (groups[g] for g in part):
                    for chosen, rejected, weight in comparisons(rollouts, rewards, objective.pairs):
                        gap = log_ratio(model, reference, rollouts, *chosen)
                        gap = gap - log_ratio(model, reference, rollouts, *rejected)
                        total = total + weight * softplus(-BETA * gap)
                        num_pairs += 0.5 if objective.pairs.soft_labels else 1  # both orders of a pair are there
                optimizer.zero_grad()
                (total / num_pairs).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
        if objective.reference.every_steps:
            mix = objective.reference.mix
            for own, other in zip(reference.parameters(), model.parameters(), strict=True):
                own.data = (1 - mix) * own.data + mix * other.data
    return {name: p.detach() for name, p in model.named_parameters()} | {
        f"reference {name}": p.detach() for name, p in reference.named_parameters()
    }


# --- the learner ------------------------------------------------------------------------------------------------------


def run_everything(ranks, plain, nothing, resumed, folder):
    """All runs of this file, in one process."""
    return {
        "plain": {case: train(ranks, config) for case, config in plain.items()},
        "nothing": {kind: learn_nothing(ranks, config) for kind, config in nothing.items()},
        "resumed": {case: save_and_resume(ranks, config, f"{folder}/{case}") for case, config in resumed.items()},
    }


def train(ranks, config):
    """Weights of policy and reference, and the metrics of the last update."""
    worker, metrics = ranks.start(config), {}
    for update in range(NUM_UPDATES):
        metrics = worker.update(*share_of(batch_of(update, with_steps="wrong" in config.objective.pairs.kind), 0, 1))
    reference = {f"reference {name}": p.clone() for name, p in worker._models.reference.lm.named_parameters()}
    return policy_weights(worker) | reference, metrics


def learn_nothing(ranks, config):
    """Weights and what the loss remembers before and after batches of ties, and of invalid scores; their metrics."""
    worker = ranks.start(config)
    worker.update(*share_of(scored_groups(0), 0, 1))
    before = policy_weights(worker), worker._objective.state_dict()["loss"]
    ties = worker.update(*share_of(scored_groups(1, ties_from=0), 0, 1))
    invalid = [
        (rollouts, RewardOutput(np.full(4, np.nan), np.zeros(4, dtype=bool))) for rollouts, _ in scored_groups(2)
    ]
    failed = worker.update(*share_of(invalid, 0, 1))
    return before, (policy_weights(worker), worker._objective.state_dict()["loss"]), ties, failed


def save_and_resume(ranks, config, folder):
    """Weights after three updates, and after three of which the last is left to a new worker."""

    def update(worker, step):
        if isinstance(config, PreferenceRunConfig):
            return worker.update(step)
        return worker.update(*share_of(scored_groups(step), 0, 1))

    straight, before, after = ranks.start(config), ranks.start(config), ranks.start(config)
    for step in range(3):
        update(straight, step)
    for step in range(2):
        update(before, step)
    before.save(folder)
    after.load(folder)
    update(after, 2)
    return policy_weights(straight), policy_weights(after)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("online") / "tiny")


@pytest.fixture(scope="module")
def configs(folder) -> dict[str, Any]:
    """Settings of the runs against plain loops."""
    loss = {case: {"the first wrong step": "step_dpo", SOFT: "cdpo"}.get(case, "dpo") for case in CASES}
    return {
        case: make_online_config(folder, objective={"loss": {"kind": loss[case], "beta": BETA}, **objective})
        for case, objective in CASES.items()
    }


@pytest.fixture(scope="module")
def answers(folder, configs, tmp_path_factory):
    base = tmp_path_factory.mktemp("resumed")
    nothing = {kind: make_online_config(folder, objective={"loss": {"kind": kind}}) for kind in NOTHING}
    resumed: dict[str, Any] = {
        case: make_online_config(folder, learner={"zero_stage": 2}, **sections) for case, sections in RESUMED.items()
    }
    path = write_data(base)["pairs"]
    for case, sections in RESUMED_OFFLINE.items():
        resumed[case] = make_preference_config(folder, path, learner={"zero_stage": 2}, **sections)
    return on_ranks(run_everything, 1, configs, nothing, resumed, str(base))[0]


@pytest.mark.parametrize("case", CASES)
def test_two_updates_give_the_weights_that_plain_loops_give(folder, configs, answers, case):
    expected, (weights, metrics) = train_by_loops(folder, configs[case]), answers["plain"][case]
    start = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    assert max((weights[name] - weight).abs().max().item() for name, weight in start.items()) > 5e-3
    assert metrics["pref/pairs_count"] > 0
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=TOLERANCE, msg=f"{case}: {name}")


@pytest.mark.parametrize("kind", NOTHING)
def test_a_batch_without_a_comparison_changes_nothing_and_is_counted(answers, kind):
    (weights, state), (later_weights, later_state), ties, failed = answers["nothing"][kind]
    assert all(torch.equal(weight, later_weights[name]) for name, weight in weights.items())
    assert state == later_state
    for metrics in (ties, failed):
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["pref/pairs_count"] == metrics["policy/loss"] == metrics["policy/grad_norm"] == 0
        assert metrics["pref/unpaired_prompts_count"] == 6
    # One comparison of each pair: 6 in a group of 4, 3 in two groups with an invalid score.
    assert ties["pref/ties_count"] == 4 * 6 + 2 * 3
    assert failed["pref/ties_count"] == 0 and failed["data/dropped_responses_count"] == 24


@pytest.mark.parametrize("case", [*RESUMED, *RESUMED_OFFLINE])
def test_a_resumed_run_continues_to_the_bit(answers, case):
    straight, resumed = answers["resumed"][case]
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name


def test_the_penalty_on_a_pairs_gradients_has_its_weight_once():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 4, generator=generator, requires_grad=True)
    weights = torch.tensor([0.5, 2.0, 0.0])
    losses = inputs.sin().sum(dim=(1, 2))
    found = embedding_penalty((weights * losses).sum(), inputs, weights, rho=0.1)
    expected = 0.1 * (weights * inputs.cos().square().sum(dim=(1, 2))).sum()
    torch.testing.assert_close(found, expected)


def test_a_pair_weighs_its_gap_and_its_agreement():
    gap = PairsConfig(full_weight_gap=0.5)
    assert pair_weight(0.1, None, PairsConfig()) == 1
    assert pair_weight(0.1, None, gap) == pytest.approx(0.2)
    assert pair_weight(0.9, None, gap) == 1
    agreed = PairsConfig(weight_by_agreement=True)
    assert [pair_weight(1.0, share, agreed) for share in (None, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0, 0.5, 1]
    assert pair_weight(0.1, 0.75, gap.model_copy(update={"weight_by_agreement": True})) == pytest.approx(0.1)
