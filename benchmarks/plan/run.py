"""Memory that `raylhf plan` predicts against the peaks of real runs, on a CPU with SmolLM2-135M.

    python benchmarks/plan/run.py --output runs/plan

Each case is a `raylhf train` of two steps on texts as long as the settings allow. A learner's peak is the run's own
metric (the high-water mark of a rank's resident memory since its models were loaded, the largest over ranks); a rollout
worker's is the proportional set size of the worker with its engine, looked at twice a second. A complete run is not
repeated. results.json and table.md go beside this file.
"""

import argparse
import json
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from runs import rows_with, train_once

from raylhf.config.load import load_any_config
from raylhf.config.memory import GIB
from raylhf.config.plan import resolve_plan

CONFIGS = HERE.parents[1] / "configs"
COMMON = (
    "num_steps=2",
    "data.held_out=0",
    "learner.lora=null",
    "learner.threads=1",
    "learner.num_ranks=1",
    "checkpoint.every_steps=0",
    "checkpoint.export=false",
    "tracking.console=plain",
)
SETTINGS = {
    "quickstart": (
        "rollout.prompts_per_step=8",
        "rollout.sampling.temperature=2.0",  # hardly ever ends a response before its limit
        "rollout.sampling.max_response_tokens=64",
        "objective.num_epochs=1",
        "objective.num_minibatches=1",
        "objective.kl.budget_per_sequence=null",
        "evaluation.num_samples=0",
        "data.max_prompt_tokens=100",
        "data.system_prompt=null",
    ),
    "preference_dpo": ("objective.batch_size=4", "evaluation.num_samples=0", "data.max_tokens=160"),
    "reward_pairwise": (
        "objective.batch_size=4",
        "evaluation.num_samples=0",
        "data.max_tokens=160",
        "objective.trainable_layers=null",
    ),
}
LORA = "learner.lora={rank: 16, alpha: 32}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "PPO, ZeRO-0": ("quickstart", ("learner.zero_stage=0", "learner.micro_batch_tokens=656")),
    "PPO, ZeRO-2, LoRA, 2 ranks": (
        "quickstart",
        ("learner.zero_stage=2", "learner.micro_batch_tokens=656", LORA, "learner.num_ranks=2"),
    ),
    "DPO, ZeRO-1": ("preference_dpo", ("learner.zero_stage=1", "learner.micro_batch_tokens=640")),
    "DPO, ZeRO-2, 320 tokens in a pass": ("preference_dpo", ("learner.zero_stage=2", "learner.micro_batch_tokens=320")),
    "DPO, ZeRO-2, 2 ranks": (
        "preference_dpo",
        ("learner.zero_stage=2", "learner.micro_batch_tokens=320", "learner.num_ranks=2"),
    ),
    "DPO, ZeRO-3, 2 ranks": (
        "preference_dpo",
        ("learner.zero_stage=3", "learner.micro_batch_tokens=320", "learner.num_ranks=2"),
    ),
    "DPO, ZeRO-2, checkpointing": (
        "preference_dpo",
        ("learner.zero_stage=2", "learner.micro_batch_tokens=640", "learner.gradient_checkpointing=true"),
    ),
    "DPO, ZeRO-0, LoRA": ("preference_dpo", ("learner.zero_stage=0", "learner.micro_batch_tokens=640", LORA)),
    "DPO, ZeRO-0, LoRA, checkpointing": (
        "preference_dpo",
        ("learner.zero_stage=0", "learner.micro_batch_tokens=1280", LORA, "learner.gradient_checkpointing=true"),
    ),
    "reward model, ZeRO-2": ("reward_pairwise", ("learner.zero_stage=2", "learner.micro_batch_tokens=640")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/plan"), help="folder of the runs")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts = write_texts(arguments.output)
    for name in arguments.cases:
        row = compare(name, arguments.output, texts)
        print(json.dumps(row), flush=True)
    rows = [row for name in CASES if (row := stored(name, arguments.output))]
    (HERE / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows))
    print(table(rows))


