"""How well sampling hides behind learning: steps of an asynchronous run against its parts, one core for each role.

    python benchmarks/overlap/run.py --output runs/overlap

A synchronous and an asynchronous run of the same settings, with the rollout worker (and its engine) pinned to one core
and the learner to another. The asynchronous step is compared with the longer of the synchronous run's two parts. The
results go into results.json beside this file.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from runs import rows_with

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "tiny_ppo.yaml"
SETTINGS = (
    "num_steps=14",
    "rollout.prompts_per_step=32",
    "rollout.group_size=4",
    "rollout.max_num_seqs=128",
    "rollout.sampling.max_response_tokens=96",
    "objective.num_epochs=3",
    "learner.num_ranks=1",
    "learner.threads=1",
    "learner.micro_batch_tokens=2560",
    "learner.lr=1e-4",
    "evaluation.every_steps=0",
    "evaluation.num_samples=1",
    "checkpoint.export=false",
    "tracking.console=plain",
)
NUM_FIRST = 3
"""Steps that are left out: caches are cold, and the queue is filled."""
PIN_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/overlap"), help="folder of the runs")
    found = measure(parser.parse_args().output)
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measure(folder: Path) -> dict[str, Any]:
    """Both runs in `folder`, and their steps by the longer part of the synchronous one."""
    parts, ahead = (run_pinned(folder / f"staleness_{n}", f"rollout.max_staleness={n}") for n in (0, 1))
    longer = max(parts["rollout_s"], parts["learn_s"])
    return {
        "synchronous": parts,
        "asynchronous": ahead,
        "asynchronous_step_over_longer_part": round(ahead["step_s"] / longer, 3),
        "synchronous_step_over_longer_part": round(parts["step_s"] / longer, 3),
    }


def run_pinned(folder: Path, *settings: str) -> dict[str, float]:
    """Medians over the steps of one run; its processes are pinned again and again, as new ones come."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "raylhf.cli", "train", str(CONFIG), f"name={folder.name}"]
    command += [f"output_dir={folder.resolve().parent}", "checkpoint.resume=false", *SETTINGS, *settings]
    process = subprocess.Popen(command, env={**os.environ, "RAY_worker_niceness": "0"})
    while process.poll() is None:
        pin(folder, "rollout", core=0)
        pin(folder, "learner", core=1)
        time.sleep(PIN_S)
    if process.returncode != 0:
        raise SystemExit(f"the run in {folder} failed")
    rows = rows_with(folder, "time/step_s")[NUM_FIRST:]
    names = ("step_s", "rollout_s", "wait_s", "learn_s", "sync_s")
    return {name: round(statistics.median(row[f"time/{name}"] for row in rows), 3) for name in names}


def pin(folder: Path, role: str, *, core: int) -> None:
    """Keep the processes of a role, and those below them, on one core."""
    for log in (folder / "logs").glob(f"{role}-*.log"):
        for pid in re.findall(r"^--- process (\d+) starts", log.read_text(errors="replace"), re.MULTILINE):
            try:
                own = psutil.Process(int(pid))
                for each in [own, *own.children(recursive=True)]:
                    pin_threads(each, core)
            except psutil.NoSuchProcess:
                continue


def pin_threads(process: Any, core: int) -> None:
    """All threads of a process: those that are there keep what they had when only the process is told."""
    for thread in process.threads():
        try:
            os.sched_setaffinity(thread.id, {core})
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
