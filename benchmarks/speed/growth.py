"""(d) How cost grows: with length, batch and ranks of the learner, and with the rollout workers that the driver has."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alone
import numpy as np
import ours
import workload as work
from driver_cost import run as driver_cost

NUM_TOKENS = 2048
"""Of a step, however long its sequences are."""
LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (4, 8, 16, 32)
PROMPT_TOKENS = 32
SEQUENCE_TOKENS = 128
NUM_FIRST, NUM_STEPS = 1, 3
STAND_INS = (1, 4, 16)


def measure(folder: Path, *, turn: Callable[[], Any]) -> dict[str, Any]:
    """All four growths; the learner trains on random tokens with GRPO and a reference."""
    found: dict[str, Any] = {"length": [], "batch": [], "ranks": []}
    for length in LENGTHS:
        found["length"].append(learner(folder, length, NUM_TOKENS // length, turn=turn))
    for count in BATCHES:
        found["batch"].append(learner(folder, SEQUENCE_TOKENS, count, turn=turn))
    for ranks in (1, 2):
        for threads in (1, 2) if ranks == 1 else (1,):
            found["ranks"].append(learner(folder, SEQUENCE_TOKENS, 16, turn=turn, ranks=ranks, threads=threads))
    with turn():
        found["stand_in_workers"] = driver_cost.measure_all(STAND_INS, num_prompts=1024)
    return found


def learner(
    folder: Path, length: int, count: int, *, turn: Callable[[], Any], ranks: int = 1, threads: int = 2
) -> dict[str, Any]:
    """Seconds of an update on `count` sequences of `length` tokens."""
    workload = work.WORKLOADS["grpo"]
    settings = ours.settings(workload, folder / "none", folder, steps=8)
    settings["learner"] |= {"num_ranks": ranks, "threads": threads}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40_000, PROMPT_TOKENS).tolist() for _ in range(max(count // 2, 1))]
    responses = [[rng.integers(0, 40_000, length - PROMPT_TOKENS) for _ in range(2)] for _ in prompts]
    settings["rollout"] |= {"prompts_per_step": len(prompts), "group_size": 2}
    with turn():
        steps = NUM_FIRST + NUM_STEPS
        seconds = alone.learner_alone(settings, ours.model_folder(), prompts, responses, steps=steps)["seconds"]
    step_s, tokens = statistics.median(seconds[NUM_FIRST:]), 2 * len(prompts) * length
    row = {"length": length, "sequences": 2 * len(prompts), "ranks": ranks, "threads": threads}
    return row | {"step_s": step_s, "tokens_per_s": tokens / step_s}
