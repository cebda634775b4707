"""DPO where its assumptions fail, and the methods that are to help: a policy class too small, a shift, wrong labels.

    python benchmarks/misspecification/run.py [--seeds 10]

Writes results.json, README.md (from page.md) and misspecification.png beside this file; a few minutes on one core.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from misspecification.example import (
    SKEWED,
    UNIFORM,
    aux_dpo_theta,
    dpo_theta,
    log_policy,
    reward,
    rlhf_theta,
)
from misspecification.experiments import noise, shift

NOISES = (0.0, 0.2, 0.4)
SHIFT_COLUMNS = ("rare_loss", "rare_reward", "rare_objective", "common_objective")
NOISE_COLUMNS = ("reward", "objective", "accuracy")
Runs = list[dict[str, dict[str, float]]]
"""Of each seed, by method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    seeds = range(parser.parse_args().seeds)
    results = {
        "example": example(),
        "shift": [shift(seed) for seed in seeds],
        "noise": {f"{share:g}": [noise(seed, share) for seed in seeds] for share in NOISES},
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(page(results, len(seeds)))
    draw(results, HERE / "misspecification.png")


def example() -> dict[str, dict[str, Any]]:
    """By method: theta, expected reward and policy."""
    thetas = {
        "reference": 0.0,
        "DPO, counts 8:1:1": dpo_theta(SKEWED),
        "DPO, counts 1:1:1": dpo_theta(UNIFORM),
        "KL-regularised RLHF": rlhf_theta(),
        "AuxDPO, counts 8:1:1": aux_dpo_theta(SKEWED),
        "AuxDPO, counts 1:1:1": aux_dpo_theta(UNIFORM),
        "AuxDPO, sides, counts 8:1:1": aux_dpo_theta(SKEWED, offsets_of="sides"),
        "AuxDPO, sides, counts 1:1:1": aux_dpo_theta(UNIFORM, offsets_of="sides"),
        "AuxDPO, sides, 8:1:1, amplitude_coef 0.01": aux_dpo_theta(SKEWED, offsets_of="sides", amplitude_coef=0.01),
        "AuxDPO, sides, 1:1:1, amplitude_coef 0.01": aux_dpo_theta(UNIFORM, offsets_of="sides", amplitude_coef=0.01),
    }
    return {
        name: {"theta": theta, "reward": reward(theta), "policy": log_policy(theta).exp().tolist()}
        for name, theta in thetas.items()
    }


def page(results: dict[str, Any], num_seeds: int) -> str:
    """README.md."""
    rows = [
        f"| {name} | {values['theta']:.4f} | {values['reward']:.4f} | "
        f"{', '.join(f'{share:.3f}' for share in values['policy'])} |"
        for name, values in results["example"].items()
    ]
    tables = {"@EXAMPLE@": rows, "@SHIFT@": compared(results["shift"], SHIFT_COLUMNS)}
    tables["@NOISE@"] = [
        f"| {float(share):.0%} {line}"
        for share, runs in results["noise"].items()
        for line in compared(runs, NOISE_COLUMNS)
    ]
    text = (HERE / "page.md").read_text().replace("@SEEDS@", str(num_seeds))
    for mark, lines in tables.items():
        text = text.replace(mark, "\n".join(lines))
    return text


def compared(runs: Runs, columns: Sequence[str]) -> list[str]:
    """A line for each method: DPO's means over seeds, and the others' differences from it, seed by seed."""
    lines = []
    for name in runs[0]:
        cells = []
        for column in columns:
            values = np.array([run[name][column] for run in runs])
            gains = values - np.array([run["DPO"][column] for run in runs])
            cells.append(f"{values.mean():.3f}" if name == "DPO" else f"{gains.mean():+.3f} +- {error(gains):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def draw(results: dict[str, Any], path: Path) -> None:
    """The example's reward over theta with the methods on it, and differences from DPO under shift and noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    thetas = np.linspace(-1.5, 1.0, 200)
    axes[0].plot(thetas, [reward(theta) for theta in thetas], color="black", linewidth=1)
    for i, (name, values) in enumerate(results["example"].items()):
        axes[0].plot(values["theta"], values["reward"], "o", color=f"C{i}", label=name)
    axes[0].set(title="The example: expected reward of the policy", xlabel="theta")
    axes[0].legend(fontsize=7)
    bars(axes[1], {"": results["shift"]}, "rare_objective", "Shift: objective on the rare group, against DPO's")
    noisy = {f"{float(share):.0%} wrong": runs for share, runs in results["noise"].items()}
    bars(axes[2], noisy, "objective", "Wrong labels: objective, against DPO's")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(axis: Any, groups: dict[str, Runs], column: str, title: str) -> None:
    """Mean differences from DPO with two standard errors, one bar for each method and group."""
    for g, (label, runs) in enumerate(groups.items()):
        names = [name for name in runs[0] if name != "DPO"]
        gains = [np.array([run[name][column] - run["DPO"][column] for run in runs]) for name in names]
        places = np.arange(len(names)) + 0.25 * (g - (len(groups) - 1) / 2)
        width = 0.8 / max(len(groups), 2)
        axis.barh(places, [gain.mean() for gain in gains], width, xerr=[2 * error(gain) for gain in gains], label=label)
        axis.set_yticks(np.arange(len(names)), names, fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(title, fontsize=10)
    if len(groups) > 1:
        axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
