"""The training loop: sample, score, learn, publish."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylhf.batch import Prompt
from raylhf.cluster.actors import Held, StopRequestedError, WorkerError, WorkersLostError, gather
from raylhf.config import RunConfig
from raylhf.driver.batch_metrics import batch_metrics, version_metrics
from raylhf.driver.batches import TRAIN_SEED, BatchQueue
from raylhf.driver.checkpoints import (
    CheckpointError,
    commit_checkpoint,
    newest_checkpoint,
    require_files,
    writing_checkpoint,
)
from raylhf.driver.collect import Collection, ScoredGroup, hand_over, sample_rows, share_among_ranks
from raylhf.driver.crash import CrashReporter
from raylhf.driver.evaluate import Evaluation, evaluate
from raylhf.driver.ledger import Ledger
from raylhf.driver.memory import StoreWatch, total_rss_gib
from raylhf.driver.timing import timed
from raylhf.driver.workers import Workers
from raylhf.text.prompts import PromptOrder
from raylhf.tracking import Tracker

_EVAL_SEED = TRAIN_SEED + 1
MAX_CALIBRATION_PASSES = 3
MISMATCH_LIMIT = 0.3
"""Mean |learner - engine| log-probability: healthy is below 0.01, stale or foreign weights are beyond this."""


@dataclass
class Run:
    """What the loop works with, and where it stands."""

    config: RunConfig
    folder: Path
    tracker: Tracker
    fingerprint: dict[str, Any]
    """The settings that a resumed run must share."""
    should_stop: Callable[[], bool]
    evaluations: list[dict[str, Any]]
    """Held-out evaluations so far, oldest first."""
    crashes: CrashReporter = field(init=False)
    ledger: Ledger = field(init=False)
    workers: Workers = field(init=False)
    order: PromptOrder = field(init=False)
    store: StoreWatch = field(default_factory=StoreWatch)
    batches: BatchQueue = field(init=False)
    held_out: Sequence[Prompt] = ()
    dropped_overlong: int = 0
    step: int = 0
    """Steps done; also the version of the weights."""
    saved_step: int = 0
    """Step of the newest checkpoint."""
    kl: float = 0.0
    """KL to the reference per response, as last measured."""
    is_updating: bool = False
    """Whether the learners are in between two steps: they learn, or what belongs to the step is not noted yet."""
    sampling: Sequence[Prompt] = ()
    """The prompts of the batch that is sampled or learnt from now."""
    beginning: dict[str, Any] = field(default_factory=dict)
    """The state before the first step, where there is no checkpoint to go back to."""
    num_learner_losses: int = 0
    """Since the run got further than ever before."""
    furthest_step: int = 0


def train_ppo(run: Run) -> str:
    """Train until the last step; returns why it ended: `complete`, `stopped` or `over KL budget`.

    When learners are lost, new ones go on from the newest checkpoint.

    Raises:
        WorkerError: a worker failed, or was lost more often than cluster.max_restarts without progress in between.
        ValueError: a mistake in the settings or the data that showed only now.
    """
    loss: WorkersLostError | None = None
    while True:
        try:
            if loss is not None:
                go_back(run, loss)
            return _train_on(run)
        except WorkersLostError as error:
            loss = error.with_traceback(None)  # whose frames hold the lost batch


def go_back(run: Run, loss: WorkersLostError) -> None:
    """Start new learners, and everything else from the newest checkpoint.

    Raises:
        WorkerError: the learners were lost too often without progress of the run in between.
    """
    run.num_learner_losses = run.num_learner_losses + 1 if run.step <= run.furthest_step else 1
    run.furthest_step = max(run.furthest_step, run.step)
    run.crashes.learners_lost(loss)
    most = run.config.cluster.max_restarts
    if run.num_learner_losses > most:
        raise WorkerError(
            f"the learners were lost {run.num_learner_losses} times at step {run.furthest_step} without getting any "
            f"further (cluster.max_restarts={most}); the last time: {loss}"
        ) from loss
    run.tracker.set_phase("restarting the learners")
    checkpoint = newest_checkpoint(run.folder)
    run.is_updating = False
    restore_driver(run, run.beginning if checkpoint is None else checkpoint[1])
    run.workers.restart_learners()
    if checkpoint is not None:
        load_learners(run, checkpoint[0])
    run.tracker.rewind(0 if checkpoint is None else run.step + 1)


def _train_on(run: Run) -> str:
    """From where the run stands to its end, unless learners are lost."""
    run.saved_step = run.step
    run.ledger.begin(run.step, next_draw=run.order.num_drawn)
    run.tracker.set_phase("first weights")
    publish_weights(run)  # a resumed learner is ahead of the folder that the engines loaded
    try:
        status = _loop(run)
    except StopRequestedError:
        if run.is_updating:  # while the step's observations were to be noted: the run goes on from the last checkpoint
            return "stopped"
        status = "stopped"
    except WorkersLostError:  # of the learners, and with them what they learnt since the last checkpoint
        raise
    except (WorkerError, ValueError, OSError):
        # A failure while they learn or send leaves the learners in between two steps; else nothing need be lost.
        if not run.is_updating:
            with suppress(
                WorkerError, ValueError, OSError, CheckpointError
            ):  # the failure that led here is the one to report
                _save_rest(run)
        raise
    _save_rest(run)
    return status


def _save_rest(run: Run) -> None:
    if run.saved_step < run.step:
        save(run)


def _loop(run: Run) -> str:
    config = run.config
    if not run.evaluations:
        calibrate_rewards(run)
        evaluate_now(run)
    run.tracker.start_is_over(run.step, run.workers.start_seconds)
    while True:
        is_over = run.step >= config.num_steps or is_over_budget(run)
        every = config.evaluation.every_steps
        if (is_over or (every and run.step % every == 0)) and not _is_evaluated(run):
            evaluate_now(run)
        if is_over and run.evaluations:  # the last update is measured here only
            run.kl = max(run.kl, run.evaluations[-1]["metrics"]["eval/kl_to_ref"])
        # After the evaluation, which is thus in the checkpoint and not done again when the run goes on from here.
        if run.saved_step < run.step and run.step % (config.checkpoint.every_steps or config.num_steps) == 0:
            save(run)
        if is_over:
            break
        run.kl = train_step(run)
        if run.should_stop():
            return "stopped"
    return "over KL budget" if is_over_budget(run) else "complete"


def _is_evaluated(run: Run) -> bool:
    return bool(run.evaluations) and run.evaluations[-1]["step"] == run.step


def is_over_budget(run: Run) -> bool:
    """Whether the KL has passed the budget."""
    budget = run.config.kl_budget
    return budget is not None and run.kl > budget


def train_step(run: Run) -> float:
    """One rollout batch from prompts to published weights; returns its KL to the reference per response."""
    config, step_seconds = run.config, timed()
    run.workers.follow_scaling()
    batch = run.batches.open(run.step)
    run.sampling = batch.prompts
    run.tracker.set_phase("rollout")
    wait_seconds = timed()
    run.workers.statistics.observe(True)
    learners = run.workers.learner
    groups = hand_over(
        batch.collection,
        learners,
        lambda groups: references_of(groups, len(learners)),
        timeout_s=config.cluster.step_timeout_s,
        ahead=run.batches.ahead(),
    )
    run.batches.note_finished()
    metrics = {"time/wait_s": wait_seconds(), "time/rollout_s": run.batches.seconds(batch)}
    metrics["rollout/num_workers"] = len(run.workers.rollout.serving())
    metrics |= batch_metrics(groups, area="reward", seconds=run.batches.cycle_seconds(batch))
    metrics |= version_metrics(groups, version=run.step)
    if metrics["rollout/staleness_max"] > config.rollout.max_staleness:
        raise WorkerError(f"a token of step {run.step + 1} is {metrics['rollout/staleness_max']:g} versions old")
    metrics["memory/object_store_frac"] = run.store.fullest()
    run.tracker.set_phase("learn")
    run.is_updating = True
    learn_seconds = timed()
    metrics |= learn(run)
    metrics["time/learn_s"] = learn_seconds()
    if metrics["rollout/staleness_max"] == 0:  # else the policy has moved since, by as much as a step may move it
        require_agreement(metrics["mismatch/abs_dlogprob_mean"], run.step)
    run.step += 1
    account(run, groups, batch.first)
    run.batches.close(batch)
    run.workers.statistics.commit()
    run.is_updating = False
    run.tracker.set_phase("sync")
    try:
        metrics |= publish_weights(run)
    finally:  # the step is done, whether or not its weights find somebody to sample with them
        metrics["time/step_s"] = step_seconds()
        log_step(run, groups, metrics | {"data/epoch": batch.epochs})
    run.workers.progressed()
    run.batches.raise_problem()
    run.workers.scaling.after_step(rollout_s=metrics["time/rollout_s"], learn_s=metrics["time/learn_s"])
    run.sampling = ()
    return metrics["policy/kl_to_ref"]


def log_step(run: Run, groups: Sequence[ScoredGroup], metrics: dict[str, float]) -> None:
    """Numbers, distributions and samples of the step that was just done."""
    run.tracker.log_histogram(
        run.step,
        "reward/score",
        [s for g in groups for s, ok in zip(g.reward_summary["scores"], g.reward_summary["valid"], strict=True) if ok],
    )
    run.tracker.log_histogram(
        run.step, "rollout/response_length", [n for g in groups for n in g.rollout_summary["lengths"]]
    )
    run.tracker.log_samples(run.step, sample_rows(groups), name="train")
    more = {
        "data/dropped_overlong_count": run.dropped_overlong,
        "memory/total_rss_gib": total_rss_gib(),
    }
    run.tracker.log(run.step, metrics | more)


def require_agreement(mismatch: float, version: int) -> None:
    """WorkerError if the engines clearly do not serve the learners' weights (kernels differ by far less)."""
    if mismatch > MISMATCH_LIMIT:
        raise WorkerError(
            f"learner and rollout workers disagree by {mismatch:.3g} nats a token (limit {MISMATCH_LIMIT:g}) on "
            f"responses of version {version}: the engines do not serve the learner's weights, or another temperature"
        )


