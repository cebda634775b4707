"""The tracker: what the driver knows goes to JSONL files, Weights & Biases and the console by one call."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import numpy as np
import psutil

from raylhf.config.run import AnyRunConfig
from raylhf.tracking.catalogue import QUANTILES, require_histogram, require_metrics
from raylhf.tracking.console import build_console
from raylhf.tracking.jsonl import JsonlFile, plain
from raylhf.tracking.redaction import without_secrets
from raylhf.tracking.startup import StartUp, start_line


class Tracker:
    """Logs a run into its folder: `metrics.jsonl` (one row a step), `samples.jsonl`, `status.json` (what it
    is doing now), `summary.json`, `wandb/`.

    Step 0 is the state before training, step k the k-th rollout batch; steps never go back. `resume_step` is the first
    step that will be logged again: rows from there on are cut off. None starts anew and moves older files aside.
    """

    def __init__(self, config: AnyRunConfig, run_dir: Path, resume_step: int | None, *, num_steps: int):
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._num_samples = {"train": config.tracking.samples_per_step, "held_out": config.evaluation.num_samples}
        self._metrics = JsonlFile(run_dir / "metrics.jsonl", resume_step=resume_step)
        self._samples = JsonlFile(run_dir / "samples.jsonl", resume_step=resume_step)
        self._row: dict[str, Any] = self._metrics.kept_rows[-1] if self._metrics.kept_rows else {"step": -1}
        self._is_finished = False
        self._start: StartUp | None = StartUp(began=psutil.Process().create_time())
        self.phase = "start"
        """What the run is doing."""
        self.listener: Callable[[int, Mapping[str, float]], None] | None = None
        """Is told of what `log` was given: step and numbers."""
        self._wandb = None
        if config.tracking.wandb != "disabled":
            from raylhf.tracking.wandb_run import WandbRun

            self._wandb = WandbRun(
                config.tracking,
                name=config.name,
                run_dir=run_dir,
                settings=without_secrets(config.model_dump(mode="json")),
                is_resumed=resume_step is not None,
            )
        self._console = build_console(
            config.tracking.console, title=config.name, num_steps=num_steps, history=self._metrics.kept_rows
        )

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log numbers of a step; a second call for one step adds to its row. Keys must be in the catalogue."""
        require_metrics(metrics)
        values = {key: float(value) for key, value in metrics.items()}
        if self._wandb is not None:
            self._wandb.log(step, values | {"tracking/wandb_errors": float(self._wandb.num_errors)})
            values["tracking/wandb_errors"] = float(self._wandb.num_errors)
        self._write(step, values)
        self._console.show_step(step, values)
        if self.listener is not None:
            self.listener(step, values)

    def log_histogram(self, step: int, key: str, values: Sequence[float] | np.ndarray) -> None:
        """Log a distribution: its quantiles, and in W&B a histogram as well. What is not finite is left out."""
        require_histogram(key)
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if finite.size == 0:
            return
        quantiles = {f"{key}_{name}": float(np.quantile(finite, q)) for name, q in QUANTILES.items()}
        self._write(step, quantiles)
        if self._wandb is not None:
            self._wandb.log_histogram(step, key, finite)
            self._wandb.log(step, quantiles)

    def log_samples(
        self, step: int, rows: Sequence[Mapping[str, Any]], name: Literal["train", "held_out"] = "train"
    ) -> None:
        """Log the first responses of `rows`, as many as the settings ask for."""
        shown = [without_secrets(plain(dict(row))) for row in rows[: self._num_samples[name]]]
        if not shown:
            return
        for row in shown:
            self._samples.append({"step": step, "name": name, **row})
        if self._wandb is not None:
            self._wandb.log_table(step, f"samples/{name}", shown)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max(self._row["step"], 0)

    def set_phase(self, name: str) -> None:
        """Say what the run is doing now, on the console and in `status.json`."""
        self.phase = name
        if self._start is not None:
            self._start.enter(name)
        self._console.set_phase(name)
        self._note_status(name)

    def start_is_over(self, step: int, of_workers: Mapping[str, float]) -> None:
        """Log and print where the time since the program's start went; later calls do nothing.

        `of_workers` are metrics of the workers' own starts.
        """
        if self._start is None:
            return
        metrics = {**self._start.metrics(), **of_workers}
        self._start = None
        self.log(step, metrics)
        print(start_line(metrics), flush=True)

    def rewind(self, step: int) -> None:
        """Cut off the rows from `step` on, which will be logged again: the run goes back to an earlier state.

        W&B keeps what it was sent; it draws over our own `step`, where the later value of a step hides the earlier.
        """
        self._metrics = JsonlFile(self._run_dir / "metrics.jsonl", resume_step=step)
        self._samples = JsonlFile(self._run_dir / "samples.jsonl", resume_step=step)
        self._row = self._metrics.kept_rows[-1] if self._metrics.kept_rows else {"step": -1}

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Close everything; `summary.json` and W&B get status and summary. A second call does nothing.

        The status `failed` is W&B's "failed"; any other one ("complete", "stopped") is "finished".
        """
        if self._is_finished:
            return
        self._is_finished = True
        self._note_status(status)
        self._console.close(status)
        final = without_secrets(plain({"status": status, "step": self._row["step"], **summary}))
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if status == "failed" else 0, summary=final)
        with suppress(OSError):  # a full disk is told of by what ended the run
            (self._run_dir / "summary.json").write_text(json.dumps(final, indent=2) + "\n")

    def _note_status(self, name: str) -> None:
        status = {"phase": name, "step": self.step, "since": time.time(), "pid": os.getpid()}
        unfinished = self._run_dir / ".status.json"
        with suppress(OSError):  # a full disk is told of by what cannot do without it
            unfinished.write_text(json.dumps(status) + "\n")
            unfinished.replace(self._run_dir / "status.json")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if step < self._row["step"]:
            raise ValueError(f"step {step} is logged after step {self._row['step']}; steps never go back")
        if step == self._row["step"]:
            self._row = self._row | values
            self._metrics.replace_last(self._row)
        else:
            self._row = {"step": step, **values}
            self._metrics.append(self._row)
