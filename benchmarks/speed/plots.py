"""The plots, from results.json."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"raylhf": "#1f77b4", "trl": "#ff7f0e"}
PARTS = {
    "raylhf": {"rollout_s": "sampling", "logprobs_s": "log-probabilities", "update_s": "update", "sync_s": "sync"},
    "trl": {"generate_s": "sampling", "reference_s": "reference", "backward_s": "backward", "optimizer_s": "optimizer"},
}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Every plot for which there are results."""
    if found := results.get("end_to_end"):
        throughputs(found, folder / "end_to_end.png")
        parts(found, folder / "parts.png")
    if found := results.get("growth"):
        growth(found, folder / "growth.png")


def throughputs(found: dict[str, Any], path: Path) -> None:
    """Tokens a second of each run of either side."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for place, entry in enumerate(found.values()):
        for side, shift in (("raylhf", -0.18), ("trl", 0.18)):
            rates = entry["tokens_per_s"][side]
            label = {"raylhf": "raylhf", "trl": "TRL 1.16"}[side] if place == 0 else None
            axes.bar(place + shift, sorted(rates)[len(rates) // 2], 0.34, color=COLOURS[side], label=label)
            axes.plot([place + shift] * len(rates), rates, "k.", markersize=4)
    axes.set_xticks(range(len(found)), [f"{name}\n{entry['ratio']:.2f} x" for name, entry in found.items()])
    axes.set_ylabel("tokens trained on per second")
    axes.legend(frameon=False)
    save(figure, path)


def parts(found: dict[str, Any], path: Path) -> None:
    """What a median step consists of; what is not named is in `rest`."""
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(found) * 2 + 1))
    labels = []
    for name, entry in found.items():
        for side in ("raylhf", "trl"):
            step, start = entry["step"][side], 0.0
            named = {title: step[key] for key, title in PARTS[side].items() if step.get(key)}
            named["rest"] = max(0.0, step["seconds"] - sum(named.values()))
            for number, (title, seconds) in enumerate(named.items()):
                colour = "#bbbbbb" if title == "rest" else f"C{number}"
                axes.barh(len(labels), seconds, left=start, color=colour)
                if seconds > 0.05 * step["seconds"]:
                    axes.text(start + seconds / 2, len(labels), title, ha="center", va="center", fontsize=7)
                start += seconds
            labels.append(f"{name}, {side}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    save(figure, path)


def growth(found: dict[str, Any], path: Path) -> None:
    """How the learner's and the driver's costs grow."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3))
    for axes, key, label in ((left, "length", "tokens of a sequence"), (middle, "sequences", "sequences of a step")):
        rows = found["length" if key == "length" else "batch"]
        axes.plot([row[key] for row in rows], [row["tokens_per_s"] for row in rows], "o-")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("learner, tokens/s")
    rows = found["stand_in_workers"]
    right.plot([row["workers"] for row in rows], [row["cpu_s_per_1000"] for row in rows], "o-")
    right.set_ylim(bottom=0)
    right.set_xlabel("rollout workers (stand-ins)")
    right.set_ylabel("driver CPU s / 1,000 responses")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
