"""Online DPO against PPO at equal compute: reward and KL of the two quickstarts on several seeds.

    python benchmarks/online_dpo/run.py --output runs/online_dpo

Each run is `raylhf train` on one of two configs with the same prompts, responses a step, passes and steps. A complete
run is not repeated, so the command may be stopped and given again. results.json, results.md and reward_kl.png go beside
this file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from runs import rows_with, train_once

CONFIGS = {"online DPO": "online_dpo_quickstart", "PPO": "quickstart"}
CURVES = {"reward": "reward/score_mean", "kl": "policy/kl_to_ref", "seconds": "time/step_s"}
"""Of the training steps."""
HELD_OUT = {"reward": "eval/score_mean", "error": "eval/score_se", "kl": "eval/kl_to_ref"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/online_dpo"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        for method in arguments.methods:
            name = CONFIGS[method]
            folder = arguments.output / f"{name}_{seed}"
            train_once(HERE.parents[1] / "configs" / f"{name}.yaml", folder, [f"seed={seed}"])
            runs.append({"method": method, "seed": seed, **read(folder)})
            (HERE / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
            (HERE / "results.md").write_text(table(runs))
            draw(runs, HERE / "reward_kl.png")
    print(table(runs))


def read(folder: Path) -> dict[str, Any]:
    """Curves over the training steps; the held-out prompts before and after; seconds of all steps together."""
    steps = rows_with(folder, CURVES["reward"])
    before, *_, after = rows_with(folder, HELD_OUT["reward"])
    curves = {name: [row[key] for row in steps] for name, key in CURVES.items()}
    ends = {
        when: {name: row.get(key, 0.0) for name, key in HELD_OUT.items()}
        for when, row in (("before", before), ("after", after))
    }
    return {**curves, **ends, "minutes": sum(curves.pop("seconds")) / 60}


def table(runs: list[dict[str, Any]]) -> str:
    """A line a run."""
    lines = ["| method | seed | held-out reward before | after | KL, nats a response | reward gained a nat | minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in runs:
        before, after = run["before"], run["after"]
        rate = (after["reward"] - before["reward"]) / after["kl"]
        rewards = " | ".join(f"{end['reward']:.3f} +- {end['error']:.3f}" for end in (before, after))
        shown = f"{rewards} | {after['kl']:.2f} | {rate:.3f} | {run['minutes']:.1f}"
        lines.append(f"| {run['method']} | {run['seed']} | {shown} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Reward against the KL that it costs: training batches as lines (means of three), held-out prompts as marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for run in runs:
        color = f"C{list(CONFIGS).index(run['method'])}"
        smooth = {name: np.convolve(run[name], np.ones(3) / 3, mode="valid") for name in ("kl", "reward")}
        axis.plot(smooth["kl"], smooth["reward"], color=color, alpha=0.5)
        label = run["method"] if run["seed"] == runs[0]["seed"] else None
        after = run["after"]
        axis.errorbar(after["kl"], after["reward"], after["error"], color=color, marker="o", capsize=3, label=label)
    axis.set(xlabel="KL to the reference (nats a response)", ylabel="reward")
    axis.grid(alpha=0.3)
    axis.legend(title="held-out prompts at the end", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
