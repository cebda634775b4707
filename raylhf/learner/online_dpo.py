"""Online preference optimisation: pairs out of a scored rollout batch, then optimizer steps on them (2402.04792)."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raylhf.algos.pairs import MadePairs, make_pairs
from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.config.preference import OnlineDPOConfig, PairsConfig
from raylhf.config.preference_losses import PlackettLuceDPOLoss
from raylhf.learner.experience import Experience
from raylhf.learner.models import LearnerModels
from raylhf.learner.preference_batch import PreferenceBatch
from raylhf.learner.preference_metrics import declare, preference_metrics
from raylhf.learner.preference_update import Columns, PreferenceUpdate
from raylhf.learner.schedule import lr_scale, shuffled_minibatches
from raylhf.learner.totals import Totals
from raylhf.learner.wrong_steps import first_wrong_step_pairs
from raylhf.text.preference_data import good_by_wins


class OnlineDPOObjective:
    """Any loss of the preference family on fresh pairs."""

    kl_coef = None
    """There is no KL term beside the loss."""
    needs_end_values = False

    def __init__(
        self, objective: OnlineDPOConfig, config: RunConfig, models: LearnerModels, *, rank: int, device: torch.device
    ) -> None:
        self._objective = objective
        self._config = config
        self._models = models
        self._rank = rank
        self._device = device
        self._update = PreferenceUpdate(objective.loss, models, seed=config.seed, device=device)
        self._steps_taken = 0

    @property
    def learns_once(self) -> bool:
        """Whether old log-probabilities are those of the batch's only optimizer step, which finds them itself."""
        objective = self._objective
        is_one_step = objective.num_epochs == objective.num_minibatches == 1
        return is_one_step and not self._update.statistics.needs_policy

    def observe_kl(self, kl_per_sequence: float, *, num_sequences: int) -> None:
        """Nothing here follows the KL."""

    def update(self, rollouts: Rollouts, rewards: RewardOutput, x: Experience, *, step: int) -> dict[str, float]:
        """Pairs, epochs of minibatches, and the reference's move; metrics are equal on every rank."""
        started = time.perf_counter()
        totals = Totals(self._device)
        declare(totals)
        groups = _groups(x.group_ids.tolist())
        vector = None
        if names := self._objective.pairs.parts:
            vector = x.columns(names, setting="objective.pairs.parts").double().cpu().numpy()
        paired = [
            self._pairs(rollouts, rewards, rows, vector, seed=(step, rollouts.prompts[rows[0]].index))
            for rows in groups
        ]
        totals.add(
            made_pairs=sum(len(made.pairs) for made, _ in paired),
            ties=sum(made.num_ties for made, _ in paired),
            unpaired=sum(not made.pairs for made, _ in paired),
        )
        known = {"ref": x.ref_logprobs} | ({} if self.learns_once else {"old": x.old_logprobs})
        norms, lr = [], self._lr(step)
        for epoch in range(self._objective.num_epochs):
            for chosen_groups in self._minibatches(len(groups), step, epoch):
                own = [(groups[g], *paired[g]) for g in chosen_groups]
                batch, rows = self._batch(rollouts, rewards, own)
                columns = self._columns(batch, rows, known, is_first=not norms)
                shared = self._update.prepare(batch, columns, step=self._steps_taken)
                lr = self._lr(step)
                old = torch.zeros_like(columns["ref"]) if self.learns_once else None
                norms.append(self._update.step(batch, columns, shared, totals, lrs=[lr], old=old))
                if old is not None:
                    x.old_logprobs[rows, : batch.width] = old
                self._steps_taken += 1
        reference = self._objective.reference
        if reference.every_steps and (step + 1) % reference.every_steps == 0:
            self._models.move_reference(reference.mix)
        sums = totals.reduced()
        return preference_metrics(sums, area="pref") | {
            "policy/loss": sums["loss"] / len(norms),
            "policy/grad_norm": max(norms),
            "policy/lr": lr,
            "policy/epochs_done": self._objective.num_epochs,
            "pref/pairs_count": sums["made_pairs"],
            "pref/ties_count": sums["ties"],
            "pref/unpaired_prompts_count": sums["unpaired"],
            "learn/update_s": time.perf_counter() - started,
        }

    def _pairs(
        self,
        rollouts: Rollouts,
        rewards: RewardOutput,
        rows: Sequence[int],
        vector: np.ndarray | None,
        *,
        seed: Sequence[int],
    ) -> tuple[MadePairs, np.ndarray]:
        """The pairs of one group and the tokens of each of its responses that count, int64 [K, 2]."""
        settings, index = self._objective.pairs, list(rows)
        texts = [rollouts.response_ids[row].tobytes().hex() for row in rows]  # equal tokens are equal responses
        lengths = np.array([len(rollouts.response_ids[row]) for row in rows])
        valid = rewards.valid[index]
        whole = np.stack([np.zeros_like(lengths), lengths * valid], axis=1)
        if settings.kind == "first_wrong_step":
            dense = rewards.token_scores
            if dense is None:
                raise ValueError("objective.pairs.kind: first_wrong_step needs a process reward, which scores steps")
            return first_wrong_step_pairs([dense[row] for row in rows], texts, rewards.scores[index], valid)
        made = make_pairs(
            settings.kind,
            rewards.scores[index],
            valid,
            vector=None if vector is None else vector[index],
            tie_margin=None if settings.soft_labels else settings.tie_margin,
            seed=int(np.random.SeedSequence((self._config.seed, *seed)).generate_state(1)[0]),
            texts=texts,
        )
        return made, whole

    def _batch(
        self,
        rollouts: Rollouts,
        rewards: RewardOutput,
        paired: Sequence[tuple[Sequence[int], MadePairs, np.ndarray]],
    ) -> tuple[PreferenceBatch, list[int]]:
        """The minibatch of some groups, and which of the rank's rows its rows are."""
        rows = [row for group, _, _ in paired for row in group]
        starts = np.cumsum([0, *(len(group) for group, _, _ in paired)])
        pairs = [(start, pair) for start, (_, made, _) in zip(starts[:-1], paired, strict=True) for pair in made.pairs]
        spans = np.concatenate([span for _, _, span in paired])
        ranks = np.concatenate([_ranks(rewards, group, self._objective.pairs.tie_margin) for group, _, _ in paired])
        batch = PreferenceBatch(
            prompt_ids=[rollouts.prompt_ids[row] for row in rows],
            response_ids=[rollouts.response_ids[row] for row in rows],
            group_starts=starts,
            chosen=np.array([start + pair.chosen for start, pair in pairs], dtype=np.int64),
            rejected=np.array([start + pair.rejected for start, pair in pairs], dtype=np.int64),
            weights=np.array([pair_weight(pair.margin, pair.agreement, self._objective.pairs) for _, pair in pairs]),
            spans=spans,
            ranks=ranks if isinstance(self._objective.loss, PlackettLuceDPOLoss) else np.full(len(rows), np.nan),
            is_good=good_by_wins([(start + pair.chosen, start + pair.rejected) for start, pair in pairs], len(rows)),
            keys=np.zeros(len(pairs), dtype=np.int64),
            smoothing=self._smoothing(np.array([pair.margin for _, pair in pairs])),
            reward_gaps=np.zeros(len(pairs)),
            temperature=rollouts.temperature,
        )
        return batch, rows

    def _smoothing(self, margins: np.ndarray) -> np.ndarray:
        """Probability that a pair's order is the wrong one, [N]; NaN leaves it to the loss."""
        return 1 / (1 + np.exp(margins)) if self._objective.pairs.soft_labels else np.full(len(margins), np.nan)

    def _columns(self, batch: PreferenceBatch, rows: list[int], known: Columns, *, is_first: bool) -> Columns:
        """The experience's columns for the minibatch; the policy's are computed anew once it has moved."""
        columns = {name: table[rows][:, : batch.width] for name, table in known.items() if name == "ref" or is_first}
        return self._update.columns(batch, known=columns)

    def _minibatches(self, num_groups: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's groups."""
        seed = (self._config.seed, step, epoch, self._rank)
        return shuffled_minibatches(num_groups, self._objective.num_minibatches, seed=seed)

    def _lr(self, step: int) -> float:
        learner, share_done = self._config.learner, step / self._config.num_steps
        return learner.lr * lr_scale(learner, steps_taken=self._steps_taken, share_done=share_done)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer."""
        return {"steps_taken": self._steps_taken, "loss": self._update.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._steps_taken = state["steps_taken"]
        self._update.load_state_dict(state["loss"])


def pair_weight(margin: float, agreement: float | None, settings: PairsConfig) -> float:
    """Of one pair in the loss."""
    weight = 1.0 if settings.full_weight_gap is None else min(1.0, margin / settings.full_weight_gap)
    if settings.weight_by_agreement:
        weight *= 0.0 if agreement is None else max(0.0, 2 * agreement - 1)
    return weight


def _ranks(rewards: RewardOutput, rows: Sequence[int], tie_margin: float) -> np.ndarray:
    """Places [K] by score, 1 for the best; scores within `tie_margin` of the next better one share its place.

    Where all share one, there is nothing to compare: NaN, as for a score that is not valid.
    """
    scores = np.where(rewards.valid[list(rows)], rewards.scores[list(rows)], np.nan)
    ranks = np.full(len(scores), np.nan)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if not np.isnan(scores[i])]
    place, last = 0, np.inf
    for i in order:
        if last - scores[i] > tie_margin:
            place += 1
        ranks[i], last = place, scores[i]
    return ranks if place > 1 else np.full(len(scores), np.nan)


def _groups(group_ids: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        groups.setdefault(group, []).append(row)
    return list(groups.values())
