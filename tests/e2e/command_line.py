"""`raylhf` as a user starts it: a process of its own, watched together with everything that it starts."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "configs" / "tiny_ppo.yaml"
MARK = "RAYLHF_TEST_RUN"
WAIT_S = 600.0
"""Limit of one run: ten times what it takes on two cores that do nothing else."""
TEST_S = 3 * WAIT_S
"""Limit of one test, which may have to wait for the runs of its fixtures."""
END_S = 120.0
"""Limit from a signal to the end: the learning step in progress is finished, then a checkpoint is written."""
GRACE_S = 10.0
POLL_S = 0.2
CLOCK_METRICS = re.compile(
    r"time/.*|memory/.*|learn/.*|rollout/num_workers|sync/(seconds|gb_per_s)|(rollout|rm)/tokens_per_s|(reward|eval)/source/.*_latency_p\d\d_s"
)
"""Metrics that depend on the machine and on what else it does."""
CALL_METRICS = re.compile(r"(reward|eval)/source/.*_score_(mean|std)")
"""Statistics that are put together from calls. Which requests share a call depends on when they come, and with it the
last bits."""

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_ThisIsNoTokenOfAnybodysAtAllXXXXXX",
    "RAYLHF_REWARD_TOKEN": "a-token-of-thirty-two-characters",
    "MY_REWARD_PASSWORD": "correct-horse-battery-staple",
}


@dataclass
class Command:
    """A started `raylhf` command."""

    process: psutil.Popen
    folder: Path
    """The run's folder."""
    mark: str
    """Value of the variable MARK in the environment of the command and of what it starts."""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    seen: set[psutil.Process] = field(default_factory=set)
    """Every process below the command's that was there at one of the looks at it."""

    @property
    def output(self) -> str:
        return (self.folder.parent / f"{self.mark}.out").read_text()

    @property
    def errors(self) -> str:
        return (self.folder.parent / f"{self.mark}.err").read_text()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds while the command runs."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}\n{self.story()}"
            assert time.monotonic() < deadline, f"no {what} within {WAIT_S:g} s\n{self.story()}"
            self._look()
            time.sleep(POLL_S)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout_s:g} s\n{self.story()}"
            self._look()
            time.sleep(POLL_S)
        self.seconds = time.monotonic() - self.started
        return self.process.returncode

    def interrupt(self) -> None:
        """Ctrl-C in a terminal: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def descendants(self) -> set[psutil.Process]:
        """Every process below the command's that was seen, or that has its mark."""
        self._look()
        return self.seen | self._marked()

    def left_running(self, grace_s: float = GRACE_S) -> list[str]:
        """Processes of the command that outlive it by `grace_s`."""
        _, alive = psutil.wait_procs(self.seen | self._marked(), timeout=grace_s)
        return [described for process in alive if (described := _describe(process))]

    def kill(self) -> None:
        """End everything at once."""
        self._look()
        for process in [self.process, *self.seen, *self._marked()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def rows(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The rows so far; a look at the last one while it is written anew is taken again."""
        path = self.folder / file
        while path.exists():
            is_over = self.process.poll() is not None
            try:
                return [json.loads(line) for line in path.read_text().splitlines()]
            except ValueError:
                if is_over:
                    raise
        return []

    def story(self) -> str:
        """What the command wrote, for the message of a failed test."""
        return f"--- stdout\n{self.output[-3000:]}\n--- stderr\n{self.errors[-6000:]}"

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen.update(self.process.children(recursive=True))

    def _marked(self) -> set[psutil.Process]:
        """Processes with our mark in their environment, wherever they hang in the tree of processes."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.add(process)
        return found


class CommandLine:
    """Starts commands in one place: a home, a folder for temporary files and a cache of models for all of them."""

    def __init__(self, place: Path):
        self.place = place
        self.commands: list[Command] = []
        (place / "home").mkdir()
        (place / "runs").mkdir()
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "RAY_", "VLLM_"))
        }
        self._environment |= {
            "HOME": str(place / "home"),
            "TMPDIR": str(place),
            "RAYLHF_CACHE": os.environ.get("RAYLHF_CACHE", str(place / "cache")),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "COLUMNS": "200",
            "RAY_worker_niceness": "0",  # by default anything else on the machine starves the workers
        }

    def start(
        self, name: str, *overrides: str, config: Path = TINY, environment: Mapping[str, str] | None = None
    ) -> Command:
        """Start `raylhf train` with a plain console; the run's folder is `runs/NAME`."""
        settings = (f"name={name}", f"output_dir={self.place / 'runs'}", "tracking.console=plain")
        return self.spawn(name, "train", str(config), *settings, *overrides, environment=environment)

    def spawn(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Command:
        """Start any `raylhf` command; NAME tells its output from that of others."""
        mark = f"{name}.{len(self.commands)}"
        runs = self.place / "runs"
        with (runs / f"{mark}.out").open("w") as out, (runs / f"{mark}.err").open("w") as err:
            process = psutil.Popen(
                [str(Path(sys.executable).with_name("raylhf")), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.place,
                env=self._environment | {MARK: mark} | dict(environment or {}),
                start_new_session=True,
            )
        self.commands.append(Command(process, runs / name, mark))
        return self.commands[-1]

    def run(self, name: str, *overrides: str, **options: Any) -> Command:
        """Start and wait for the end, whatever its exit code."""
        command = self.start(name, *overrides, **options)
        command.wait()
        return command

    def call(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Command:
        """Any `raylhf` command to its end, whatever its exit code."""
        command = self.spawn(name, *arguments, environment=environment)
        command.wait()
        return command


def numbers(command: Command) -> list[dict[str, Any]]:
    """The rows of metrics without what the clock decides; equal numbers in JSON are equal bits, but for rounding where
    calls decide the last ones."""
    return [
        {
            key: round(value, 6) if CALL_METRICS.fullmatch(key) else value
            for key, value in row.items()
            if not CLOCK_METRICS.fullmatch(key)
        }
        for row in command.rows()
    ]


def undocumented(command: Command) -> set[str]:
    """Keys of the rows of metrics that no line of docs/metrics.md is about."""
    keys = re.findall(r"^\| `([^`]+)` \|", (REPOSITORY / "docs" / "metrics.md").read_text(), re.MULTILINE)
    patterns = [re.escape(key).replace("<name>", "[a-z0-9_/]+") for key in keys]
    known = re.compile(f"step|({'|'.join(patterns)})(_p(05|50|95))?")
    return {key for row in command.rows() for key in row if not known.fullmatch(key)}


def _describe(process: psutil.Process) -> str:
    """Command line of a process; empty if it has ended (a zombie holds nothing and waits for its parent's wait)."""
    try:
        status = process.status()
        return "" if status == psutil.STATUS_ZOMBIE else f"{process.pid} {status} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return ""
