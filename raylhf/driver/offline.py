"""A run on stored judgements: learners alone, fed with what every rank reads for itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylhf.cluster.actors import ActorGroup
from raylhf.cluster.session import await_nodes, ray_session, run_on_cluster
from raylhf.config.preference import loss_of
from raylhf.config.run import OfflineRunConfig, RewardModelRunConfig
from raylhf.driver.checkpoints import commit_checkpoint, require_files, writing_checkpoint
from raylhf.driver.exports import exporting
from raylhf.driver.fingerprint import fixed_settings
from raylhf.driver.job import Checkpoint, RunContext, environment_of
from raylhf.driver.report import print_offline_report
from raylhf.driver.roles import prepare_offline
from raylhf.driver.timing import timed
from raylhf.driver.workers import running_offline_learners
from raylhf.text.data_report import leaks
from raylhf.text.judgements import examples_digest, load_split
from raylhf.text.preference_data import usable_parts
from raylhf.tracking.reliability import reliability_plot

_MEASURES = {"reward_model": "rm_eval/loss", "preference": "pref_eval/accuracy", "sft": "pref_eval/nll_mean"}
"""What stands in the summary of a run."""


class OfflineJob:
    """Reads the judgements; trains a reward model or a policy on them."""

    def __init__(self, config: OfflineRunConfig) -> None:
        self._config = config
        is_reward_model = isinstance(config, RewardModelRunConfig)
        self._area = "rm_eval" if is_reward_model else "pref_eval"
        split = load_split(config.data, config.objective.head if is_reward_model else None, seed=config.seed)
        digest = examples_digest([*split.train, *split.held_out])
        self.fingerprint = fixed_settings(config, {"the judgements of data.path": digest})
        train, held_out = split.train, split.held_out
        if not is_reward_model:
            train, held_out = usable_parts(split, loss_of(config.objective))
        self.num_steps = config.total_steps(len(train))
        self._has_held_out = bool(held_out)
        shared_prompts, shared_responses = leaks(train, held_out)
        counts = {"shared_prompts_count": shared_prompts, "shared_responses_count": shared_responses}
        self._counts = {f"{self._area}/{key}": count for key, count in counts.items() if held_out}
        if not is_reward_model:
            self._counts["pref/left_out_prompts_count"] = len(split.train) - len(train)

    def run(self, context: RunContext, checkpoint: Checkpoint | None) -> str:
        """Start Ray and the learners, train, export; returns how the training ended."""
        config, tracker = self._config, context.tracker
        timeout_s = config.cluster.step_timeout_s
        port = config.tracking.prometheus_port
        with (
            ray_session(config.cluster, env=environment_of(config), prometheus_port=port),
            exporting(config.name, tracker),
        ):
            tracker.set_phase("waiting for the nodes")
            await_nodes(config.cluster, should_stop=context.should_stop)
            tracker.set_phase("preparing the model")
            start_s = config.cluster.start_timeout_s
            folders = run_on_cluster(prepare_offline, config, timeout_s=start_s, should_stop=context.should_stop)
            tracker.set_phase("starting learners")
            with running_offline_learners(
                config, folders, folder=context.folder, should_stop=context.should_stop
            ) as learners:
                run = OfflineRun(config, context, learners, self.num_steps, self._has_held_out)
                if checkpoint is not None:
                    run.restore(*checkpoint)
                else:
                    tracker.log(0, self._counts)
                status = run.train()
                if config.checkpoint.export and status == "complete":
                    tracker.set_phase("export")
                    learners.call_all("export", str(context.folder / "export"), timeout_s=timeout_s)
                return status

    def rows_under_way(self) -> list[int]:
        """Not known here: batches follow from seed and step."""
        return []

    def summary(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The held-out loss, or what a policy is measured by, first and last."""
        key = _MEASURES[self._config.objective.kind]
        losses = [evaluation["metrics"].get(key) for evaluation in evaluations]
        found = {f"{key}_first": losses[0], f"{key}_last": losses[-1]} if losses else {}
        return {key: loss for key, loss in found.items() if loss is not None}

    def report(self, folder: Path, status: str, evaluations: list[dict[str, Any]]) -> None:
        """Print the first against the last evaluation."""
        what = "Reward model" if self._area == "rm_eval" else "Trained model"
        print_offline_report(self._config, folder, status, evaluations, what=what)


@dataclass
class OfflineRun:
    """The loop, and where it stands."""

    config: OfflineRunConfig
    context: RunContext
    learners: ActorGroup
    num_steps: int
    has_held_out: bool
    step: int = 0
    """Optimizer steps done."""
    saved_step: int = 0
    """Step of the newest checkpoint."""

    def train(self) -> str:
        """Train until the last step; returns why it ended: `complete` or `stopped`."""
        self.saved_step = self.step
        if not self.context.evaluations:
            self.evaluate()
        status = self._loop()
        if self.saved_step < self.step:
            self.save()
        return status

    def _loop(self) -> str:
        tracker, config = self.context.tracker, self.config
        while self.step < self.num_steps:
            if self.context.should_stop():
                return "stopped"
            tracker.set_phase("learn")
            seconds = timed()
            metrics = self._call("update", self.step)
            self.step += 1
            tracker.log(self.step, {**metrics, "time/step_s": seconds()})
            if self.step == self.num_steps or self.step % (config.evaluation.every_steps or self.num_steps) == 0:
                self.evaluate()
            # After the evaluation, which is thus in the checkpoint and not done again when the run is resumed here.
            if self.step % (config.checkpoint.every_steps or self.num_steps) == 0:
                self.save()
        return "complete"

    def evaluate(self) -> None:
        """Score the held-out judgements; keep numbers and samples, and draw how far probabilities can be trusted."""
        if not self.has_held_out:
            return
        context = self.context
        context.tracker.set_phase("evaluation")
        seconds = timed()
        result = self._call("evaluate")
        context.evaluations.append({"step": self.step, "metrics": result["metrics"], "samples": result["samples"]})
        context.tracker.log(self.step, {**result["metrics"], "time/eval_s": seconds()})
        context.tracker.log_samples(self.step, result["samples"], name="held_out")
        if result.get("reliability"):
            title = f"{self.config.name}, step {self.step}"
            reliability_plot(result["reliability"], context.folder / "reliability.png", title=title)

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        context = self.context
        context.tracker.set_phase("checkpoint")
        seconds = timed()
        with writing_checkpoint(context.folder, self.step) as folder:
            timeout_s = self.config.cluster.step_timeout_s
            require_files(folder, self.learners.call_all("save", str(folder), timeout_s=timeout_s))
            state = {"step": self.step, "evaluations": context.evaluations, "settings": context.fingerprint}
            commit_checkpoint(folder, step=self.step, state=state, keep=self.config.checkpoint.keep)
        self.saved_step = self.step
        context.tracker.log(self.step, {"time/save_s": seconds()})

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.context.tracker.set_phase(f"resuming from {folder.name}")
        self._call("load", str(folder))
        self.step = state["step"]
        self.context.evaluations.extend(state["evaluations"])

    def _call(self, method: str, *args: Any) -> Any:
        """Call every rank; the answer of rank 0."""
        return self.learners.call_all(method, *args, timeout_s=self.config.cluster.step_timeout_s)[0]