def references_of(groups: Sequence[ScoredGroup], num_ranks: int) -> list[list[list[Any]]]:
    """Rollouts and rewards of whole groups for each rank."""
    shares = share_among_ranks(groups, num_ranks)
    return [[[group.rollouts for group in share], [group.rewards for group in share]] for share in shares]


def learn(run: Run) -> dict[str, float]:
    """Update the learners with the groups that they hold, while the next ones are sampled."""
    updates = run.workers.learner.submit_all("update", Held())
    timeout_s = run.config.cluster.step_timeout_s
    return gather(updates, phase="learning", timeout_s=timeout_s, meanwhile=run.batches.advance)[0]


def account(run: Run, groups: Sequence[ScoredGroup], first: int) -> None:
    """Note in the ledger what became of each draw of the step; `first` is the number of the first."""
    consumed = {}
    for draw, group in enumerate(groups, start=first):
        if num_valid := sum(group.reward_summary["valid"]):
            consumed[draw] = num_valid
        else:
            run.ledger.drop(run.step, [draw], "no response has a valid score")
    run.ledger.consume(run.step, consumed)


def publish_weights(run: Run) -> dict[str, float]:
    """Send the learners' weights to every rollout worker as version `run.step`, and read the version back."""
    return run.workers.publish(run.step)


