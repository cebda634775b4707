"""The training loop: sample, score, learn, publish."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylhf.batch import Prompt
from raylhf.cluster.actors import StopRequestedError, WorkerError, gather
from raylhf.config import RunConfig
from raylhf.driver.checkpoints import begin_checkpoint, commit_checkpoint
from raylhf.driver.collect import ScoredGroup, batch_metrics, collect, share_among_ranks, timed
from raylhf.driver.evaluate import Evaluation, evaluate, sample_rows
from raylhf.driver.memory import total_rss_gib
from raylhf.driver.workers import Workers
from raylhf.rewards.state import merge_pending
from raylhf.text.prompts import PromptOrder
from raylhf.tracking import Tracker

_TRAIN_SEED, _EVAL_SEED = 0, 1
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
    workers: Workers = field(init=False)
    order: PromptOrder = field(init=False)
    held_out: Sequence[Prompt] = ()
    dropped_overlong: int = 0
    step: int = 0
    """Steps done; also the version of the weights."""
    saved_step: int = 0
    """Step of the newest checkpoint."""
    kl: float = 0.0
    """KL to the reference per response, as last measured."""
    is_updating: bool = False
    """Whether the learners are in between two steps: they learn, or send what they learnt."""


def train_ppo(run: Run) -> str:
    """Train until the last step; returns why it ended: `complete`, `stopped` or `over KL budget`."""
    run.saved_step = run.step
    publish_weights(run)  # a resumed learner is ahead of the folder that the engines loaded
    try:
        status = _loop(run)
    except StopRequestedError:
        status = "stopped"
    except (WorkerError, ValueError):
        # A failure while they learn or send leaves the learners in between two steps; else nothing need be lost.
        if not run.is_updating:
            with suppress(WorkerError, ValueError):  # the failure that led here is the one to report
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
    while run.step < config.num_steps and not is_over_budget(run):
        run.kl = train_step(run)
        if run.step % (config.checkpoint.every_steps or config.num_steps) == 0:
            save(run)
        if run.should_stop():
            return "stopped"
        every = config.evaluation.every_steps
        if every and run.step % every == 0 and run.step < config.num_steps:
            evaluate_now(run)
    if not run.evaluations or run.evaluations[-1]["step"] < run.step:
        evaluate_now(run)
    if run.evaluations:  # the last update is measured here only
        run.kl = max(run.kl, run.evaluations[-1]["metrics"]["eval/kl_to_ref"])
    return "over KL budget" if is_over_budget(run) else "complete"


def is_over_budget(run: Run) -> bool:
    """Whether the KL has passed the budget."""
    budget = run.config.kl_budget
    return budget is not None and run.kl > budget


def train_step(run: Run) -> float:
    """One rollout batch from prompts to published weights; returns its KL to the reference per response."""
    config, step_seconds = run.config, timed()
    position = run.order.state()
    prompts = run.order.draw(config.rollout.prompts_per_step)
    run.tracker.set_phase("rollout")
    rollout_seconds = timed()
    _observe_rewards(run, True)
    try:
        groups = collect(
            config,
            run.workers,
            prompts,
            num_responses=config.rollout.group_size,
            seed_key=(_TRAIN_SEED, run.step),
            should_stop=run.should_stop,
        )
        seconds = rollout_seconds()
        metrics = {"time/rollout_s": seconds, **batch_metrics(groups, area="reward", seconds=seconds)}
    except (StopRequestedError, WorkerError, ValueError):
        run.order.restore(position)  # what was drawn was not consumed
        raise
    metrics["rollout/policy_version"] = min(group.rollout_summary["policy_version"] for group in groups)
    run.tracker.set_phase("learn")
    run.is_updating = True
    learn_seconds = timed()
    metrics |= learn(run, groups)
    metrics["time/learn_s"] = learn_seconds()
    require_agreement(metrics["mismatch/abs_dlogprob_mean"], run.step)
    run.step += 1
    run.tracker.set_phase("sync")
    metrics |= publish_weights(run)
    run.is_updating = False
    commit_reward_state(run)
    metrics |= {
        "time/step_s": step_seconds(),
        "data/epoch": run.order.epochs_done,
        "data/dropped_overlong_count": run.dropped_overlong,
        "memory/total_rss_gib": total_rss_gib(),
    }
    run.tracker.log_histogram(
        run.step,
        "reward/score",
        [s for g in groups for s, ok in zip(g.reward_summary["scores"], g.reward_summary["valid"], strict=True) if ok],
    )
    run.tracker.log_histogram(
        run.step, "rollout/response_length", [n for g in groups for n in g.rollout_summary["lengths"]]
    )
    rows = sample_rows(groups, limit=config.tracking.samples_per_step)
    run.tracker.log_samples(run.step, rows, name="train")
    run.tracker.log(run.step, metrics)
    return metrics["policy/kl_to_ref"]


def require_agreement(mismatch: float, version: int) -> None:
    """WorkerError if the engines clearly do not serve the learners' weights (kernels differ by far less)."""
    if mismatch > MISMATCH_LIMIT:
        raise WorkerError(
            f"learner and rollout workers disagree by {mismatch:.3g} nats a token (limit {MISMATCH_LIMIT:g}) on "
            f"responses of version {version}: the engines do not serve the learner's weights, or another temperature"
        )


