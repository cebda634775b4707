"""The one file that imports Weights & Biases. Its failures are counted and told once; they never stop a run."""

import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports to W&B's makers; read when wandb is imported

import wandb
from pydantic import ValidationError
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

from raylhf.config.tracking import TrackingConfig

LOGGER = logging.getLogger(__name__)
WANDB_FAILURES = (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError, ServerResponseError, ValidationError)
"""What W&B raises where its server, its own process or the disk fails: not all of it is a wandb.Error, and an answer
that it cannot read is pydantic's ValidationError."""
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
ID_FILE = "wandb_id.txt"
NUM_BINS = 64


class WandbRun:
    """One W&B run, whose id is kept in the run's folder so that a resumed run goes on under it.

    Every key is drawn over our own `step`: W&B's step starts again at 0 in a resumed offline run.
    """

    def __init__(self, config: TrackingConfig, *, name: str, run_dir: Path, settings: dict[str, Any], is_resumed: bool):
        self.num_errors = 0
        self._is_without_tables = False
        self._init = {
            "project": config.project,
            "entity": config.entity,
            "tags": list(config.tags),
            "name": name,
            "id": run_id(run_dir, is_resumed=is_resumed),
            "resume": "allow",
            "reinit": "create_new",
            "dir": str(run_dir),
            "config": settings,
        }
        self._run: wandb.Run | None = None
        if key := os.environ.get("WANDB_API_KEY"):  # of a Secret made from a file, with the file's last line break
            os.environ["WANDB_API_KEY"] = key.strip()
        mode = wandb_mode(config.wandb)
        self._attempt("start online" if mode == "online" else "start", lambda: self._start(mode))
        if self._run is None and mode == "online":
            LOGGER.warning("W&B goes on offline; upload the run later with `wandb sync` on %s/wandb/offline-*", run_dir)
            # W&B's process still holds the run's id from the first attempt; a new process does not.
            self._attempt("stop", wandb.teardown)
            self._attempt("start offline", lambda: self._start("offline"))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Scalars, tables or histograms of one step."""
        self._with_run("log", lambda run: run.log({"step": step, **values}))

    def log_table(self, step: int, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Rows as a W&B table with one column a field.

        Online, W&B waits up to 20 s for its server here, so that after one failure tables are left out.
        """
        if self._is_without_tables:
            return
        columns: list[Any] = list(dict.fromkeys(field for row in rows for field in row))
        cells: list[Any] = [[table_cell(row.get(column)) for column in columns] for row in rows]
        table = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        num_errors = self.num_errors
        self._with_run("log a table", lambda run: run.log({"step": step, key: table}))
        self._is_without_tables = self.num_errors > num_errors

    def log_histogram(self, step: int, key: str, values: np.ndarray) -> None:
        """Finite values as a W&B histogram."""
        histogram = wandb.Histogram(np_histogram=np.histogram(values, bins=NUM_BINS))
        self.log(step, {key: histogram})

    def finish(self, *, exit_code: int, summary: dict[str, Any]) -> None:
        """Write the summary and close the run; waits for uploads, but not longer than a minute."""
        self._with_run("write the summary", lambda run: run.summary.update(summary))
        self._with_run("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _start(self, mode: Literal["online", "offline"]) -> None:
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=False,
        )
        run = wandb.init(mode=mode, settings=settings, **self._init)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _with_run(self, what: str, action: Callable[[wandb.Run], Any]) -> None:
        if (run := self._run) is not None:
            self._attempt(what, lambda: action(run))

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except WANDB_FAILURES as error:
            if self.num_errors == 0:
                reason = " ".join(str(error).split())
                LOGGER.warning("W&B could not %s (%s); the run goes on and counts tracking/wandb_errors", what, reason)
            self.num_errors += 1


def wandb_mode(setting: str) -> Literal["online", "offline"]:
    """`auto` is online where WANDB_API_KEY is set, else offline."""
    is_online = setting == "online" or (setting == "auto" and bool(os.environ.get("WANDB_API_KEY")))
    return "online" if is_online else "offline"


def run_id(run_dir: Path, *, is_resumed: bool) -> str:
    """The id in the run's folder where the run is resumed, else a new one, which is written there."""
    file = run_dir / ID_FILE
    if is_resumed and file.exists():
        return file.read_text().strip()
    new_id = secrets.token_hex(4)
    file.write_text(new_id + "\n")
    return new_id


def table_cell(value: Any) -> Any:
    """What a W&B table can hold: text, numbers, None; anything else as JSON text."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, default=str)