def folder_of(name: str, output: Path) -> Path:
    return output / re.sub(r"\W+", "_", name).lower()


def stored(name: str, output: Path) -> dict[str, Any] | None:
    file = folder_of(name, output) / "comparison.json"
    return json.loads(file.read_text()) if file.exists() else None


def write_texts(folder: Path) -> dict[str, Path]:
    """Prompts of 100 tokens with the chat template's, and pairs longer than any limit here."""
    words = "time water place world house point hand part year week"
    # A number first: equal prompts would share one copy.
    prompts = [{"prompt": " ".join([str(number), *(words.split() * 7)[:68]])} for number in range(10, 42)]
    long = " ".join([*words.split()] * 30)
    pairs = [{"prompt": f"Question {i}", "chosen": f"{i} {long}", "rejected": f"No {i} {long}"} for i in range(16)]
    files = {}
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        files[name] = (folder / f"{name}.jsonl").resolve()
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def compare(name: str, output: Path, texts: dict[str, Path]) -> dict[str, Any]:
    """Run a case, unless it is done, and put prediction and measurement side by side."""
    folder = folder_of(name, output)
    base, own = CASES[name]
    texts_of = texts["prompts" if base == "quickstart" else "pairs"]
    overrides = [*COMMON, *SETTINGS[base], f"data.path={texts_of}", *own]
    path = CONFIGS / f"{base}.yaml"
    if (found := stored(name, output)) is None:
        watch = Watch(folder)
        train_once(path, folder, overrides)
        peak = max(row["memory/learner_peak_gib"] for row in rows_with(folder, "memory/learner_peak_gib"))
        found = {"learner_gib": round(peak, 2)} | watch.stop()
    return found | written(folder, name, path, overrides, found)


def written(folder: Path, name: str, path: Path, overrides: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
    """The comparison with what the planner says now, kept beside the run."""
    plan = resolve_plan(load_any_config(path, overrides))
    row = {"case": name, **{key: found[key] for key in ("learner_gib", "rollout_gib") if key in found}}
    for estimate in plan.memory:
        if (measured := row.get(f"{estimate.role}_gib")) is None:
            continue
        phase = max((p for p in estimate.phases if p.name != "load"), key=lambda p: p.host_bytes)
        predicted = phase.host_bytes / GIB
        row[f"{estimate.role}_predicted_gib"] = round(predicted, 2)
        row[f"{estimate.role}_error"] = round(predicted / measured - 1, 3)
        row[f"{estimate.role}_phase"] = phase.name
    (folder / "comparison.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


class Watch:
    """Looks at the memory of a run's rollout workers until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        self._is_over.set()
        self._thread.join()
        return {"rollout_gib": round(self._peak / GIB, 2)} if self._peak else {}

    def _look(self) -> None:
        while not self._is_over.wait(0.5):
            for log in (self._folder / "logs").glob("rollout-*.log"):
                for pid in re.findall(r"^--- process (\d+) starts", log.read_text(errors="replace"), re.MULTILINE):
                    self._peak = max(self._peak, size_of_tree(int(pid)))


def size_of_tree(pid: int) -> int:
    """Proportional set size of a process and those below it; 0 when it is gone."""
    try:
        own = psutil.Process(pid)
        return sum(each.memory_full_info().pss for each in [own, *own.children(recursive=True)])
    except psutil.Error:
        return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| run | worker | fullest phase | predicted GiB | measured GiB | error |", "|---|---|---|--:|--:|--:|"]
    for row in rows:
        for role in ("learner", "rollout"):
            if f"{role}_gib" in row:
                cells = [row["case"], role, row[f"{role}_phase"], f"{row[f'{role}_predicted_gib']:.2f}"]
                cells += [f"{row[f'{role}_gib']:.2f}", f"{row[f'{role}_error']:+.0%}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
