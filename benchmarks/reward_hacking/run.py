"""Trains the tiny policy on a corrupted ensemble under several nodes, one run after another, and compares the runs.

    python benchmarks/reward_hacking/run.py --output runs/hacking

A run that is complete is not repeated, so the command may be stopped and given again. results.json and hacking.png are
written beside this file.
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

NODE = "reward.graph.parts.0.reward"
NODES = {
    "mean": [f"{NODE}.coef=0"],
    "lower_confidence": [f"{NODE}.coef=1"],
    "min": [f"{NODE}.kind=min"],
    "kl_dro": [f"{NODE}.kind=kl_dro", f"{NODE}.beta=0.1"],
    "uncertainty_weighted": [f"{NODE}.kind=uncertainty_weighted", f"{NODE}.coef=0.5"],
}
"""Overrides of hacking.yaml."""
COLUMNS = {
    "kl": "policy/kl_to_ref",
    "proxy": "reward/part/proxy_mean",
    "gold": "reward/part/gold_mean",
    "marks": "reward/part/marks_mean",
    "member_5": "reward/part/proxy/member_5_mean",
}
"""What is read of metrics.jsonl."""
HONEST = [f"reward/part/proxy/member_{i}_mean" for i in range(1, 5)]
LAST = 5
"""Steps over which the end of a run is averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/hacking"), help="folder of the runs")
    parser.add_argument("--nodes", nargs="+", default=list(NODES), choices=list(NODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        for node in arguments.nodes:
            folder = arguments.output / f"{node}_{seed}"
            train_once(HERE / "hacking.yaml", folder, [f"seed={seed}", *NODES[node]])
            runs.append({"node": node, "seed": seed, **read(folder)})
            (HERE / "results.json").write_text(json.dumps({"table": table(runs), "runs": runs}, indent=1) + "\n")
            draw(runs, HERE / "hacking.png")
    for node, values in table(runs).items():
        print(node, values)


def read(folder: Path) -> dict[str, list[float]]:
    """Curves over the training steps; `disagreement` is how far member_5 is above the median of the honest members."""
    rows = rows_with(folder, COLUMNS["proxy"])
    curves = {name: [row[key] for row in rows] for name, key in COLUMNS.items()}
    honest = np.median([[row[key] for row in rows] for key in HONEST], axis=0)
    corrupted = np.array(curves.pop("member_5"))
    return {**curves, "disagreement": (corrupted - honest).tolist()}


def table(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By node: first step and mean of the last steps, over seeds, with the lowest and highest seed of the end."""
    rows = {}
    for node in dict.fromkeys(run["node"] for run in runs):
        of_node = [run for run in runs if run["node"] == node]
        rows[node] = {"seeds": [run["seed"] for run in of_node]}
        for name in ("proxy", "gold", "marks", "kl", "disagreement"):
            ends = [float(np.mean(run[name][-LAST:])) for run in of_node]
            start = float(np.mean([run[name][0] for run in of_node]))
            rows[node][name] = {"start": start, "end": float(np.mean(ends)), "range": [min(ends), max(ends)]}
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Proxy, gold and the share of marks against the KL that they cost, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "proxy": "Proxy: what the policy is paid",
        "gold": "Gold: share of wanted letters",
        "marks": "Share of marks",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(13, 4))
    nodes = list(dict.fromkeys(run["node"] for run in runs))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for run in runs:
            first = all(other["seed"] >= run["seed"] for other in runs)
            label = run["node"] if first else None
            axis.plot(run["kl"], run[name], color=f"C{nodes.index(run['node'])}", label=label, alpha=0.8)
        axis.set(title=title, xlabel="KL to the reference (nats a response)")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