def calibrate_rewards(run: Run) -> None:
    """Let stateful rewards see the untrained policy's held-out responses, so that the first step is on their scale."""
    if not (run.held_out and run.config.reward.has_state):
        return
    run.tracker.set_phase("calibrating rewards")
    run.workers.statistics.observe(True)
    # A node above another stateful one learns its scale in a pass of its own, when the lower one has learnt its.
    for _ in range(MAX_CALIBRATION_PASSES):
        Collection(
            run.workers, run.held_out, num_responses=1, seed_key=(_EVAL_SEED,), should_stop=run.should_stop
        ).run()
        run.workers.statistics.commit()
        if not run.workers.statistics.needs_commit():
            return
    raise ValueError(
        f"the {len(run.held_out)} held-out prompts gave no valid score to a reward that calibrates itself on them "
        "(calibrate with source: reference, whiten, adaptive): hold out prompts of every kind that the graph routes, "
        "or see why the scores fail (raylhf score)"
    )


def evaluate_now(run: Run) -> None:
    """Evaluate the present policy on the held-out prompts, always with the same seeds."""
    if not run.held_out:
        return
    run.tracker.set_phase("evaluation")
    run.workers.statistics.observe(False)
    seconds = timed()
    result: Evaluation = evaluate(run.workers, run.held_out, seed_key=(_EVAL_SEED,), should_stop=run.should_stop)
    run.evaluations.append({"step": run.step, "metrics": result.metrics, "samples": result.samples})
    run.tracker.log(run.step, {**result.metrics, "time/eval_s": seconds()})
    run.tracker.log_samples(run.step, result.samples, name="held_out")


def save(run: Run) -> None:
    """Write a checkpoint of everything that the rest of the run depends on."""
    run.tracker.set_phase("checkpoint")
    seconds = timed()
    with writing_checkpoint(run.folder, run.step, let_through=(WorkersLostError,)) as folder:
        seen = run.workers.learner.call_all("save", str(folder), timeout_s=run.config.cluster.step_timeout_s)
        require_files(folder, seen)
        state = state_of(run) | {"settings": run.fingerprint}
        commit_checkpoint(folder, step=run.step, state=state, keep=run.config.checkpoint.keep)
    run.ledger.save(run.step)
    run.saved_step = run.step
    run.tracker.log(run.step, {"time/save_s": seconds()})


def state_of(run: Run) -> dict[str, Any]:
    """What the driver must know to go on from here."""
    return {
        "step": run.step,
        "kl": run.kl,
        "order": run.batches.position(),
        "reward": run.workers.statistics.state,
        "evaluations": list(run.evaluations),
    }


def restore_driver(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from a `state_of`; the learners are to load what belongs to it."""
    run.workers.statistics.load(state["reward"])
    run.batches.clear()
    run.order.restore(state["order"])
    run.step, run.kl = state["step"], state["kl"]
    run.evaluations[:] = state["evaluations"]


def load_learners(run: Run, folder: Path) -> None:
    """Have all ranks load their part of a checkpoint."""
    run.workers.learner.call_all("load", str(folder), timeout_s=run.config.cluster.step_timeout_s)
