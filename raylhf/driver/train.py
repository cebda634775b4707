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
from raylhf.driver.fingerprint import fixed_settings, require_same_settings
from raylhf.driver.folder import record_settings, run_folder
from raylhf.driver.ppo import Run, train_ppo
from raylhf.driver.report import print_report
from raylhf.driver.roles import prepare
from raylhf.driver.workers import running_workers
from raylhf.text.prompts import PromptOrder, drop_overlong, load_prompts, split_held_out
from raylhf.tracking import Tracker

EXIT_OK, EXIT_FAILED = 0, 1
EXIT_CODES = {"complete": EXIT_OK, "over KL budget": 3, "stopped": 130}
"""130 is a shell's code for an interrupt: the run was asked to stop, saved, and can be resumed."""

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # Threads that spin while they wait stall each other where cores are shared, as on a laptop: ten times slower, seen.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def train(config: RunConfig) -> int:
    """Run to the end, or to where the user stops it; returns the exit code."""
    folder = run_folder(config)
    everything = load_prompts(config.data)
    fingerprint = fixed_settings(config, everything)
    prompts, held_out = split_held_out(everything, config.data.held_out, config.seed)
    if not config.checkpoint.resume:
        set_checkpoints_aside(folder)
    checkpoint = newest_checkpoint(folder)
    resumed_step = None
    if checkpoint is not None:
        resumed_step = int(checkpoint[1]["step"])
        require_same_settings(checkpoint[1]["settings"], fingerprint, folder=str(folder))
    if resumed_step is not None and resumed_step >= config.num_steps and _is_complete(folder, resumed_step):
        print(
            f"The run {config.name!r} is complete: {folder} holds step {resumed_step} of {config.num_steps}. Raise "
            "num_steps to go on, or give another name= to start anew."
        )
        return EXIT_OK
    record_settings(config, folder)
    tracker = Tracker(config, folder, None if resumed_step is None else resumed_step + 1)
    evaluations: list[dict[str, Any]] = []
    status = "failed"
    try:
        with stop_on_signal() as should_stop:
            run = Run(
                config=config,
                folder=folder,
                tracker=tracker,
                fingerprint=fingerprint,
                should_stop=should_stop,
                evaluations=evaluations,
            )
            status = _start_and_train(run, prompts, held_out, checkpoint)
    except StopRequestedError:
        status = "stopped"
    except WorkerError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        tracker.finish(status, summary(evaluations))
    print_report(config, folder, status, evaluations)
    return EXIT_CODES[status]


def _start_and_train(
    run: Run,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    checkpoint: tuple[Path, dict[str, Any]] | None,
) -> str:
    """Start Ray and the workers, train, export; returns how the training ended."""
    config, timeout_s = run.config, run.config.cluster.start_timeout_s
    with ray_session(config.cluster, env=_ENVIRONMENT):
        run.tracker.set_phase("preparing the model")
        everything = [*prompts, *held_out]
        prepared = run_on_cluster(prepare, config, everything, timeout_s=timeout_s, should_stop=run.should_stop)
        lengths, longest = prepared.prompt_lengths, config.data.max_prompt_tokens
        prompts, run.dropped_overlong = drop_overlong(prompts, lengths[: len(prompts)], longest)
        if held_out:
            run.held_out, dropped = drop_overlong(held_out, lengths[-len(held_out) :], longest)
            run.dropped_overlong += dropped
        run.order = PromptOrder(prompts, seed=config.seed, shuffle=config.data.shuffle)
        run.tracker.set_phase("starting workers")
        with running_workers(config, prepared.model, prepared.critic, should_stop=run.should_stop) as run.workers:
            if checkpoint is not None:
                restore(run, *checkpoint)
            status = train_ppo(run)
            if config.checkpoint.export and status != "stopped":
                run.tracker.set_phase("export")
                exported = str(run.folder / "export")
                run.workers.learner.call_all("export", exported, timeout_s=config.cluster.step_timeout_s)
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
    run.step, run.kl = state["step"], state["kl"]
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
