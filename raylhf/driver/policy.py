"""A policy run: Ray, the three roles, the loop, the export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylhf.cluster.session import await_nodes, ray_session, run_on_cluster
from raylhf.config import RunConfig
from raylhf.driver.batches import BatchQueue
from raylhf.driver.crash import LOG_FOLDER, CrashReporter, Moment
from raylhf.driver.exports import exporting, live_values
from raylhf.driver.fingerprint import fixed_settings, prompts_digest
from raylhf.driver.job import Checkpoint, RunContext, environment_of
from raylhf.driver.ledger import Ledger
from raylhf.driver.ppo import Run, load_learners, restore_driver, state_of, train_ppo
from raylhf.driver.report import print_report
from raylhf.driver.roles import prepare
from raylhf.driver.workers import running_workers
from raylhf.text.prompts import PromptOrder, drop_overlong, load_prompts, split_held_out


class PolicyJob:
    """Reads the prompts; trains a policy on them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        everything = load_prompts(config.data)
        self.fingerprint = fixed_settings(config, {"the prompts of data.path": prompts_digest(everything)})
        self.num_steps = config.num_steps
        self._prompts, self._held_out = split_held_out(everything, config.data.held_out, config.seed)
        self._run: Run | None = None

    def run(self, context: RunContext, checkpoint: Checkpoint | None) -> str:
        """Start Ray and the workers, train, export; returns how the training ended."""
        config, timeout_s = self._config, self._config.cluster.start_timeout_s
        run = self._run = Run(config=config, **vars(context))
        port = config.tracking.prometheus_port
        context.tracker.set_phase("starting Ray")
        with (
            ray_session(config.cluster, env=environment_of(config), prometheus_port=port),
            exporting(config.name, context.tracker) as gauges,
        ):
            context.tracker.set_phase("waiting for the nodes")
            await_nodes(config.cluster, should_stop=context.should_stop)
            context.tracker.set_phase("preparing the model")
            everything = [*self._prompts, *self._held_out]
            prepared = run_on_cluster(prepare, config, everything, timeout_s=timeout_s, should_stop=context.should_stop)
            lengths, longest = prepared.prompt_lengths, config.data.max_prompt_tokens
            prompts, run.dropped_overlong = drop_overlong(self._prompts, lengths[: len(self._prompts)], longest)
            if self._held_out:
                run.held_out, dropped = drop_overlong(self._held_out, lengths[-len(self._held_out) :], longest)
                run.dropped_overlong += dropped
            run.order = PromptOrder(prompts, seed=config.seed, shuffle=config.data.shuffle)
            run.ledger = Ledger(context.folder)
            run.crashes = CrashReporter(
                context.folder,
                context.folder / LOG_FOLDER,
                lambda: Moment(context.tracker.phase, run.step, self.rows_under_way()),
            )
            if checkpoint is None and run.dropped_overlong:
                kept = {prompt.index for prompt in [*prompts, *run.held_out]}
                rows = [prompt.index for prompt in everything if prompt.index not in kept]
                run.ledger.exclude(rows, f"longer than data.max_prompt_tokens={longest}")
            context.tracker.set_phase("starting workers")
            with running_workers(
                config,
                prepared.model,
                prepared.second,
                folder=context.folder,
                should_stop=context.should_stop,
                on_loss=run.crashes.worker_lost,
            ) as run.workers:
                run.batches = BatchQueue(run.workers, run.order, run.ledger, context.should_stop)
                gauges.look = lambda: live_values(run.workers, run.batches)
                run.beginning = state_of(run)
                if checkpoint is not None:
                    context.tracker.set_phase(f"resuming from {checkpoint[0].name}")
                    load_learners(run, checkpoint[0])
                    restore_driver(run, checkpoint[1])
                status = train_ppo(run)
                if config.checkpoint.export and status != "stopped":
                    context.tracker.set_phase("export")
                    exported = str(context.folder / "export")
                    run.workers.learner.call_all("export", exported, timeout_s=config.cluster.step_timeout_s)
                return status

    def rows_under_way(self) -> list[int]:
        """Rows of the data that the batch under way is made of."""
        return [] if self._run is None else [prompt.index for prompt in self._run.sampling]

    def summary(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The first and last held-out rewards."""
        scored = [e["metrics"] for e in evaluations if e["metrics"]]
        if not scored:
            return {}
        return {"eval/score_first": scored[0]["eval/score_mean"], "eval/score_last": scored[-1]["eval/score_mean"]}

    def report(self, folder: Path, status: str, evaluations: list[dict[str, Any]]) -> None:
        """Print the first against the last evaluation."""
        print_report(self._config, folder, status, evaluations)
