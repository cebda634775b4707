"""What a run prints at its end: held-out reward before and after, KL against its budget, samples side by side."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raylhf.config import RunConfig
from raylhf.config.run import CommonConfig

_ENDINGS = {
    "complete": "complete",
    "stopped": "stopped on request; the same command goes on from its last checkpoint",
    "over KL budget": "stopped: the KL to the reference passed its budget",
}


def print_report(config: RunConfig, folder: Path, status: str, evaluations: list[dict[str, Any]]) -> None:
    """Print the first against the last evaluation of a policy."""
    console = _open(config, status)
    if len(evaluations) >= 2 and evaluations[0]["metrics"]:
        _print_change(console, config, evaluations[0], evaluations[-1])
    _print_places(console, folder, "Aligned model (Hugging Face folder)")


def print_offline_report(
    config: CommonConfig, folder: Path, status: str, evaluations: list[dict[str, Any]], *, what: str
) -> None:
    """Print the first against the last evaluation of `what` was trained on stored judgements."""
    console = _open(config, status)
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        table = Table(title="Held-out judgements", title_justify="left")
        for heading in ("", f"step {first['step']}", f"step {last['step']}"):
            table.add_column(heading, justify="left" if not heading else "right")
        for key, value in last["metrics"].items():
            label = key.partition("/")[2].replace("_", " ")
            table.add_row(label, f"{first['metrics'].get(key, float('nan')):.4g}", f"{value:.4g}")
        console.print(table)
    if (plot := folder / "reliability.png").is_file():
        console.print(f"Reliability plot: [bold]{escape(str(plot))}[/bold]", soft_wrap=True)
    _print_places(console, folder, f"{what} (Hugging Face folder)")


def _open(config: CommonConfig, status: str) -> Console:
    console = Console()
    console.rule(f"[bold]{config.name}[/bold]: {_ENDINGS[status]}")
    return console


def _print_places(console: Console, folder: Path, exported: str) -> None:
    console.print(f"Metrics, samples, checkpoints: [bold]{escape(str(folder))}[/bold]", soft_wrap=True)
    if (folder / "export").is_dir():
        console.print(f"{exported}: [bold]{escape(str(folder / 'export'))}[/bold]", soft_wrap=True)


def _print_change(console: Console, config: RunConfig, first: dict[str, Any], last: dict[str, Any]) -> None:
    before, after = first["metrics"], last["metrics"]
    table = Table(title="Held-out prompts", title_justify="left")
    for heading in ("", f"step {first['step']}", f"step {last['step']}"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("reward (mean +- standard error)", _with_error(before), _with_error(after))
    for key in [key for key in before if key.startswith("eval/part/") and key.endswith("_mean")]:
        name = key.removeprefix("eval/part/").removesuffix("_mean")
        table.add_row(f"  {name}", f"{before[key]:.3f}", f"{after[key]:.3f}")
    budget = config.kl_budget
    kl_label = "KL to the reference, nats per response" + (f" (budget {budget:g})" if budget else "")
    for label, key, digits in (
        (kl_label, "eval/kl_to_ref", 2),
        ("entropy, nats per token", "eval/entropy", 2),
        ("response length, tokens", "eval/response_length_mean", 1),
    ):
        table.add_row(label, f"{before[key]:.{digits}f}", f"{after[key]:.{digits}f}")
    console.print(table)
    for old, new in zip(first["samples"], last["samples"], strict=False):
        console.print(f"[bold]{escape(old['prompt'])}[/bold]")
        console.print(f"  before ({old['score']:+.2f}): {escape(old['response'].strip())}")
        console.print(f"  after  ({new['score']:+.2f}): {escape(new['response'].strip())}")


def _with_error(metrics: dict[str, float]) -> str:
    return f"{metrics['eval/score_mean']:.3f} +- {metrics['eval/score_se']:.3f}"
