"""A readable report for each worker that is lost: `crashes/NNN-<worker>.txt` in the run's folder."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylhf.cluster.actors import START_OF_LOG, WorkersLostError
from raylhf.cluster.pool import Loss
from raylhf.tracking.redaction import without_secrets

LOGGER = logging.getLogger(__name__)
FOLDER = "crashes"
LAST_LINES = 40
TAIL_BYTES = 64 * 2**10
LOG_FOLDER = "logs"
ROLES = ("rollout", "reward", "learner")
_WORKER = re.compile(rf"({'|'.join(ROLES)}) \d+")
_RAISED = " failed in "
"""How the driver says that a worker raised."""
_FATAL = re.compile(r"Fatal Python error: (.+)")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE",
}


@dataclass(frozen=True)
class Crash:
    """What is known of a lost worker."""

    who: str
    phase: str
    """What the run was doing."""
    step: int
    """Steps done."""
    prompts: Sequence[int]
    """Rows of the data that the batch under way is made of."""
    where: str
    """Node and process; empty if it never came up."""
    reason: str
    log_file: Path | None
    """What the worker and its children wrote, if this machine can read it."""
    out_of_memory_kills: int
    """Processes that the kernel ended for want of memory on the driver's machine since the report before."""


@dataclass(frozen=True)
class Moment:
    """Where a run stands."""

    phase: str
    step: int
    prompts: Sequence[int]


class CrashReporter:
    """Writes a report for each lost worker, and tells of it in one line."""

    def __init__(self, run_folder: Path, log_folder: Path, moment: Callable[[], Moment]) -> None:
        self._folder = run_folder
        self._logs = log_folder
        self._moment = moment
        self._kills_before = out_of_memory_kills()

    def worker_lost(self, loss: Loss) -> None:
        """A rollout or reward worker, which is replaced, or given up where it was to join the others."""
        identity = loss.identity
        where = "" if identity is None else f"process {identity.pid} on {identity.node_ip}"
        consequence = "the run goes on without it" if loss.is_extra else "another takes its place"
        self._report(loss.name, where, loss.reason, consequence)

    def learners_lost(self, error: WorkersLostError) -> None:
        """The ranks that are named in `error`; all are replaced."""
        for name in dict.fromkeys(name.partition(" (")[0] for name in error.names):  # without what the call was for
            self._report(name, "", str(error), "all learners go back to the newest checkpoint")

    def _report(self, who: str, where: str, reason: str, consequence: str) -> None:
        moment, reason = self._moment(), without_secrets(reason)
        log_file = self._logs / f"{who.replace(' ', '-')}.log"
        kills = out_of_memory_kills() - self._kills_before
        self._kills_before += kills  # each is told of once
        crash = Crash(who, moment.phase, moment.step, moment.prompts, where, reason, log_file, kills)
        try:
            file = report_crash(self._folder, crash)
        except OSError as error:  # the run can go on without the report
            LOGGER.warning("%s is lost (%s), and no report of it can be written (%s)", who, reason, error)
            return
        LOGGER.warning("%s is lost at step %d (%s); %s: see %s", who, moment.step, moment.phase, consequence, file)


def report_failure(run_folder: Path, moment: Moment, error: Exception) -> Path | None:
    """Report what ended the run; None where that cannot be written."""
    reason = str(error)
    lost = error.names[0].partition(" (")[0] if isinstance(error, WorkersLostError) else ""
    named = _WORKER.match(reason)
    who = lost or (named[0] if named else "run")
    log_file = run_folder / LOG_FOLDER / f"{who.replace(' ', '-')}.log" if who.startswith(ROLES) else None
    crash = Crash(who, moment.phase, moment.step, moment.prompts, "", reason, log_file, 0)
    try:
        return report_crash(run_folder, crash)
    except OSError as failure:
        LOGGER.warning("no report of the run's end can be written (%s)", failure)
        return None


def report_crash(run_folder: Path, crash: Crash) -> Path:
    """Write the report; returns its file."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    number = max((int(file.name[:3]) for file in folder.glob("[0-9][0-9][0-9]-*")), default=0) + 1
    file = folder / f"{number:03d}-{crash.who.replace(' ', '-')}.txt"
    lines = last_lines(crash.log_file)
    report = "\n".join(
        [
            f"who:     {crash.who}" + (f" ({crash.where})" if crash.where else ""),
            f"when:    {time.strftime('%Y-%m-%d %H:%M:%S')}, while the run did: {crash.phase}",
            f"step:    {crash.step} steps were done",
            f"prompts: {', '.join(map(str, crash.prompts)) or 'none under way'}",
            f"ended:   {how_it_ended(crash, lines)}",
            f"reason:  {crash.reason.strip()}",
            f"log:     {crash.log_file or 'none'}; its last lines:",
            *(f"    {line}" for line in lines),
            "",
        ]
    )
    file.write_text(without_secrets(report))
    return file


def how_it_ended(crash: Crash, lines: Sequence[str]) -> str:
    """The signal, as far as it can be told, and a hint where memory ran out."""
    hint = ""
    if crash.out_of_memory_kills:
        hint = (
            f"; the kernel has ended {crash.out_of_memory_kills} processes for want of memory on the driver's machine: "
            "lower rollout.kv_cache_gib, learner.micro_batch_tokens or the replicas, or give the node more memory"
        )
    elif "OutOfMemory" in crash.reason or "out of memory" in crash.reason.lower():
        hint = "; Ray's memory monitor ended it: the node ran out of memory"
    for line in reversed(lines):
        if found := _FATAL.search(line):
            return f"{_SIGNALS.get(found[1].strip(), found[1].strip())}{hint}"
    if _RAISED in crash.reason:
        return f"it raised an error{hint}"
    if not crash.who.startswith(ROLES):
        return f"the run ended{hint}"
    if "hangs" in crash.reason or "did not" in crash.reason:
        return f"it was silent, and was ended by the driver{hint}"
    return f"without a last word, as after SIGKILL{hint}"


def last_lines(file: Path | None) -> list[str]:
    """The end of a log since the process started; empty where it cannot be read here."""
    if file is None or not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return text[max(text.rfind(START_OF_LOG), 0) :].splitlines()[-LAST_LINES:]


def out_of_memory_kills() -> int:
    """Processes that the kernel has ended for want of memory: in this container, or else on this machine."""
    for file, key in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        if file.is_file():
            counts = dict(line.split() for line in file.read_text().splitlines())
            if key in counts:
                return int(counts[key])
    return 0
