"""`raylhf train`: the run's folder, the job, the report; and an orderly end whatever happens."""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.config.run import AnyRunConfig, OfflineRunConfig
from raylhf.driver.checkpoints import CheckpointError, newest_checkpoint, set_checkpoints_aside
from raylhf.driver.crash import Moment, report_failure
from raylhf.driver.fingerprint import require_same_settings
from raylhf.driver.folder import locked, record_settings, run_folder
from raylhf.driver.job import Job, RunContext
from raylhf.driver.ledger import set_ledger_aside
from raylhf.driver.scaling import set_request_aside
from raylhf.tracking import Tracker
from raylhf.tracking.redaction import without_secrets

EXIT_OK, EXIT_FAILED = 0, 1
EXIT_CODES = {"complete": EXIT_OK, "over KL budget": 3, "stopped": 130}
"""130 is a shell's code for an interrupt: the run was asked to stop, saved, and can be resumed."""
EXIT_REQUEUE = 85
"""The same, by SIGUSR1: a scheduler takes the nodes away, and `launch/slurm.sbatch` queues the job again."""


@dataclass
class StopRequest:
    """Whether the run was asked to stop, and how."""

    signum: int | None = None

    def __call__(self) -> bool:
        return self.signum is not None


def train(config: AnyRunConfig) -> int:
    """Run to the end, or to where the user stops it; returns the exit code.

    Raises:
        ValueError: the user's mistake, or another process trains the run.
    """
    folder = run_folder(config)
    with locked(folder):
        return _train_in(folder, config)


def _train_in(folder: Path, config: AnyRunConfig) -> int:
    job = open_job(config)
    if not config.checkpoint.resume:
        set_checkpoints_aside(folder)
    checkpoint = newest_checkpoint(folder)
    resumed_step = None
    if checkpoint is not None:
        resumed_step = int(checkpoint[1]["step"])
        require_same_settings(checkpoint[1]["settings"], job.fingerprint, folder=str(folder))
    if resumed_step is not None and resumed_step >= job.num_steps and _is_complete(folder, resumed_step):
        print(
            f"The run {config.name!r} is complete: {folder} holds step {resumed_step} of {job.num_steps}. Raise "
            "num_steps to go on, or give another name= to start anew."
        )
        return EXIT_OK
    if resumed_step is None:
        set_ledger_aside(folder)
        set_request_aside(folder)
    record_settings(config, folder)
    tracker = Tracker(config, folder, None if resumed_step is None else resumed_step + 1, num_steps=job.num_steps)
    evaluations: list[dict[str, Any]] = []
    status = "failed"
    request = StopRequest()
    try:
        with stop_on_signal(request):
            context = RunContext(folder, tracker, job.fingerprint, request, evaluations)
            status = job.run(context, checkpoint)
    except StopRequestedError:
        status = "stopped"
    except (WorkerError, CheckpointError, OSError) as error:
        sentence = without_secrets(_describe_os_error(folder, error) if isinstance(error, OSError) else str(error))
        print(f"raylhf: {sentence}", file=sys.stderr)
        moment = Moment(tracker.phase, tracker.step, job.rows_under_way())
        if (report := report_failure(folder, moment, error)) is not None:
            print(f"raylhf: see {report}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        tracker.finish(status, job.summary(evaluations))
    job.report(folder, status, evaluations)
    return EXIT_REQUEUE if status == "stopped" and request.signum == signal.SIGUSR1 else EXIT_CODES[status]


def _describe_os_error(folder: Path, error: OSError) -> str:
    free_gib = shutil.disk_usage(folder).free / 2**30
    return (
        f"{error} ({free_gib:.3g} GiB of the disk of {folder} are free). Mend what failed, and give the same command "
        "again: the run goes on from its newest checkpoint"
    )


def open_job(config: AnyRunConfig) -> Job:
    """Read what the run trains on, before anything starts.

    Raises:
        ValueError: the data cannot be read; the sentence names file and line.
    """
    if isinstance(config, OfflineRunConfig):
        from raylhf.driver.offline import OfflineJob

        return OfflineJob(config)
    from raylhf.driver.policy import PolicyJob

    return PolicyJob(config)


def _is_complete(folder: Path, step: int) -> bool:
    """Whether the run of this folder came to its end at `step`, with the last evaluation and the export."""
    file = folder / "summary.json"
    last = json.loads(file.read_text()) if file.is_file() else {}
    return last.get("status") == "complete" and last["step"] == step


@contextmanager
def stop_on_signal(stop: StopRequest) -> Iterator[None]:
    """A first Ctrl-C, SIGTERM or SIGUSR1 asks the run to save and stop; a second Ctrl-C ends it without saving."""

    def request(signum: int, _frame: object) -> None:
        if stop() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signum = stop.signum or signum

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
