"""A learner rank as a plain class; the cluster makes it an actor."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylhf.algos.kl import AdaptiveKL, FixedKL, KLController
from raylhf.algos.masking import masked_sum
from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.config.objective import AdaptiveKLControl
from raylhf.interfaces import WeightSender
from raylhf.learner.checkpoint import load_learner, save_learner
from raylhf.learner.credit import assign_credit
from raylhf.learner.engine import join_group, open_store, peak_memory_gib
from raylhf.learner.metrics import experience_metrics
from raylhf.learner.microbatch import make_micro_batch, plan_micro_batches, without_empty
from raylhf.learner.models import LearnerModels, build_models
from raylhf.learner.ppo import PPOUpdate, StepsTaken
from raylhf.learner.totals import Totals, all_reduce_sum
from raylhf.learner.weight_source import PolicyWeights
from raylhf.models.load import load_tokenizer, write_model_folder

SenderFactory = Callable[..., WeightSender]


class LearnerWorker:
    """One data-parallel rank. Every public method after `start` is collective: call it on all ranks."""

    def __init__(self, config: RunConfig, folder: str, critic_folder: str, *, rank: int) -> None:
        self._config = config
        self._folder = folder
        self._critic_folder = critic_folder
        self._rank = rank
        self._device = torch.device("cuda" if config.learner.num_gpus > 0 else "cpu")
        self._store: dist.TCPStore | None = None
        self._kl = kl_controller(config)
        self._step = 0
        self._taken = StepsTaken()
        self._models: LearnerModels
        self._update: PPOUpdate
        self._weights: PolicyWeights
        self._sender: WeightSender

    # --- life -------------------------------------------------------------------------------------------------------

    def open_rendezvous(self) -> int:
        """On rank 0: host the learners' rendezvous and return its port."""
        self._store = open_store(timeout_s=self._config.cluster.start_timeout_s)
        return self._store.port

    def start(self, host: str, port: int) -> None:
        """Join the other ranks, load the models, build the engines."""
        learner = self._config.learner
        torch.set_num_threads(learner.threads)
        torch.manual_seed(self._config.seed)
        join_group(
            self._store,
            host=host,
            port=port,
            rank=self._rank,
            world_size=learner.num_ranks,
            use_gpu=self._device.type == "cuda",
            timeout_s=max(self._config.cluster.start_timeout_s, self._config.cluster.step_timeout_s),
        )
        self._models = build_models(self._config, self._folder, self._critic_folder, self._device)
        self._update = PPOUpdate(self._config, self._models, rank=self._rank, device=self._device)
        self._weights = PolicyWeights(self._models.policy.module.lm)

    def close(self) -> None:
        """Leave the groups."""
        if hasattr(self, "_sender"):
            self._sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- training ---------------------------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollouts], rewards: Sequence[RewardOutput]) -> dict[str, float]:
        """One PPO step on this rank's whole groups; returns global metrics, equal on every rank.

        Raises:
            RuntimeError: at the first step, if policy and old policy differ before any update.
        """
        started = time.perf_counter()
        rows = without_empty(Rollouts.concatenate(rollouts))
        # A group is one part: a prompt that was drawn twice is two groups.
        group_ids = [group for group, part in enumerate(rollouts) for _ in range(len(part))]
        experience = self._update.experience(rows, RewardOutput.concatenate(rewards), group_ids)
        logprobs_s = time.perf_counter() - started
        kl_coef = self._kl.coef
        metrics = experience_metrics(
            experience, kl_coef=kl_coef, importance_cap=self._config.rollout.importance_cap, device=self._device
        )
        self._require_finite(metrics)
        experience, credited = assign_credit(
            experience, self._config.objective, kl_coef=kl_coef, all_reduce=all_reduce_sum
        )
        metrics |= credited
        trained, self._taken = self._update.train(rows, experience, step=self._step, kl_coef=kl_coef, taken=self._taken)
        metrics |= trained
        self._require_finite(metrics)
        num_sequences = self._config.responses_per_step - int(metrics["data/dropped_responses_count"])
        if num_sequences and self._taken.policy:  # while the critic warms up alone, there is no KL to control
            self._kl = self._kl.updated(kl_per_sequence=metrics["policy/kl_to_ref"], num_sequences=num_sequences)
        self._step += 1
        tokens = self._global(tokens=sum(len(p) for p in rows.prompt_ids) + int(rows.response_lengths.sum()))["tokens"]
        metrics["learn/logprobs_s"] = logprobs_s
        metrics["learn/tokens_per_s"] = tokens / (time.perf_counter() - started)
        metrics["memory/learner_peak_gib"] = peak_memory_gib(self._device)
        return metrics

    @torch.no_grad()
    def measure(self, rollouts: Sequence[Rollouts], *, is_counted: bool = True) -> dict[str, float]:
        """KL to the reference (mean nats per response) and entropy on given responses, without training.

        Ranks may hold different numbers of rows: those with fewer run their first micro-batch again, unweighted. A rank
        for which there are none gets some all the same, with `is_counted=False`. Empty responses do not count.
        """
        rows = Rollouts.concatenate(rollouts)
        counted = torch.from_numpy(rows.response_lengths > 0).to(self._device) & is_counted
        rows = without_empty(rows)
        size = self._config.learner.micro_batch_size
        plan = plan_micro_batches(rows.response_lengths.tolist(), range(len(rows)), size)
        most = torch.tensor(float(len(plan)), dtype=torch.float64, device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        totals = Totals(self._device)
        totals.add(kl=0.0, entropy=0.0, tokens=0.0, sequences=0.0)
        for i in range(int(most.item())):
            batch = make_micro_batch(rows, plan[i] if i < len(plan) else plan[0], self._device)
            logprobs, entropies, _ = self._models.policy_forward(batch, rows.temperature)
            reference = self._models.reference_logprobs(batch, rows.temperature)
            if i < len(plan):
                rows_that_count = counted[batch.source_rows]
                keep = rows_that_count[batch.rows]
                totals.add(
                    kl=masked_sum(logprobs - reference, keep),
                    entropy=masked_sum(entropies, keep),
                    tokens=keep.sum(),
                    sequences=rows_that_count.sum(),
                )
        sums = totals.reduced()
        return {
            "eval/kl_to_ref": sums["kl"] / max(sums["sequences"], 1),
            "eval/entropy": sums["entropy"] / max(sums["tokens"], 1),
        }

    # --- weights ----------------------------------------------------------------------------------------------------

    def prepare_sender(self, open_sender: SenderFactory) -> dict[str, Any]:
        """Make the sending end; rank 0's return value is what rollout workers need to join."""
        self._sender = open_sender(source=self._weights, rank=self._rank)
        return self._sender.prepare()

    def connect_sender(self) -> None:
        """Wait for the rollout workers to join."""
        self._sender.connect()

    def weight_update_info(self) -> dict[str, Any]:
        """What rollout workers need to receive the present weights."""
        return self._sender.update_info()

    def publish(self) -> int:
        """Send the policy's weights; returns their bytes."""
        self._sender.send()
        return self._weights.num_bytes

    def release_weights(self) -> None:
        """Free what the transfer kept, when every rollout worker has the weights."""
        self._sender.release()

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write this rank's share of a checkpoint."""
        state = {"step": self._step, "taken": asdict(self._taken), "kl": self._kl.state_dict()}
        save_learner(Path(folder), self._models, state)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint that equally many ranks saved."""
        state = load_learner(Path(folder), self._models)
        self._step, self._taken = state["step"], StepsTaken(**state["taken"])
        self._kl = self._kl.with_state(state["kl"])

    def export(self, folder: str) -> None:
        """Write the policy, adapters merged, as an ordinary Hugging Face folder (rank 0 writes, all ranks gather)."""
        state = {}
        for name, weight in self._weights:
            if self._rank == 0:
                state[name] = weight.to("cpu", copy=True)
        if self._rank == 0:
            trust = self._config.model.trust_remote_code
            write_model_folder(
                folder, self._models.policy.module.lm, state, load_tokenizer(self._folder, trust_remote_code=trust)
            )
        dist.barrier()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _require_finite(self, metrics: dict[str, float]) -> None:
        """A diverged policy must not be published, saved or trained further."""
        for key in ("policy/kl_to_ref", "policy/loss", "policy/grad_norm", "critic/loss"):
            if not math.isfinite(metrics.get(key, 0.0)):
                raise RuntimeError(
                    f"{key} is {metrics[key]} in step {self._step + 1}: training has diverged. Go back to the last "
                    "checkpoint with a lower learner.lr, or a larger objective.kl.coef"
                )

    def _global(self, **values: float) -> dict[str, float]:
        totals = Totals(self._device)
        totals.add(**values)
        return totals.reduced()


def kl_controller(config: RunConfig) -> KLController:
    """The controller that the objective asks for."""
    kl = config.objective.kl
    if isinstance(kl.control, AdaptiveKLControl):
        return AdaptiveKL(coef=kl.coef, **kl.control.model_dump(exclude={"kind"}))
    return FixedKL(coef=kl.coef)
