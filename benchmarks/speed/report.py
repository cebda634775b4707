"""results.md, from results.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TARGETS = {"online_dpo": 1.5, "grpo": 1.5, "rloo": 1.5, "dpo": 1.1, "reward_model": 1.1}


def write(results: dict[str, Any], folder: Path) -> None:
    """A section for each part that has results."""
    lines = ["# Speed: results", "", "Written by `run.py`; what the words mean and how to read it: README.md.", ""]
    sections = {
        "end_to_end": end_to_end,
        "efficiency": efficiency,
        "overlap": overlap,
        "padding": padding,
        "growth": growth,
        "sync": listed,
        "startup": listed,
        "gpu": gpu,
    }
    for name, section in sections.items():
        if name in results:
            lines += [*section(results[name], name), ""]
    (folder / "results.md").write_text("\n".join(lines))


def end_to_end(found: dict[str, Any], _: str) -> list[str]:
    """Ratios, and what a step consists of."""
    rows = []
    for name, entry in found.items():
        rates = {side: spread(values) for side, values in entry["tokens_per_s"].items()}
        each = ", ".join(f"{ratio:.2f}" for ratio in entry["ratios"])
        rows.append(
            (
                name,
                rates["raylhf"],
                rates["trl"],
                f"**{entry['ratio']:.2f}**",
                each,
                f">= {TARGETS[name.removesuffix('_bf16').removesuffix('_mixed')]}",
            )
        )
    head = ("method", "raylhf, tokens/s", "TRL, tokens/s", "ratio", "of each pair of runs", "target")
    lines = ["## (a) Whole steps against TRL", "", *table(head, rows), "", "A median step, in seconds:", ""]
    rows = []
    for name, entry in found.items():
        for side, step in entry["step"].items():
            parts = [f"{k[:-2]} {v:.2f}" for k, v in step.items() if k[-2:] == "_s" and k != "driver_cpu_s"]
            row = (name, side, f"{step['seconds']:.2f}", f"{step['tokens']:.0f}", ", ".join(parts))
            rows.append((*row, f"{100 * step['others']:.0f} %"))
    return lines + table(("method", "side", "step", "tokens", "parts", "cores that others took"), rows)


def efficiency(found: dict[str, Any], _: str) -> list[str]:
    """(b), synchronous."""
    step = found["step"]
    rows = [
        ("step of raylhf, s", f"{step['seconds']:.2f}"),
        ("vLLM alone, s", f"{found['vllm_alone_s']:.2f}"),
        ("learner alone, s", f"{found['learner_alone_s']:.2f}"),
        ("weight sync within the step, s", f"{step['sync_s']:.2f}"),
        ("efficiency: alone / step (target >= 0.90)", f"**{found['efficiency']:.2f}**"),
        ("of each round", ", ".join(f"{value:.2f}" for value in found["efficiencies"])),
        ("driver's CPU seconds / step (target < 3 %)", f"**{100 * found['driver_share']:.1f} %**"),
    ]
    return ["## (b) A synchronous step against its parts alone (GRPO)", "", *table(("what", "found"), rows)]


def overlap(found: dict[str, Any], _: str) -> list[str]:
    """(b), asynchronous."""
    rows = [(name.replace("_", " "), f"{found[name]}") for name in found if name.endswith("part")]
    return ["## (b) Sampling while learning: steps over the longer part (target <= 1.15)", "", *table(("", ""), rows)]


def padding(found: list[dict[str, Any]], _: str) -> list[str]:
    """(c)."""
    rows = [
        (
            str(row["budget"]),
            row["layout"],
            str(row["micro_batches"]),
            f"{100 * row['padding']:.1f} %",
            f"{row['positions_per_token']:.2f}",
        )
        for row in found
    ]
    head = ("token budget", "layout", "micro-batches", "padding (target < 5 %)", "positions / token trained on")
    return ["## (c) Padding in the learner", "", *table(head, rows)]


def growth(found: dict[str, Any], _: str) -> list[str]:
    """(d)."""
    rows = [
        (kind, *(f"{row[key]}" for key in ("length", "sequences", "ranks", "threads")), *figures(row))
        for kind in ("length", "batch", "ranks")
        for row in found[kind]
    ]
    head = ("growing", "tokens of a sequence", "sequences", "ranks", "threads of each", "step, s", "tokens/s")
    drivers = [
        (f"{row['workers']}", f"{row['cpu_s_per_1000']:.3f}", f"{row['wall_s_per_1000']:.3f}")
        for row in found["stand_in_workers"]
    ]
    return [
        "## (d) Growth",
        "",
        *table(head, rows),
        "",
        *table(("stand-in rollout workers", "driver CPU s / 1,000 responses", "wall s / 1,000"), drivers),
    ]


def figures(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['step_s']:.2f}", f"{row['tokens_per_s']:.0f}"


def gpu(found: dict[str, Any], _: str) -> list[str]:
    """(g)."""
    keys = ("shape", "method", "longest", "packing", "step_s", "tokens_per_s", "model_tflops_per_s", "mfu", "peak_gib")
    rows = [tuple(str(case.get(key, "")) for key in keys) for case in found["cases"]]
    return [f"## (g) The learner on one {found['device']}", "", *table(keys, rows)]


def listed(found: Any, name: str) -> list[str]:
    """A part whose script has a report of its own, or whatever it found."""
    rows = [(key, str(value)) for key, value in flat(found).items()]
    return [f"## {name}", "", *table(("what", "found"), rows)]


def flat(found: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a dot."""
    if not isinstance(found, dict):
        return {prefix: found}
    return {k: v for key, value in found.items() for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def spread(values: Sequence[float]) -> str:
    """Median, and from least to most."""
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.0f} ({ordered[0]:.0f} to {ordered[-1]:.0f})"


def rounded(found: Any) -> Any:
    """Four significant digits, so that a file shows what is known."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found
