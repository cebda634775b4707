"""One PPO step on one rank: experience, credit, then epochs of minibatches under one global denominator each.

Every loop that contains a collective runs equally often on every rank: rows are equal in number by construction, and
whatever decides about skipping or stopping has been reduced over ranks first.
"""

import math
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raylhf.algos.kl import kl_loss
from raylhf.algos.masking import lengths_to_mask, mask_out, masked_sum
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
from raylhf.learner.engine import optimizer_step
from raylhf.learner.metrics import update_metrics
from raylhf.learner.microbatch import MicroBatch, make_micro_batch, pad_rows, plan_micro_batches
from raylhf.learner.models import LearnerModels
from raylhf.learner.totals import Totals, all_reduce_sum

FIRST_RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Before any update policy and old policy are one function; more than rounding means dropout or a wrong kernel."""


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
            scores=torch.from_numpy(np.where(rewards.valid, rewards.scores, 0.0)).float().to(self._device),
            valid=valid,
            group_ids=torch.tensor(group_ids, device=self._device),
            is_truncated=torch.from_numpy(rollouts.is_truncated).to(self._device),
            token_scores=None if dense is None else pad_rows(dense, width, self._device),
        )

    def _forward_all(self, rollouts: Rollouts, width: int) -> dict[str, Tensor]:
        """Columns [R, width] over all rows, micro-batch by micro-batch."""
        columns: dict[str, Tensor] = {}
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
        return columns

    # --- epochs -----------------------------------------------------------------------------------------------------

    def train(
        self, rollouts: Rollouts, x: Experience, *, step: int, kl_coef: float, optimizer_steps: int
    ) -> tuple[dict[str, float], int]:
        """Run the epochs; returns metrics and the new number of optimizer steps."""
        totals = Totals(self._device)
        started = time.perf_counter()
        epochs_done = 0
        for epoch in range(self._objective.num_epochs):
            approx_kl = approx_kl_tokens = 0.0
            for minibatch, rows in enumerate(self._minibatches(len(rollouts), step, epoch)):
                counts = self._global_counts(x, rows)
                if counts["tokens"] == 0:  # nothing valid anywhere: equal on every rank
                    continue
                is_first = epoch == 0 and minibatch == 0
                part = Totals(self._device)
                self._minibatch(rollouts, x, rows, counts, part, kl_coef, step, optimizer_steps, is_first)
                optimizer_steps += 1
                reduced = part.reduced()
                if is_first:
                    self._check_first_ratio(math.expm1(reduced["first_log_ratio"]), step)
                approx_kl += reduced["approx_kl"]
                approx_kl_tokens += counts["tokens"]
                self._collect(totals, reduced)
            epochs_done += 1
            limit = self._objective.approx_kl_limit
            if limit is not None and approx_kl > 1.5 * limit * max(approx_kl_tokens, 1):
                break
        metrics = update_metrics(totals)
        metrics["policy/epochs_done"] = epochs_done
        metrics["learn/update_s"] = time.perf_counter() - started
        return metrics, optimizer_steps

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
        self,
        rollouts: Rollouts,
        x: Experience,
        rows: list[int],
        counts: dict[str, float],
        totals: Totals,
        kl_coef: float,
        step: int,
        optimizer_steps: int,
        is_first: bool,
    ) -> None:
        """One optimizer step of the policy and one of the critic."""
        plan = plan_micro_batches(rollouts.response_lengths.tolist(), rows, self._config.learner.micro_batch_size)
        batches = [make_micro_batch(rollouts, part, self._device) for part in plan]
        critic, learner = self._objective.critic, self._config.learner
        scale = min(1.0, (optimizer_steps + 1) / max(learner.lr_warmup_steps, 1))
        if learner.lr_schedule == "linear":
            scale *= 1 - step / self._config.num_steps
        totals.add(tokens=masked_sum(torch.ones_like(x.old_logprobs[rows]), x.response_mask[rows]))
        is_critic_only = self._config.has_critic and step < critic.warmup_steps
        has_shared_head = self._config.has_critic and critic.trunk == "shared"
        lrs = [0.0 if is_critic_only else learner.lr * scale]
        if has_shared_head:
            lrs.append(critic.lr * scale)
        loss = partial(
            self._policy_loss, x=x, counts=counts, totals=totals, kl_coef=kl_coef, temperature=rollouts.temperature
        )
        losses = [partial(loss, batch, is_first=is_first, is_critic_only=is_critic_only) for batch in batches]
        norm = optimizer_step(self._models.policy, losses, lrs)
        totals.raise_to(grad_norm=norm, lr=lrs[0])
        if self._models.critic is not None:
            values = [partial(self._critic_loss, batch, x=x, counts=counts, totals=totals) for batch in batches]
            critic_norm = optimizer_step(self._models.critic, values, [critic.lr * scale])
            totals.raise_to(critic_grad_norm=critic_norm)
        if self._config.has_critic:
            totals.raise_to(critic_lr=critic.lr * scale)

    def _policy_loss(
        self,
        batch: MicroBatch,
        *,
        x: Experience,
        counts: dict[str, float],
        totals: Totals,
        kl_coef: float,
        temperature: float,
        is_first: bool,
        is_critic_only: bool,
    ) -> Tensor:
        objective, rows = self._objective, batch.source_rows
        assert x.advantages is not None
        mask, old = x.response_mask[rows], x.old_logprobs[rows]
        flat_logprobs, flat_entropies, flat_values = self._models.policy_forward(batch, temperature)
        logprobs, entropies = (batch.scatter(flat, mask.shape[1]) for flat in (flat_logprobs, flat_entropies))
        weights = aggregation_weights(
            mask, mode=objective.aggregation, max_response_length=self._config.rollout.sampling.max_response_tokens
        )
        importance = None
        if (cap := self._config.rollout.importance_cap) is not None:
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
        if objective.kl.placement == "loss":
            penalty, _ = kl_loss(
                logprobs,
                x.ref_logprobs[rows],
                mask,
                denominator=counts["loss"],
                old_logprobs=old,
                token_weights=weights,
            )
            loss = loss + kl_coef * penalty
        if objective.entropy_coef > 0:
            loss = loss - objective.entropy_coef * masked_sum(entropies * weights, mask) / counts["loss"]
        totals.add(**sums, loss=loss, entropy=masked_sum(entropies.detach(), mask))
        if is_first:
            totals.raise_to(first_log_ratio=mask_out((logprobs.detach() - old).abs(), mask).amax())
        if is_critic_only:
            loss = 0.0 * loss
        if flat_values is None:
            return loss
        values = batch.scatter(flat_values, mask.shape[1])
        return loss + objective.critic.loss_coef * self._value_loss(values, batch, x, counts, totals)

    def _critic_loss(self, batch: MicroBatch, *, x: Experience, counts: dict[str, float], totals: Totals) -> Tensor:
        values = batch.scatter(self._models.critic_forward(batch), x.response_mask.shape[1])
        return self._value_loss(values, batch, x, counts, totals)

    def _value_loss(
        self, values: Tensor, batch: MicroBatch, x: Experience, counts: dict[str, float], totals: Totals
    ) -> Tensor:
        assert x.values is not None and x.returns is not None
        rows = batch.source_rows
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

    def _check_first_ratio(self, error: float, step: int) -> None:
        tolerance = FIRST_RATIO_TOLERANCE[self._config.model.dtype]
        if step == 0 and not error <= tolerance:
            raise RuntimeError(
                f"before any update, policy and old policy differ by a ratio error of {error:.2g} (limit {tolerance}); "
                "dropout is on or a kernel is not deterministic, and PPO's ratio would be wrong from the start"
            )

    @staticmethod
    def _collect(totals: Totals, reduced: dict[str, float]) -> None:
        """Fold one minibatch's global numbers into the step's. They are equal on every rank and not reduced again."""
        maxima = {"ratio_max", "first_log_ratio", "grad_norm", "critic_grad_norm", "lr", "critic_lr"}
        totals.add(**{k: v for k, v in reduced.items() if k not in maxima}, optimizer_steps=1)
        totals.raise_to(**{k: v for k, v in reduced.items() if k in maxima})
