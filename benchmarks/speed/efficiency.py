"""(b) A synchronous step against its parts alone: vLLM without anything else, and the learner without anything else.

Efficiency is (vLLM alone + learner alone) / step. What keeps it below 1 is weight sync, scoring, Ray and the driver.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alone
import ours
import workload as work

from raylhf.models.chat import encode_prompt
from raylhf.models.load import load_tokenizer

NAME = "grpo"
NUM_FIRST = 2
"""Steps that are left out on all three sides."""


def measure(folder: Path, *, runs: int, steps: int, turn: Callable[[], Any]) -> dict[str, Any]:
    """Medians of all runs, which are taken in turn."""
    workload, total = work.WORKLOADS[NAME], NUM_FIRST + steps
    data, model = work.write_data(workload, folder / "data", steps=total), ours.model_folder()
    settings = ours.settings(workload, data, folder, steps=total)
    prompts = prompt_ids(workload, data, model)
    whole: list[dict[str, float]] = []
    parts: dict[str, list[float]] = {"vllm_alone_s": [], "learner_alone_s": []}
    efficiencies = []
    for number in range(runs):
        with turn():
            own = ours.run(workload, data, folder / f"raylhf_{number}", steps=total)["steps"][NUM_FIRST - 1 :]
        with turn():
            sampled = alone.vllm_alone(settings, model, prompts)
        with turn():
            learnt = alone.learner_alone(settings, model, prompts[-1], sampled["responses"], steps=total)
        seconds = [statistics.median(found["seconds"][NUM_FIRST:]) for found in (sampled, learnt)]
        for name, value in zip(parts, seconds, strict=True):
            parts[name].append(value)
        efficiencies.append(sum(seconds) / statistics.median(step["seconds"] for step in own))
        whole += own
    step = {key: statistics.median(row[key] for row in whole) for key in whole[0]}
    return {
        "efficiency": statistics.median(efficiencies),
        "efficiencies": efficiencies,
        **{name: statistics.median(values) for name, values in parts.items()},
        "step": step,
        "driver_share": statistics.median(row["driver_cpu_s"] / row["seconds"] for row in whole),
        "others": statistics.median(row["others"] for row in whole),
    }


def prompt_ids(workload: work.Workload, data: Path, model: str) -> list[list[list[int]]]:
    """Of each step."""
    tokenizer = load_tokenizer(model)
    texts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [ids[start : start + workload.prompts] for start in range(0, len(ids), workload.prompts)]
