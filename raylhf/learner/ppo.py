"""One PPO step on one rank: credit, then epochs of minibatches under one global denominator each.

Every loop that contains a collective runs equally often on every rank: rows are equal in number by construction, and
whatever decides about skipping or stopping has been reduced over ranks first.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raylhf.algos.kl import AdaptiveKL, FixedKL, KLController, kl_loss
from raylhf.algos.masking import masked_sum
from raylhf.algos.ppo import (
    aggregation_count,
    aggregation_weights,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)
from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.config.objective import AdaptiveKLControl, KLConfig, PPOConfig
from raylhf.learner.credit import assign_credit
from raylhf.learner.engine import optimizer_step, restart_adam
from raylhf.learner.experience import Experience
from raylhf.learner.metrics import collect_minibatch, update_metrics
from raylhf.learner.microbatch import MicroBatch, cut_further, make_micro_batch, plan_micro_batches, sizes_of
from raylhf.learner.models import LearnerModels
from raylhf.learner.schedule import lr_decay, lr_scale, shuffled_minibatches
from raylhf.learner.totals import Totals, all_reduce_sum, most_of_ranks


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


FIRST_LOG_RATIO_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}
"""Mean |log-ratio| before any update. Policy and old policy are one function then, up to the rounding that another
padding brings; more than that means dropout or a wrong kernel."""


class PPOObjective:
    """PPO, and the group-baseline methods that share its surrogate."""

    def __init__(
        self, objective: PPOConfig, config: RunConfig, models: LearnerModels, *, rank: int, device: torch.device
    ) -> None:
        self._objective = objective
        self._config = config
        self._models = models
        self._rank = rank
        self._device = device
        self._kl = kl_controller(objective.kl)
        self._taken = StepsTaken()

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty in this step."""
        return self._kl.coef

    @property
    def needs_end_values(self) -> bool:
        """Whether the critic's value after the last token is wanted."""
        return self._objective.bootstrap_truncated

    @property
    def learns_once(self) -> bool:
        """Whether the only forward pass that needs old log-probabilities is that of the batch's only optimizer step,
        which finds them itself."""
        objective = self._objective
        is_one_step = objective.num_epochs == objective.num_minibatches == 1
        return is_one_step and self._config.critic is None and objective.kl.placement == "loss"

    def update(self, rollouts: Rollouts, rewards: RewardOutput, x: Experience, *, step: int) -> dict[str, float]:
        """Credit and epochs."""
        x, metrics = assign_credit(x, self._objective, kl_coef=self.kl_coef, all_reduce=all_reduce_sum)
        trained, self._taken = self.train(rollouts, x, step=step, kl_coef=self.kl_coef, taken=self._taken)
        return metrics | trained

    def observe_kl(self, kl_per_sequence: float, *, num_sequences: int) -> None:
        """The KL controller's move, by what the global batch was before the update."""
        if num_sequences and self._taken.policy:  # while the critic warms up alone, there is no KL to control
            self._kl = self._kl.updated(kl_per_sequence=kl_per_sequence, num_sequences=num_sequences)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer."""
        return {"taken": asdict(self._taken), "kl": self._kl.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._taken, self._kl = StepsTaken(**state["taken"]), self._kl.with_state(state["kl"])

    # --- epochs -----------------------------------------------------------------------------------------------------

    def train(
        self, rollouts: Rollouts, x: Experience, *, step: int, kl_coef: float, taken: StepsTaken
    ) -> tuple[dict[str, float], StepsTaken]:
        """Run the epochs; returns metrics and the new number of optimizer steps."""
        totals = Totals(self._device)
        started = time.perf_counter()
        trains_policy = not (self._config.critic is not None and step < self._objective.critic.warmup_steps)
        batch = ScoredBatch(rollouts, x, kl_coef=kl_coef, trains_policy=trains_policy)
        epochs_done = 0
        for epoch in range(self._objective.num_epochs):
            approx_kl = approx_kl_tokens = 0.0
            for rows in self._minibatches(len(rollouts), step, epoch):
                counts = self._global_counts(x, rows)
                if counts["tokens"] == 0:  # nothing valid anywhere: equal on every rank
                    continue
                reduced = self._minibatch(batch, rows, counts, taken, share_done=step / self._config.num_steps)
                if trains_policy and taken.policy == 0 and not self.learns_once:
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

    def _minibatches(self, num_rows: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's rows."""
        seed = (self._config.seed, step, epoch, self._rank)
        return shuffled_minibatches(num_rows, self._objective.num_minibatches, seed=seed)

    def _global_counts(self, x: Experience, rows: Sequence[int]) -> dict[str, float]:
        """The step's denominators, summed over ranks before any loss is computed."""
        mask = x.response_mask[list(rows)]
        local = torch.stack([aggregation_count(mask, mode=self._objective.aggregation), mask.sum()]).double()
        loss, tokens = all_reduce_sum(local).tolist()
        return {"loss": loss, "tokens": tokens}

    def _minibatch(
        self, batch: ScoredBatch, rows: list[int], counts: dict[str, float], taken: StepsTaken, *, share_done: float
    ) -> dict[str, float]:
        """One optimizer step of the policy (unless the critic warms up alone) and one of the critic; global numbers."""
        learner, critic = self._config.learner, self._objective.critic
        critic_lr = critic.lr * lr_decay(learner, share_done)
        parts = self._micro_batches(batch.rollouts, rows)
        totals = Totals(self._device)
        totals.add(tokens=batch.x.response_mask[rows].sum())
        has_shared_head = self._config.critic is not None and critic.trunk == "shared"
        if batch.trains_policy or has_shared_head:
            scale = lr_scale(learner, steps_taken=taken.policy, share_done=share_done)
            lrs = [learner.lr * scale if batch.trains_policy else 0.0]
            lrs += [critic_lr] if has_shared_head else []
            if has_shared_head and batch.trains_policy and taken.policy == 0 and taken.critic > 0:
                restart_adam(self._models.policy, group=0)
            losses = [partial(self._policy_loss, part, batch=batch, counts=counts, totals=totals) for part in parts]
            totals.raise_to(grad_norm=optimizer_step(self._models.policy, losses, lrs), lr=lrs[0])
        if self._models.critic is not None:
            losses = [partial(self._critic_loss, part, batch=batch, counts=counts, totals=totals) for part in parts]
            totals.raise_to(critic_grad_norm=optimizer_step(self._models.critic, losses, [critic_lr]))
        if self._config.critic is not None:
            totals.raise_to(critic_lr=critic_lr)
        return totals.reduced()

    def _micro_batches(self, rollouts: Rollouts, rows: Sequence[int]) -> list[MicroBatch]:
        """As many as on every other rank (a collective): each rank has equally many rows."""
        layout = self._models.layout
        plan = plan_micro_batches(sizes_of(rollouts), rows, layout)
        plan = cut_further(plan, most_of_ranks(len(plan), self._device))
        return [make_micro_batch(rollouts, part, self._device, layout) for part in plan]

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
        if self.learns_once:
            x.old_logprobs[rows] = logprobs.detach()
        totals.add(entropy=masked_sum(entropies.detach(), x.response_mask[rows]))
        if not self.learns_once:  # else there is nothing to compare
            gaps = (logprobs.detach() - x.old_logprobs[rows]).abs()
            totals.add(log_ratio=masked_sum(gaps, x.response_mask[rows]))
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


def kl_controller(kl: KLConfig) -> KLController:
    """The controller that the settings ask for."""
    if isinstance(kl.control, AdaptiveKLControl):
        return AdaptiveKL(coef=kl.coef, **kl.control.model_dump(exclude={"kind"}))
    return FixedKL(coef=kl.coef)
