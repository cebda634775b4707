"""A policy run: Ray, the three roles, the loop, the export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylhf.cluster.session import ray_session, run_on_cluster
from raylhf.config import RunConfig
from raylhf.driver.fingerprint import fixed_settings, prompts_digest
from raylhf.driver.job import ENVIRONMENT, Checkpoint, RunContext
from raylhf.driver.ppo import Run, train_ppo
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

    def run(self, context: RunContext, checkpoint: Checkpoint | None) -> str:
        """Start Ray and the workers, train, export; returns how the training ended."""
        config, timeout_s = self._config, self._config.cluster.start_timeout_s
        run = Run(config=config, **vars(context))
        with ray_session(config.cluster, env=ENVIRONMENT):
            context.tracker.set_phase("preparing the model")
            everything = [*self._prompts, *self._held_out]
            prepared = run_on_cluster(prepare, config, everything, timeout_s=timeout_s, should_stop=context.should_stop)
            lengths, longest = prepared.prompt_lengths, config.data.max_prompt_tokens
            prompts, run.dropped_overlong = drop_overlong(self._prompts, lengths[: len(self._prompts)], longest)
            if self._held_out:
                run.held_out, dropped = drop_overlong(self._held_out, lengths[-len(self._held_out) :], longest)
                run.dropped_overlong += dropped
            run.order = PromptOrder(prompts, seed=config.seed, shuffle=config.data.shuffle)
            context.tracker.set_phase("starting workers")
            with running_workers(
                config, prepared.model, prepared.second, should_stop=context.should_stop
            ) as run.workers:
                if checkpoint is not None:
                    _restore(run, *checkpoint)
                status = train_ppo(run)
                if config.checkpoint.export and status != "stopped":
                    context.tracker.set_phase("export")
                    exported = str(context.folder / "export")
                    run.workers.learner.call_all("export", exported, timeout_s=config.cluster.step_timeout_s)
                return status

    def summary(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The first and last held-out rewards."""
        scored = [e["metrics"] for e in evaluations if e["metrics"]]
        if not scored:
            return {}
        return {"eval/score_first": scored[0]["eval/score_mean"], "eval/score_last": scored[-1]["eval/score_mean"]}

    def report(self, folder: Path, status: str, evaluations: list[dict[str, Any]]) -> None:
        """Print the first against the last evaluation."""
        print_report(self._config, folder, status, evaluations)


def _restore(run: Run, folder: Path, state: dict[str, Any]) -> None:
    """Continue from a checkpoint."""
    run.tracker.set_phase(f"resuming from {folder.name}")
    timeout_s = run.config.cluster.step_timeout_s
    run.workers.learner.call_all("load", str(folder), timeout_s=timeout_s)
    run.workers.reward.call_all("load_state_dict", state["reward"], timeout_s=timeout_s)
    run.order.restore(state["order"])
    run.step, run.kl = state["step"], state["kl"]
    run.evaluations.extend(state["evaluations"])
