"""Progress for people: a live panel on a terminal, or one plain line a step."""

import atexit
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HEADLINES = {
    "reward/score_mean": "reward",
    "eval/score_mean": "held-out reward",
    "policy/kl_to_ref": "KL to reference",
    "kl/coef": "KL coefficient",
    "rollout/response_length_mean": "response length",
    "rollout/tokens_per_s": "tokens/s",
    "pref/accuracy": "accuracy",
    "pref/margin_mean": "margin",
    "pref/nll_mean": "nats/token",
    "pref_eval/accuracy": "held-out accuracy",
    "pref_eval/nll_mean": "held-out nats/token",
    "rm/loss": "loss",
    "rm/accuracy": "accuracy",
    "rm_eval/loss": "held-out loss",
    "rm_eval/accuracy": "held-out accuracy",
    "rm_eval/spearman": "held-out Spearman",
    "rm/tokens_per_s": "tokens/s",
}
"""The metrics that the console shows, with their names there."""


class ProgressView(Protocol):
    """What the tracker tells a console."""

    def set_phase(self, name: str) -> None: ...

    def show_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


class Progress:
    """Steps done, first values, latest values and the time left. A step that is shown twice counts once."""

    def __init__(self, num_steps: int, history: Sequence[dict[str, Any]]):
        self.num_steps = num_steps
        self.step = 0
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=20)
        for row in history:
            self._remember(row["step"], {key: value for key, value in row.items() if value is not None})

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the metrics of a step."""
        if self._times and step < self._times[-1][0]:  # the run went back to a checkpoint
            self._times.clear()
        if not self._times or step != self._times[-1][0]:
            self._times.append((step, time.monotonic()))
        self._remember(step, metrics)

    def change(self, key: str) -> str:
        """How far a metric is from its first value, signed; empty at the first."""
        difference = self.latest[key] - self.first[key]
        return f"{difference:+.3g}" if difference else ""

    @property
    def time_left(self) -> str:
        """By the pace of the last 20 steps; `?` before the second step."""
        if len(self._times) < 2:
            return "?"
        (first_step, start), (last_step, end) = self._times[0], self._times[-1]
        return duration((end - start) / (last_step - first_step) * max(self.num_steps - last_step, 0))

    def _remember(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        self.first = metrics | self.first
        self.latest = self.latest | metrics


class PlainConsole:
    """One line a step, for logs and pipes."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._has_steps = False

    def set_phase(self, name: str) -> None:
        """Shown until the first step: afterwards they would be several lines a step."""
        if not self._has_steps:
            print(f"{name} ...", flush=True)

    def show_step(self, step: int, metrics: dict[str, float]) -> None:
        progress = self._progress
        progress.update(step, metrics)
        self._has_steps = True
        shown = [f"step {step}/{progress.num_steps}"]
        for key, label in HEADLINES.items():
            if key in metrics:
                change = progress.change(key)
                shown.append(f"{label} {metrics[key]:.4g}" + (f" ({change})" if change else ""))
        if "time/step_s" in metrics:
            shown.append(f"{metrics['time/step_s']:.1f} s")
        if len(shown) == 1:  # nothing for people in it, such as the time that a checkpoint took
            return
        print(" | ".join([*shown, f"left {progress.time_left}"]), flush=True)

    def close(self, status: str) -> None:
        print(f"{status} after step {self._progress.step}/{self._progress.num_steps}", flush=True)


class LiveConsole:
    """A panel that redraws itself at the bottom of the terminal; prints and logs scroll by above it."""

    def __init__(self, progress: Progress, title: str, console: Console | None = None):
        self._progress = progress
        self._title = title
        self._phase = "start"
        self._phase_started = time.monotonic()
        streams = (sys.stdout, sys.stderr)
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=4)
        self._live.start()
        self._redirected = redirect_logs(streams)
        atexit.register(self._stop)  # a run that dies without finish() must give the cursor back

    def set_phase(self, name: str) -> None:
        self._phase, self._phase_started = name, time.monotonic()

    def show_step(self, step: int, metrics: dict[str, float]) -> None:
        self._progress.update(step, metrics)

    def close(self, status: str) -> None:
        self.set_phase(status)
        self._stop()
        atexit.unregister(self._stop)

    def _stop(self) -> None:
        self._live.stop()
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []

    def _panel(self) -> RenderableType:
        progress = self._progress
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=progress.num_steps, completed=progress.step, width=40),
            f"step {progress.step}/{progress.num_steps}",
            f"left {progress.time_left}",
        )
        phase = Text(f"{self._phase}  {duration(time.monotonic() - self._phase_started)}", style="bold")
        return Panel(Group(bar, phase, self._metrics_table(), self._times_line()), title=self._title, expand=False)

    def _metrics_table(self) -> Table:
        table = Table("metric", box=None)
        table.add_column("now", justify="right")
        table.add_column("since start", justify="right")
        latest = self._progress.latest
        for key, label in HEADLINES.items():
            if key in latest:
                table.add_row(label, f"{latest[key]:.4g}", self._progress.change(key))
        return table

    def _times_line(self) -> Text:
        latest = self._progress.latest
        times = {key.removeprefix("time/").removesuffix("_s"): latest[key] for key in latest if key.startswith("time/")}
        return Text("  ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()), style="dim")


def build_console(
    kind: Literal["auto", "live", "plain"], *, title: str, num_steps: int, history: Sequence[dict[str, Any]]
) -> ProgressView:
    """The console that `tracking.console` asks for; `auto` is live where stdout is a terminal."""
    progress = Progress(num_steps, history)
    if kind == "live" or (kind == "auto" and sys.stdout.isatty()):
        return LiveConsole(progress, title)
    return PlainConsole(progress)


def redirect_logs(streams: tuple[TextIO, TextIO]) -> list[tuple[logging.StreamHandler, TextIO]]:
    """Point log handlers that hold the real stdout or stderr to the live display; returns what to restore."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    moved = []
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            moved.append((handler, handler.stream))
            handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)
    return moved


def duration(seconds: float) -> str:
    """1:02:03 for 3,723 s."""
    minutes, seconds_left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds_left:02d}"