def learn(run: Run, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Give every rank its whole groups, by reference, and update."""
    learners = run.workers.learner
    shares = share_among_ranks(groups, len(learners))
    updates = {
        learners.name(rank): learners.submit(
            rank, "update", [group.rollouts for group in share], [group.rewards for group in share]
        )
        for rank, share in enumerate(shares)
    }
    return gather(updates, phase="learning", timeout_s=run.config.cluster.step_timeout_s)[0]


def publish_weights(run: Run) -> dict[str, float]:
    """Send the learners' weights to every rollout worker as version `run.step`, and read the version back."""
    timeout_s, learners, rollout = run.config.cluster.step_timeout_s, run.workers.learner, run.workers.rollout
    seconds = timed()
    update_info = learners.call_all("weight_update_info", timeout_s=timeout_s)[0]
    updates = rollout.submit_all("update_weights", update_info, policy_version=run.step)
    results = gather(updates | learners.submit_all("publish"), phase="weight sync", timeout_s=timeout_s)
    num_bytes = results[len(rollout)]
    learners.call_all("release_weights", timeout_s=timeout_s)
    elapsed = seconds()
    return {"time/sync_s": elapsed, "sync/bytes": num_bytes, "sync/gb_per_s": num_bytes / elapsed / 1e9}


def calibrate_rewards(run: Run) -> None:
    """Let stateful rewards see the untrained policy's held-out responses, so that the first step is on their scale."""
    if not (run.held_out and run.config.reward.has_state):
        return
    run.tracker.set_phase("calibrating rewards")
    _observe_rewards(run, True)
    # A node above another stateful one learns its scale in a pass of its own, when the lower one has learnt its.
    for _ in range(MAX_CALIBRATION_PASSES):
        collect(
            run.config, run.workers, run.held_out, num_responses=1, seed_key=(_EVAL_SEED,), should_stop=run.should_stop
        )
        commit_reward_state(run)
        if not run.workers.reward.call_all("needs_commit", timeout_s=run.config.cluster.step_timeout_s)[0]:
            return
    raise ValueError(
        f"the {len(run.held_out)} held-out prompts gave no valid score to a reward that calibrates itself on them "
        "(calibrate with source: reference, whiten, adaptive): hold out prompts of every kind that the graph routes, "
        "or see why the scores fail (raylhf score)"
    )


def commit_reward_state(run: Run) -> None:
    """Fold what all reward workers have seen since the last commit into the statistics that they share."""
    if run.config.reward.has_state:
        timeout_s, rewards = run.config.cluster.step_timeout_s, run.workers.reward
        rewards.call_all(
            "commit", merge_pending(rewards.call_all("take_pending", timeout_s=timeout_s)), timeout_s=timeout_s
        )


def _observe_rewards(run: Run, is_observing: bool) -> None:
    """Whether what the reward workers score from now on counts in their statistics: training does, evaluation not."""
    if run.config.reward.has_state:
        run.workers.reward.call_all("set_observing", is_observing, timeout_s=run.config.cluster.step_timeout_s)


def evaluate_now(run: Run) -> None:
    """Evaluate the present policy on the held-out prompts, always with the same seeds."""
    if not run.held_out:
        return
    run.tracker.set_phase("evaluation")
    _observe_rewards(run, False)
    seconds = timed()
    result: Evaluation = evaluate(
        run.config, run.workers, run.held_out, seed_key=(_EVAL_SEED,), should_stop=run.should_stop
    )
    run.evaluations.append({"step": run.step, "metrics": result.metrics, "samples": result.samples})
    run.tracker.log(run.step, {**result.metrics, "time/eval_s": seconds()})
    run.tracker.log_samples(run.step, result.samples, name="held_out")


def save(run: Run) -> None:
    """Write a checkpoint of everything that the rest of the run depends on."""
    run.tracker.set_phase("checkpoint")
    seconds = timed()
    folder = begin_checkpoint(run.folder, run.step)
    run.workers.learner.call_all("save", str(folder), timeout_s=run.config.cluster.step_timeout_s)
    state = {
        "step": run.step,
        "kl": run.kl,
        "order": run.order.state(),
        "reward": run.workers.reward.call_all("state_dict", timeout_s=run.config.cluster.step_timeout_s)[0],
        "evaluations": run.evaluations,
        "settings": run.fingerprint,
    }
    commit_checkpoint(folder, step=run.step, state=state, keep=run.config.checkpoint.keep)
    run.saved_step = run.step
    run.tracker.log(run.step, {"time/save_s": seconds()})
