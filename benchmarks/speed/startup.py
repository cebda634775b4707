"""From the command to the first step, by part; and what the commands cost that train nothing.

    python benchmarks/speed/startup.py --output runs/startup.json
    python benchmarks/speed/startup.py --checkouts ../before .     # the time to the first step, in alternating runs

The parts are the run's own metrics `time/start_*`; `first_step_done_s` is the time to the console's line of step 1,
which every version prints.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("configs/tiny_ppo.yaml",)
QUICK = {"help": ["--help"], "check": ["check", "configs/quickstart.yaml"]}
NUM_QUICK = 5
TIMEOUT_S = 600.0


def measure(
    *, rounds: int = 3, configs: Sequence[str] = CONFIGS, checkouts: Sequence[Path] = (ROOT,)
) -> dict[str, Any]:
    """Medians and ranges of seconds: of the quick commands, and of each config's start by part and checkout."""
    found: dict[str, Any] = {
        name: _spread([_seconds_of(words) for _ in range(NUM_QUICK)]) for name, words in QUICK.items()
    }
    for config in configs:
        runs: dict[str, list[dict[str, float]]] = {str(checkout): [] for checkout in checkouts}
        for _ in range(rounds):
            for checkout in checkouts:
                runs[str(checkout)].append(first_step(checkout, config))
        found[config] = {
            "this checkout" if Path(name) == ROOT else name: {
                key: _spread([part[key] for part in parts]) for key in parts[0]
            }
            for name, parts in runs.items()
        }
    return found


def first_step(checkout: Path, config: str) -> dict[str, float]:
    """Seconds to the end of the first step, and the metrics of its start where the checkout has them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["num_steps=1", f"output_dir={folder}", "tracking.console=plain", "checkpoint.export=false"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "raylhf.cli", "train", str(ROOT / config), *settings],
            cwd=checkout,  # which `-m` looks at before PYTHONPATH; workers look at PYTHONPATH
            env=_environment(checkout),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seconds = None
        for line in process.stdout:
            if line.startswith("step 1/") and seconds is None:
                seconds = time.perf_counter() - began
        if process.wait(TIMEOUT_S) != 0 or seconds is None:
            raise RuntimeError(f"{config} failed in {checkout}")
        rows = [json.loads(line) for file in Path(folder).glob("*/metrics.jsonl") for line in file.open()]
        parts = {key: value for key, value in rows[0].items() if key.startswith("time/start_")}
        return {"first_step_done_s": seconds, **parts}


def _seconds_of(words: Sequence[str]) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "raylhf.cli", *words]
    subprocess.run(command, cwd=ROOT, env=_environment(ROOT), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def _spread(values: Sequence[float]) -> dict[str, float]:
    kinds = {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
    return {kind: round(value, 2) for kind, value in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/startup.json"), help="file of the results")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each config and checkout")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[ROOT], help="folders that hold the package")
    arguments = parser.parse_args()
    found = measure(rounds=arguments.rounds, configs=arguments.configs, checkouts=arguments.checkouts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
