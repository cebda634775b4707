"""`raylhf train`: the run's folder, Ray, workers, the loop, the report; and an orderly end whatever happens."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylhf.batch import Prompt
from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.cluster.session import ray_session, run_on_cluster
from raylhf.config import RunConfig
from raylhf.driver.checkpoints import newest_checkpoint, set_checkpoints_aside
from raylhf.driver.folder import open_run_folder
from raylhf.driver.ppo import Run, train_ppo
from raylhf.driver.report import print_report
from raylhf.driver.roles import prepare
from raylhf.driver.workers import running_workers
from raylhf.text.prompts import PromptOrder, drop_overlong, load_prompts, split_held_out
from raylhf.tracking import Tracker

EXIT_OK, EXIT_FAILED, EXIT_STOPPED = 0, 1, 130
"""EXIT_STOPPED is a shell's code for an interrupt: the run was asked to stop, saved, and can be resumed."""

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # Threads that spin while they wait stall each other where cores are shared, as on a laptop: ten times slower, seen.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def train(config: RunConfig) -> int:
    """Run to the end, or to where the user stops it; returns the exit code."""
    folder = open_run_folder(config)
    prompts, held_out = split_held_out(load_prompts(config.data), config.data.held_out, config.seed)
    if not config.checkpoint.resume:
        set_checkpoints_aside(folder)
    checkpoint = newest_checkpoint(folder)
    resumed_step = None if checkpoint is None else int(checkpoint[1]["step"])
    if resumed_step is not None and resumed_step >= config.num_steps and _is_complete(folder, resumed_step):
        print(
            f"The run {config.name!r} is complete: {folder} holds step {resumed_step} of {config.num_steps}. Raise "
            "num_steps to go on, or give another name= to start anew."
        )
        return EXIT_OK
    tracker = Tracker(config, folder, None if resumed_step is None else resumed_step + 1)
    evaluations: list[dict[str, Any]] = []
    status = "failed"
    try:
        with stop_on_signal() as should_stop:
            status = _run(config, folder, tracker, prompts, held_out, checkpoint, evaluations, should_stop)
    except StopRequestedError:
        status = "stopped"
    except WorkerError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        tracker.finish(status, summary(evaluations))
    print_report(config, folder, status, evaluations)
    return EXIT_STOPPED if status == "stopped" else EXIT_OK


def _run(
    config: RunConfig,
    folder: Path,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    checkpoint: tuple[Path, dict[str, Any]] | None,
    evaluations: list[dict[str, Any]],
    should_stop: Callable[[], bool],
) -> str:
    """Start Ray and the workers, train, export; fills `evaluations` and returns how the training ended."""
    timeout_s = config.cluster.start_timeout_s
    with ray_session(config.cluster, env=_ENVIRONMENT):
        tracker.set_phase("preparing the model")
        everything = [*prompts, *held_out]
        prepared = run_on_cluster(prepare, config, everything, timeout_s=timeout_s, should_stop=should_stop)
        lengths, longest = prepared.prompt_lengths, config.data.max_prompt_tokens
        prompts, dropped = drop_overlong(prompts, lengths[: len(prompts)], longest)
        if held_out:
            held_out, dropped_held_out = drop_overlong(held_out, lengths[-len(held_out) :], longest)
            dropped += dropped_held_out
        tracker.set_phase("starting workers")
        with running_workers(config, prepared.model, prepared.critic, should_stop=should_stop) as workers:
            run = Run(
                config=config,
                folder=folder,
                workers=workers,
                tracker=tracker,
                order=PromptOrder(prompts, seed=config.seed, shuffle=config.data.shuffle),
                held_out=held_out,
                should_stop=should_stop,
                dropped_overlong=dropped,
                evaluations=evaluations,
            )
            if checkpoint is not None:
                restore(run, *checkpoint)
            status = train_ppo(run)
            if config.checkpoint.export and status != "stopped":
                tracker.set_phase("export")
                workers.learner.call_all("export", str(folder / "export"), timeout_s=config.cluster.step_timeout_s)
            return status


def _is_complete(folder: Path, step: int) -> bool:
    """Whether the run of this folder came to its end at `step`, with the last evaluation and the export."""
    file = folder / "summary.json"
    last = json.loads(file.read_text()) if file.is_file() else {}
    return last.get("status") == "complete" and last["step"] == step


def restore(run: Run, folder: Path, state: dict[str, Any]) -> None:
    """Continue from a checkpoint."""
    run.tracker.set_phase(f"resuming from {folder.name}")
    run.workers.learner.call_all("load", str(folder), timeout_s=run.config.cluster.step_timeout_s)
    run.order.restore(state["order"])
    run.step = state["step"]
    run.evaluations.extend(state["evaluations"])


def summary(evaluations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The first and last held-out rewards, for the tracker's summary."""
    scored = [e["metrics"] for e in evaluations if e["metrics"]]
    if not scored:
        return {}
    return {"eval/score_first": scored[0]["eval/score_mean"], "eval/score_last": scored[-1]["eval/score_mean"]}


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A first Ctrl-C or SIGTERM asks the run to save and stop; a second Ctrl-C ends it without saving."""
    requested = False

    def request(signum: int, _frame: object) -> None:
        nonlocal requested
        if requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
