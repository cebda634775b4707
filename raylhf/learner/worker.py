"""A learner rank as a plain class; the cluster makes it an actor."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raylhf.algos.masking import masked_sum
from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.config.preference import OnlineDPOConfig
from raylhf.config.preference_losses import TGDPOLoss
from raylhf.interfaces import WeightSender
from raylhf.learner.checkpoint import files_seen, load_learner, save_learner
from raylhf.learner.engine import Rendezvous, forget_peak_memory, peak_memory_gib
from raylhf.learner.experience import gather_experience
from raylhf.learner.metrics import experience_metrics
from raylhf.learner.microbatch import make_micro_batch, plan_micro_batches, sizes_of, without_empty
from raylhf.learner.models import LearnerModels, build_models
from raylhf.learner.online_dpo import OnlineDPOObjective
from raylhf.learner.ppo import PPOObjective
from raylhf.learner.totals import Totals, most_of_ranks
from raylhf.learner.weight_source import AdapterWeights, PolicyWeights, published_weights
from raylhf.models.load import load_tokenizer

SenderFactory = Callable[..., WeightSender]


class LearnerWorker:
    """One data-parallel rank. Every public method after `start` is collective: call it on all ranks."""

    def __init__(self, config: RunConfig, folder: str, second_folder: str, *, rank: int) -> None:
        """`second_folder` holds the model that the critic starts from, or a loss's guide."""
        self._config = config
        self._folder = folder
        self._second_folder = second_folder
        self._rank = rank
        self._device = torch.device("cuda" if config.learner.num_gpus > 0 else "cpu")
        self._rendezvous = Rendezvous(config, rank=rank)
        self._step = 0
        self._models: LearnerModels
        self._objective: PPOObjective | OnlineDPOObjective
        self._weights: PolicyWeights
        self._published: PolicyWeights | AdapterWeights
        self._sender: WeightSender

    # --- life -------------------------------------------------------------------------------------------------------

    def open_rendezvous(self) -> int:
        """On rank 0: host the learners' rendezvous and return its port."""
        return self._rendezvous.open()

    def start(self, host: str, port: int) -> float:
        """Join the other ranks, load the models, build the engines; returns the seconds that it took."""
        began = time.perf_counter()
        self._rendezvous.join(host, port)
        config, objective = self._config, self._config.objective
        has_guide = isinstance(objective, OnlineDPOConfig) and isinstance(objective.loss, TGDPOLoss)
        self._models = build_models(
            config,
            self._folder,
            self._device,
            critic=config.critic,
            moves_reference=isinstance(objective, OnlineDPOConfig) and objective.reference.every_steps > 0,
            has_guide=has_guide,
            second_folder=self._second_folder,
            longest=config.max_model_len,
        )
        if isinstance(objective, OnlineDPOConfig):
            self._objective = OnlineDPOObjective(objective, config, self._models, rank=self._rank, device=self._device)
        else:
            self._objective = PPOObjective(objective, config, self._models, rank=self._rank, device=self._device)
        lm = self._models.policy.module.lm
        self._weights = self._published = PolicyWeights(lm)
        if config.weight_transfer == "gloo":  # vLLM's own transports cannot merge
            self._published = published_weights(self._weights, lm, folder=self._folder)
        forget_peak_memory(self._device)
        return time.perf_counter() - began

    def close(self) -> None:
        """Leave the groups."""
        if hasattr(self, "_sender"):
            self._sender.close()
        self._rendezvous.leave()

    # --- training ---------------------------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollouts], rewards: Sequence[RewardOutput]) -> dict[str, float]:
        """One step of the objective on this rank's whole groups; returns global metrics, equal on every rank.

        Raises:
            RuntimeError: training has diverged; or at the first step, policy and old policy differ before any update.
        """
        started = time.perf_counter()
        rows, scored = without_empty(Rollouts.concatenate(rollouts)), RewardOutput.concatenate(rewards)
        # A group is one part: a prompt that was drawn twice is two groups.
        group_ids = [group for group, part in enumerate(rollouts) for _ in range(len(part))]
        experience = gather_experience(
            self._models,
            rows,
            scored,
            group_ids,
            with_old=not self._objective.learns_once,
            with_end_values=self._objective.needs_end_values,
            device=self._device,
        )
        logprobs_s = time.perf_counter() - started
        measure = partial(
            experience_metrics,
            experience,
            kl_coef=self._objective.kl_coef,
            importance_cap=self._config.rollout.importance_cap,
            device=self._device,
        )
        metrics = {} if self._objective.learns_once else measure()
        self._require_finite(metrics)
        metrics |= self._objective.update(rows, scored, experience, step=self._step)
        if self._objective.learns_once:
            metrics |= measure()
        self._require_finite(metrics)
        num_sequences = self._config.responses_per_step - int(metrics["data/dropped_responses_count"])
        self._objective.observe_kl(metrics["policy/kl_to_ref"], num_sequences=num_sequences)
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
        layout = self._models.layout
        plan = plan_micro_batches(sizes_of(rows), range(len(rows)), layout)
        totals = Totals(self._device)
        totals.add(kl=0.0, entropy=0.0, tokens=0.0, sequences=0.0)
        for i in range(most_of_ranks(len(plan), self._device)):
            batch = make_micro_batch(rows, plan[i] if i < len(plan) else plan[0], self._device, layout)
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
        """Make the sending end, anew if there was one; rank 0's return value is what rollout workers need to join."""
        if hasattr(self, "_sender"):
            self._sender.close()
        self._sender = open_sender(source=self._published, rank=self._rank)
        return self._sender.prepare()

    def connect_sender(self) -> None:
        """Wait for the rollout workers to join."""
        self._sender.connect()

    def weight_update_info(self) -> dict[str, Any]:
        """What rollout workers need to receive the present weights."""
        return self._sender.update_info()

    def publish(self) -> int:
        """Send what rollout workers lack of the policy's weights; returns its bytes."""
        self._sender.send()
        return self._published.num_bytes

    def release_weights(self) -> None:
        """Free what the transfer kept, when every rollout worker has the weights."""
        self._sender.release()

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> list[str]:
        """Write this rank's share of a checkpoint; returns the files that it sees there afterwards."""
        state = {"step": self._step, "objective": self._objective.state_dict()}
        save_learner(Path(folder), self._models, state)
        return files_seen(Path(folder))

    def load(self, folder: str) -> None:
        """Continue from a checkpoint, of any number of ranks and ZeRO stage."""
        state = load_learner(Path(folder), self._models)
        self._step = state["step"]
        self._objective.load_state_dict(state["objective"])

    def export(self, folder: str) -> None:
        """Write the policy, adapters merged, as an ordinary Hugging Face folder (rank 0 writes, all ranks gather)."""
        trust = self._config.model.trust_remote_code
        tokenizer = load_tokenizer(self._folder, trust_remote_code=trust)
        self._weights.export(folder, tokenizer, writes=self._rank == 0)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _require_finite(self, metrics: dict[str, float]) -> None:
        """A diverged policy must not be published, saved or trained further."""
        for key in ("policy/kl_to_ref", "policy/loss", "policy/grad_norm", "critic/loss"):
            if not math.isfinite(metrics.get(key, 0.0)):
                raise RuntimeError(
                    f"{key} is {metrics[key]} in step {self._step + 1}: training has diverged. Go back to the last "
                    "checkpoint with a lower learner.lr, or a stronger KL penalty (objective.kl.coef, or a loss's beta)"
                )

    def _global(self, **values: float) -> dict[str, float]:
        totals = Totals(self._device)
        totals.add(**values)
        return totals.reduced()
