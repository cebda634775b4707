"""One PPO step on one rank: experience, credit, then epochs of minibatches under one global denominator each.

Every loop that contains a collective runs equally often on every rank: rows are equal in number by construction, and
whatever decides about skipping or stopping has been reduced over ranks first.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raylhf.algos.kl import kl_loss
from raylhf.algos.masking import lengths_to_mask, masked_sum
from raylhf.algos.ppo import (
    aggregation_count,
    aggregation_weights,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)
from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.learner.credit import Experience
from raylhf.learner.engine import optimizer_step, restart_adam
from raylhf.learner.metrics import collect_minibatch, update_metrics
from raylhf.learner.microbatch import MicroBatch, make_micro_batch, pad_rows, plan_micro_batches
from raylhf.learner.models import LearnerModels
from raylhf.learner.totals import Totals, all_reduce_sum

FIRST_LOG_RATIO_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}
"""Mean |log-ratio| before any update. Policy and old policy are one function then, up to the rounding that another
padding brings; more than that means dropout or a wrong kernel."""


@dataclass(frozen=True)
class StepsTaken:
    """Optimizer steps so far."""

    policy: int = 0
    critic: int = 0


@dataclass(frozen=True)
class ScoredBatch:
    """One rank's rollout batch, ready to train on."""

    rollouts: Rollouts
    x: Experience
    kl_coef: float
    trains_policy: bool
    """False while the critic warms up alone."""


