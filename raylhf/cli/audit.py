"""`raylhf audit`: whether a run lost or doubled a prompt."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from raylhf.cli.tables import new_table

if TYPE_CHECKING:
    from raylhf.driver.audit import Audit


def run_audit(path: str) -> int:
    """Replay the ledger of a run's folder, and hold it against metrics and the newest checkpoint; print what it says.

    Returns 1 where it has problems, 2 where the folder has no ledger. It may be run beside the training.
    """
    from raylhf.driver.audit import audit
    from raylhf.driver.checkpoints import newest_state
    from raylhf.driver.ledger import read_ledger

    folder = Path(path)
    try:
        # A run that goes on writes the ledger first; read last, it is not behind.
        logged_steps, state = _logged_steps(folder / "metrics.jsonl"), newest_state(folder)
        found = audit(read_ledger(folder), logged_steps=logged_steps, state=state)
    except ValueError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    _print_counts(console, folder, found)
    for problem in found.problems:
        console.print(f"[bold red]problem[/bold red]: {escape(problem)}")
    if not found.problems:
        console.print("nothing lost, nothing doubled")
    return 1 if found.problems else 0


def _logged_steps(file: Path) -> list[int] | None:
    """The steps of `metrics.jsonl`, or None where there is none. A torn last line does not count."""
    if not file.is_file():
        return None
    steps = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no row of metrics ({error!r}); repair it or move it") from error
    return steps


def _print_counts(console: Console, folder: Path, found: "Audit") -> None:
    table = new_table(f"Ledger of {folder.absolute().name}", "", "")
    table.show_header = False
    rows = {
        "steps done": found.steps,
        "prompts drawn": found.drawn,
        "  consumed": found.consumed,
        **{f"  dropped: {reason}": count for reason, count in found.dropped.items()},
        "  pending": found.pending,
        "responses learnt from": found.responses,
        "resumed or returned": found.returns,
        "  rolled back: consumed, then void": found.rolled_back,
        "sampled again, for a worker died": found.reissued,
        "rows of the data that are never drawn": found.excluded,
    }
    for name, count in rows.items():
        table.add_row(escape(name), str(count))
    console.print(table)
