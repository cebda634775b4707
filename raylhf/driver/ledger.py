"""The ledger of a run, `ledger.jsonl`: what became of every prompt that training drew, one event a line.

Draws are numbered 0, 1, 2, ... in the order of `PromptOrder` (epoch * num_prompts + position). A step is numbered as in
`metrics.jsonl`: step k is the k-th update, so the step under way is the number of steps done, plus one.
`raylhf audit` proves from these lines that nothing was lost and nothing doubled.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylhf.driver.manifest import sync
from raylhf.tracking.jsonl import unused_name

LEDGER_FILE = "ledger.jsonl"
UNREADABLE = "unreadable"
"""The reader's event for a line that is no JSON object."""


class Ledger:
    """Appends events. Each is with the operating system at once; `begin` and `consume` wait until it is on disk."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LEDGER_FILE).open("a+b")
        if self._file.tell() and not self._ends_with_newline():  # the process before this one died while it wrote
            self._file.write(b"\n")
        self._file.flush()
        sync(folder)

    def begin(self, step: int, *, next_draw: int) -> None:
        """A start, a resume or a return to the checkpoint of `step`; must come before the first draw is issued.

        What was consumed or dropped in later steps is void, and what was on its way is drawn again: drawing goes on at
        `next_draw`, and all draws below it are settled.
        """
        self._append("begun", _on_disk=True, step=step, next_draw=next_draw)

    def exclude(self, prompts: Sequence[int], reason: str) -> None:
        """Rows of the data that are never drawn (too long)."""
        self._append("excluded", prompts=_numbers(prompts), reason=reason)

    def issue(self, step: int, draws: Mapping[int, int]) -> None:
        """Draws (draw: row of the data) that are about to be sampled for step `step`; in the order of their numbers."""
        self._append("issued", step=step, draws=_counts(draws))

    def reissue(self, draws: Sequence[int], worker: str, reason: str) -> None:
        """Draws that went to `worker`, which died with them, and that are sampled again."""
        self._append("reissued", draws=_numbers(draws), worker=worker, reason=reason)

    def consume(self, step: int, draws: Mapping[int, int]) -> None:
        """The learners have finished step `step`; draws (draw: number of responses learnt from) are settled by it.

        One event a step, also where every draw of the step was dropped.
        """
        self._append("consumed", _on_disk=True, step=step, draws=_counts(draws))

    def drop(self, step: int, draws: Sequence[int], reason: str) -> None:
        """Draws that are settled without being learnt from, in step `step`; before the event of its consumption."""
        self._append("dropped", step=step, draws=_numbers(draws), reason=reason)

    def save(self, step: int) -> None:
        """The checkpoint of step `step` is on disk."""
        self._append("saved", step=step)

    def close(self) -> None:
        """Close the file. Nothing is left to write: each event went out when it came."""
        self._file.close()

    def _append(self, event: str, *, _on_disk: bool = False, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": time.time(), **fields})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if _on_disk:
            os.fsync(self._file.fileno())

    def _ends_with_newline(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's ledger, oldest first. A line that is no JSON object is the event `unreadable`.

    The last line may be torn, for the process may have died while it wrote; it is then left out.

    Raises:
        ValueError: the folder has no ledger.
    """
    file = folder / LEDGER_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {LEDGER_FILE}; give the folder of a run that trains a policy on prompts (runs/NAME)"
        )
    lines = file.read_bytes().splitlines(keepends=True)
    events = [_parse(line, number) for number, line in enumerate(lines, start=1)]
    if events and events[-1]["event"] == UNREADABLE and not lines[-1].endswith(b"\n"):
        events.pop()
    return events


def set_ledger_aside(folder: Path) -> None:
    """Move the ledger of an earlier run out of the way of one that starts anew (`ledger.1.jsonl`)."""
    file = folder / LEDGER_FILE
    if file.exists():
        file.rename(unused_name(file))


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and "event" in event else {"event": UNREADABLE, "line": number}


def _numbers(values: Sequence[int]) -> list[int]:
    return [int(value) for value in values]


def _counts(draws: Mapping[int, int]) -> dict[str, int]:
    return {str(int(draw)): int(value) for draw, value in draws.items()}
