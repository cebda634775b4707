"""(a) Whole steps against TRL: the two sides run in turn, and each pair of runs gives a ratio of throughputs."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ours
import peer
import workload as work
from machine import calm

NUM_FIRST = 1
"""Steps of a run that are left out: memory is allocated, and raylhf's has no beginning that is seen from outside."""


def measure(
    name: str, folder: Path, *, runs: int, steps: int, turn: Callable[[], Any], note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """`runs` runs of each side with `steps` measured steps; `note` gets what is known after each pair of runs."""
    workload, total = work.WORKLOADS[name], NUM_FIRST + steps
    data = work.write_data(workload, folder / "data", steps=total)
    python, model = peer.environment(folder.parent / "trl-env"), ours.model_folder()
    sides: dict[str, list[dict[str, Any]]] = {"raylhf": [], "trl": []}
    for number in range(runs):
        with turn():  # one after the other, so that both meet the machine as it is now
            sides["raylhf"].append(ours.run(workload, data, folder / f"raylhf_{number}", steps=total))
            sides["trl"].append(peer.run(python, workload, data, folder / f"trl_{number}", model=model, steps=total))
        note(summary(sides))
    return summary(sides)


def summary(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Throughputs, their ratios, and what a median step consists of on each side."""
    kept = {side: [calm(run["steps"][NUM_FIRST - 1 :]) for run in found] for side, found in sides.items()}
    rates = {side: [throughput(steps) for steps in found] for side, found in kept.items()}
    ratios = [mine / other for mine, other in zip(rates["raylhf"], rates["trl"], strict=True)]
    return {
        "tokens_per_s": rates,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "step": {side: median_step([step for steps in found for step in steps]) for side, found in kept.items()},
        "startup_s": {side: statistics.median(run["startup_s"] for run in found) for side, found in sides.items()},
    }


def throughput(steps: list[dict[str, float]]) -> float:
    """Tokens trained on (prompts and responses, no padding) per second of all the steps."""
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of every number."""
    return {key: statistics.median(step.get(key, 0.0) for step in steps) for key in steps[0]}
