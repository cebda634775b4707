"""Stored judgements, settings and models for tests of preference optimisation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_stand_ins import write_rows
from transformers import AutoModelForCausalLM

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.config.run import PreferenceRunConfig, RunConfig
from raylhf.models.tiny import write_tiny_model

NUM_GROUPS = 6

PAIRS: tuple[dict[str, Any], ...] = (
    {"prompt": "p0", "chosen": "abc", "rejected": "hgfed", "agreement": 0.9},
    {"prompt": "p0", "chosen": "abc", "rejected": "x y"},
    {"prompt": "p1", "chosen": "a good one", "rejected": "bad", "agreement": 0.6},
    {"prompt": "p2", "chosen": "aa", "rejected": "bbbb"},
    {"prompt": "p2", "chosen": "bbbb", "rejected": "c"},
    {"prompt": "p3", "chosen": "ok", "rejected": ""},
)
"""Comparisons that share responses, and one with an empty response."""
RANKINGS: tuple[dict[str, Any], ...] = (
    {"prompt": "p0", "responses": ["abc", "hgfed", "x y"], "ranks": [2, 1, 3]},
    {"prompt": "p1", "responses": ["a good one", "bad", "c", "dd"], "ranks": [2, 1, 2, 3]},
    {"prompt": "p2", "responses": ["aa", "bbbb", "c", "e"], "ranks": [None, 2, 1, None]},
    {"prompt": "p3", "responses": ["ok", ""]},
)
"""Rankings: whole, with a tie, and of the two best alone."""
SCORES: tuple[dict[str, Any], ...] = (
    {"prompt": "p0", "responses": ["abc", "hgfed", "x y"], "scores": [1.0, 0.2, None]},
    {"prompt": "p1", "responses": ["a good one", "bad"], "scores": [0.5, 0.4]},
)
"""Scores around 0.5; one is missing."""
STEPS: tuple[dict[str, Any], ...] = (
    {"prompt": "p0", "chosen": "one\n\ntwo\n\nend", "rejected": "one\n\ntoo\n\nbad end"},
    {"prompt": "p1", "chosen": "yes", "rejected": "no\n\nmore"},
    {"prompt": "p2", "chosen": "x\n\ny\n\nz", "rejected": "x\n\ny\n\nw"},
)
"""Solutions in steps."""
RESPONSES: tuple[dict[str, Any], ...] = (
    {"prompt": "p0", "response": "abc"},
    {"prompt": "p1", "response": "a good one"},
    {"prompt": "p2", "response": ""},
)
"""Examples of good responses."""


def full_pairs() -> list[dict[str, Any]]:
    """The comparisons with everything that a row may say."""
    return [
        {
            **row,
            "time": i - 2.5,
            "chosen_rewards": {"calm": 0.1 * i, "brief": 1.0},
            "rejected_rewards": {"calm": 0.5, "brief": -0.2 * i},
        }
        for i, row in enumerate(PAIRS)
    ]


def write_data(folder: Path) -> dict[str, str]:
    """Paths of the judgements, by name."""
    data = {"pairs": full_pairs(), "rankings": RANKINGS, "scores": SCORES, "steps": STEPS, "responses": RESPONSES}
    data["two prompts"] = full_pairs()[:3]
    return {name: write_rows(folder / f"{name}.jsonl", list(rows)) for name, rows in data.items()}


def write_models(folder: Path) -> dict[str, str]:
    """Folders of the start, and of the reference and the guide, which are a little way from it."""
    folders = {"start": write_tiny_model(folder / "start")}
    for seed, name in enumerate(("reference", "guide"), start=1):
        model = AutoModelForCausalLM.from_pretrained(folders["start"], dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        folders[name] = str(folder / name)
        model.save_pretrained(folders[name])
    return folders


def make_preference_config(folder: str, path: str, **sections: Any) -> PreferenceRunConfig:
    """A run on the model in `folder` with all judgements in one batch; keyword arguments replace single settings."""
    raw: dict[str, Any] = {
        "name": "test",
        "num_steps": 3,
        "model": {"path": folder},
        "data": {"path": path, "kind": "pairs", "held_out": 0},
        "objective": {"kind": "preference", "batch_size": 64},
        "learner": {"zero_stage": 0, "lr": 5e-3, "adam_eps": 1e-3, "micro_batch_tokens": 100},
    }
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return PreferenceRunConfig.model_validate(raw)


def put_reference(worker: Any, folder: str) -> None:
    """Let the worker's reference be the model in `folder`: policy and reference differ from the first step on."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    if worker._models.reference is not None:
        worker._models.reference.lm.load_state_dict(state)