class PPOUpdate:
    """The policy objective of a run, without state of its own beyond the number of optimizer steps taken."""

    def __init__(self, config: RunConfig, models: LearnerModels, *, rank: int, device: torch.device) -> None:
        self._config = config
        self._objective = config.objective
        self._models = models
        self._rank = rank
        self._device = device

    # --- experience -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def experience(self, rollouts: Rollouts, rewards: RewardOutput, group_ids: Sequence[int]) -> Experience:
        """Old, reference and rollout log-probabilities and values of this rank's rows, and which of them count."""
        width = max(len(ids) for ids in rollouts.response_ids)
        columns = self._forward_all(rollouts, width)
        # The placeholder of an empty response must not count; the reward marks such rows invalid.
        lengths = torch.from_numpy(rollouts.response_lengths).to(self._device)
        valid = torch.from_numpy(rewards.valid).to(self._device)
        dense = rewards.token_scores
        return Experience(
            response_mask=lengths_to_mask(lengths, width) & valid[:, None],
            rollout_logprobs=pad_rows(rollouts.rollout_logprobs, width, self._device),
            old_logprobs=columns["old"],
            ref_logprobs=columns["ref"],
            values=columns.get("values"),
            end_values=columns.get("end_values"),
            scores=torch.from_numpy(np.where(rewards.valid, rewards.scores, 0.0)).float().to(self._device),
            valid=valid,
            group_ids=torch.tensor(group_ids, device=self._device),
            is_truncated=torch.from_numpy(rollouts.is_truncated).to(self._device),
            token_scores=None if dense is None else pad_rows(dense, width, self._device),
        )

    def _forward_all(self, rollouts: Rollouts, width: int) -> dict[str, Tensor]:
        """Columns [R, width] over all rows, micro-batch by micro-batch; `end_values` is [R]."""
        columns: dict[str, Tensor] = {}
        if self._objective.bootstrap_truncated:
            columns["end_values"] = torch.zeros(len(rollouts), device=self._device)
        rows = range(len(rollouts))
        size = self._config.learner.micro_batch_size
        for part in plan_micro_batches(rollouts.response_lengths.tolist(), rows, size):
            batch = make_micro_batch(rollouts, part, self._device)
            logprobs, _, values = self._models.policy_forward(batch, rollouts.temperature)
            flat = {"old": logprobs, "ref": self._models.reference_logprobs(batch, rollouts.temperature)}
            if self._models.critic is not None:
                values = self._models.critic_forward(batch)
            if values is not None:
                flat["values"] = values
            for name, column in flat.items():
                table = columns.setdefault(name, torch.zeros(len(rollouts), width, device=self._device))
                table[batch.source_rows] = batch.scatter(column.float(), width)
            if self._objective.bootstrap_truncated:
                columns["end_values"][batch.source_rows] = self._models.end_values(batch).float()
        return columns

    # --- epochs -----------------------------------------------------------------------------------------------------

    def train(
        self, rollouts: Rollouts, x: Experience, *, step: int, kl_coef: float, taken: StepsTaken
    ) -> tuple[dict[str, float], StepsTaken]:
        """Run the epochs; returns metrics and the new number of optimizer steps."""
        totals = Totals(self._device)
        started = time.perf_counter()
        trains_policy = not (self._config.has_critic and step < self._objective.critic.warmup_steps)
        batch = ScoredBatch(rollouts, x, kl_coef=kl_coef, trains_policy=trains_policy)
        epochs_done = 0
        for epoch in range(self._objective.num_epochs):
            approx_kl = approx_kl_tokens = 0.0
            for rows in self._minibatches(len(rollouts), step, epoch):
                counts = self._global_counts(x, rows)
                if counts["tokens"] == 0:  # nothing valid anywhere: equal on every rank
                    continue
                reduced = self._minibatch(batch, rows, counts, taken, scale=self._lr_scale(step))
                if trains_policy and taken.policy == 0:
                    self._check_first_ratio(reduced["log_ratio"] / reduced["tokens"])
                taken = StepsTaken(policy=taken.policy + trains_policy, critic=taken.critic + 1)
                approx_kl += reduced.get("approx_kl", 0.0)
                approx_kl_tokens += counts["tokens"]
                collect_minibatch(totals, reduced)
            epochs_done += 1
            limit = self._objective.approx_kl_limit
            if limit is not None and approx_kl > 1.5 * limit * max(approx_kl_tokens, 1):
                break
        metrics = update_metrics(totals)
        metrics["policy/epochs_done"] = epochs_done
        metrics["learn/update_s"] = time.perf_counter() - started
        return metrics, taken

    def _lr_scale(self, step: int) -> float:
        return 1 - step / self._config.num_steps if self._config.learner.lr_schedule == "linear" else 1.0

    def _minibatches(self, num_rows: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's rows in a new order, cut into the epoch's minibatches."""
        generator = np.random.default_rng((self._config.seed, step, epoch, self._rank))
        order = generator.permutation(num_rows)
        return [part.tolist() for part in np.array_split(order, self._objective.num_minibatches)]

    def _global_counts(self, x: Experience, rows: Sequence[int]) -> dict[str, float]:
        """The step's denominators, summed over ranks before any loss is computed."""
        mask = x.response_mask[list(rows)]
        local = torch.stack([aggregation_count(mask, mode=self._objective.aggregation), mask.sum()]).double()
        loss, tokens = all_reduce_sum(local).tolist()
        return {"loss": loss, "tokens": tokens}

    def _minibatch(
        self, batch: ScoredBatch, rows: list[int], counts: dict[str, float], taken: StepsTaken, *, scale: float
    ) -> dict[str, float]:
        """One optimizer step of the policy (unless the critic warms up alone) and one of the critic; global numbers."""
        learner, critic = self._config.learner, self._objective.critic
        plan = plan_micro_batches(batch.rollouts.response_lengths.tolist(), rows, learner.micro_batch_size)
        parts = [make_micro_batch(batch.rollouts, part, self._device) for part in plan]
        totals = Totals(self._device)
        totals.add(tokens=batch.x.response_mask[rows].sum())
        has_shared_head = self._config.has_critic and critic.trunk == "shared"
        if batch.trains_policy or has_shared_head:
            warm = min(1.0, (taken.policy + 1) / max(learner.lr_warmup_steps, 1))
            lrs = [learner.lr * warm * scale if batch.trains_policy else 0.0]
            lrs += [critic.lr * scale] if has_shared_head else []
            if has_shared_head and batch.trains_policy and taken.policy == 0 and taken.critic > 0:
                restart_adam(self._models.policy, group=0)
            losses = [partial(self._policy_loss, part, batch=batch, counts=counts, totals=totals) for part in parts]
            totals.raise_to(grad_norm=optimizer_step(self._models.policy, losses, lrs), lr=lrs[0])
        if self._models.critic is not None:
            losses = [partial(self._critic_loss, part, batch=batch, counts=counts, totals=totals) for part in parts]
            totals.raise_to(critic_grad_norm=optimizer_step(self._models.critic, losses, [critic.lr * scale]))
        if self._config.has_critic:
            totals.raise_to(critic_lr=critic.lr * scale)
        return totals.reduced()

    def _policy_loss(self, part: MicroBatch, *, batch: ScoredBatch, counts: dict[str, float], totals: Totals) -> Tensor:
        """The policy's loss on one micro-batch, with the value loss of a shared trunk."""
        x, rows = batch.x, part.source_rows
        flat_logprobs, flat_entropies, flat_values = self._models.policy_forward(part, batch.rollouts.temperature)
        width = x.response_mask.shape[1]
        loss = torch.zeros((), device=self._device)
        if flat_values is not None:
            values = part.scatter(flat_values, width)
            loss = self._objective.critic.loss_coef * self._value_loss(values, part, x, counts, totals)
        if not batch.trains_policy:
            return loss
        logprobs, entropies = part.scatter(flat_logprobs, width), part.scatter(flat_entropies, width)
        totals.add(
            entropy=masked_sum(entropies.detach(), x.response_mask[rows]),
            log_ratio=masked_sum((logprobs.detach() - x.old_logprobs[rows]).abs(), x.response_mask[rows]),
        )
        policy = self._surrogate(logprobs, entropies, rows, batch, counts, totals)
        totals.add(loss=policy)
        return loss + policy

    def _surrogate(
        self,
        logprobs: Tensor,
        entropies: Tensor,
        rows: Tensor,
        batch: ScoredBatch,
        counts: dict[str, float],
        totals: Totals,
    ) -> Tensor:
        """The clipped surrogate, plus the KL penalty if it sits in the loss, minus the entropy bonus."""
        objective, rollout, x = self._objective, self._config.rollout, batch.x
        assert x.advantages is not None
        mask, old = x.response_mask[rows], x.old_logprobs[rows]
        limit = rollout.sampling.max_response_tokens
        weights = aggregation_weights(mask, mode=objective.aggregation, max_response_length=limit)
        importance = None
        if (cap := rollout.importance_cap) is not None:
            importance, _ = truncated_importance_weights(old, x.rollout_logprobs[rows], mask, cap=cap)
        loss, sums = policy_loss(
            logprobs,
            old,
            x.advantages[rows],
            mask,
            clip_eps_low=objective.clip_eps,
            clip_eps_high=objective.clip_eps_high or objective.clip_eps,
            denominator=counts["loss"],
            dual_clip=objective.dual_clip,
            importance_weights=importance,
            token_weights=weights,
        )
        totals.raise_to(ratio_max=sums.pop("ratio_max"))
        totals.add(**sums)
        if objective.kl.placement == "loss":
            reference = x.ref_logprobs[rows]
            penalty, _ = kl_loss(
                logprobs, reference, mask, denominator=counts["loss"], old_logprobs=old, token_weights=weights
            )
            loss = loss + batch.kl_coef * penalty
        if objective.entropy_coef > 0:
            loss = loss - objective.entropy_coef * masked_sum(entropies * weights, mask) / counts["loss"]
        return loss

    def _critic_loss(self, part: MicroBatch, *, batch: ScoredBatch, counts: dict[str, float], totals: Totals) -> Tensor:
        values = part.scatter(self._models.critic_forward(part), batch.x.response_mask.shape[1])
        return self._value_loss(values, part, batch.x, counts, totals)

    def _value_loss(
        self, values: Tensor, part: MicroBatch, x: Experience, counts: dict[str, float], totals: Totals
    ) -> Tensor:
        assert x.values is not None and x.returns is not None
        rows = part.source_rows
        loss, sums = value_loss(
            values,
            x.values[rows],
            x.returns[rows],
            x.response_mask[rows],
            value_clip_eps=self._objective.critic.value_clip_eps,
            denominator=counts["tokens"],
        )
        totals.add(critic_loss=loss, critic_clip_frac=sums["clip_frac"])
        return loss

    def _check_first_ratio(self, error: float) -> None:
        limit = FIRST_LOG_RATIO_LIMIT[self._config.model.dtype]
        if not error <= limit:
            raise RuntimeError(
                f"before any update, policy and old policy differ by {error:.2g} nats a token (limit {limit:g}): "
                "dropout is on or a kernel is not deterministic, and PPO's ratio would be wrong from the start"
            )