def policy_weights(worker: Any) -> dict[str, torch.Tensor]:
    """The policy's full weights by checkpoint name."""
    from raylhf.learner.weight_source import PolicyWeights

    return {name: weight.clone() for name, weight in PolicyWeights(worker._models.policy.module.lm)}


def make_online_config(folder: str, *, group_size: int = 4, **sections: Any) -> RunConfig:
    """A run of six prompts a step; keyword arguments replace single settings."""
    raw: dict[str, Any] = {
        "name": "test",
        "num_steps": 10,
        "model": {"path": folder},
        "data": {"path": "unused"},
        "rollout": {"prompts_per_step": NUM_GROUPS, "group_size": group_size},
        "reward": {"graph": {"kind": "format"}},
        "objective": {"kind": "online_dpo", "pairs": {"kind": "all_pairs"}},
        "learner": {"zero_stage": 0, "lr": 5e-3, "adam_eps": 1e-3, "micro_batch_tokens": 100},
    }
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return RunConfig.model_validate(raw)


def scored_groups(
    seed: int, *, group_size: int = 4, ties_from: int = NUM_GROUPS
) -> list[tuple[Rollouts, RewardOutput]]:
    """Six groups of ragged responses, with the scores of three ensemble members.

    In group 0 one response is empty, in 1 one score is invalid, in 2 two responses are the same tokens with different
    scores and in 3 two scores are equal. From group `ties_from` on, all scores of a group are equal.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(NUM_GROUPS):
        prompt_ids = rng.integers(0, 256, int(rng.integers(2, 9)))
        responses = [rng.integers(0, 256, int(n)) for n in rng.integers(1, 9, group_size)]
        valid = np.ones(group_size, dtype=bool)
        members = rng.normal(size=(group_size, 3))
        if index == 0:
            responses[-1], valid[-1] = responses[-1][:0], False
        if index == 1:
            valid[0] = False
        if index == 2:
            responses[1] = responses[0]
        if index == 3:
            members[1] = members[0]
        if index >= ties_from:
            members[:] = members[0]
        rollouts = Rollouts(
            prompts=[Prompt(index, ({"role": "user", "content": "x"},))] * group_size,
            prompt_ids=[prompt_ids] * group_size,
            response_ids=responses,
            rollout_logprobs=[np.full(len(ids), -3.4, dtype=np.float32) for ids in responses],
            response_texts=[""] * group_size,
            finish_reasons=("stop",) * group_size,
            policy_versions=[np.zeros(len(ids), dtype=np.int64) for ids in responses],
            temperature=0.8,
        )
        scores = np.where(valid, members.mean(axis=1), np.nan)
        parts = dict(zip("abc", np.where(valid[:, None], members, np.nan).T, strict=True))
        groups.append((rollouts, RewardOutput(scores=scores, valid=valid, parts=parts)))
    return groups


def share_of(groups: list[tuple[Rollouts, RewardOutput]], rank: int, num_ranks: int) -> Any:
    """What LearnerWorker.update is called with on this rank."""
    size = len(groups) // num_ranks
    rollouts, rewards = zip(*groups[rank * size :][:size], strict=True)
    return list(rollouts), list(rewards)
