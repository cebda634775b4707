"""What is known about a rank's rollout batch before it is trained on: the home shape is R rows, padded to [R, T]."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raylhf.algos.kl import kl_per_token
from raylhf.algos.masking import lengths_to_mask, mask_out
from raylhf.batch import RewardOutput, Rollouts
from raylhf.learner.microbatch import cut_further, make_micro_batch, pad_rows, plan_micro_batches, sizes_of
from raylhf.learner.models import LearnerModels
from raylhf.learner.totals import most_of_ranks


@dataclass(frozen=True)
class Experience:
    """One rank's share of a rollout batch: R rows, padded to the longest response [R, T]."""

    response_mask: Tensor
    """Tokens that count, bool [R, T]: all False in a row that is empty or whose score is invalid."""
    rollout_logprobs: Tensor
    """As the engine sampled them, [R, T]."""
    old_logprobs: Tensor
    """Of the policy before this batch's first update, [R, T]. Where the update learns from rows but once, it writes
    what it sees of them here: their log-probabilities in its forward pass are these."""
    ref_logprobs: Tensor
    """Of the reference, [R, T]."""
    values: Tensor | None
    """Of the critic, [R, T]; None without one."""
    scores: Tensor
    """Rewards' scores, [R]; 0 where invalid."""
    valid: Tensor
    """Whether the row counts, bool [R]."""
    group_ids: Tensor
    """The row's group (one draw of a prompt), long [R]."""
    is_truncated: Tensor
    """Whether the response ran into the length limit, bool [R]."""
    end_values: Tensor | None = None
    """Of the critic after each response's last token, [R]; only where cut responses are bootstrapped."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Scores of the reward's named parts, [R] each, NaN where one does not apply."""

    def columns(self, names: Sequence[str], *, setting: str) -> Tensor:
        """Scores [R, J] of parts by name, NaN where one does not apply; `setting` is where the names stand.

        Raises:
            ValueError: the reward has no part of such a name.
        """
        unknown = [name for name in names if name not in self.parts]
        if unknown and self.valid.any():  # without a valid score there may be no parts at all
            known = ", ".join(sorted(self.parts)) or "no named part"
            raise ValueError(f"{setting} names {unknown[0]!r}, but the reward graph has {known}; correct the name")
        nothing = torch.full_like(self.scores, math.nan)
        return torch.stack([self.parts.get(name, nothing) for name in names], dim=1)

    token_scores: Tensor | None = None
    """The scores laid out over the responses, [R, T]."""
    advantages: Tensor | None = None
    """[R, T], after `assign_credit`."""
    returns: Tensor | None = None
    """The critic's targets, [R, T], after `assign_credit`."""

    def sequence_kl(self) -> Tensor:
        """KL to the reference (k1) summed over each response, [R]."""
        kl = kl_per_token(self.old_logprobs, self.ref_logprobs, estimator="k1")
        return mask_out(kl, self.response_mask).sum(dim=1)


@torch.no_grad()
def gather_experience(
    models: LearnerModels,
    rollouts: Rollouts,
    rewards: RewardOutput,
    group_ids: Sequence[int],
    *,
    with_old: bool,
    with_end_values: bool,
    device: torch.device,
) -> Experience:
    """Old (0 without `with_old`), reference and rollout log-probabilities and values of this rank's rows, and which of
    them count."""
    width = max(len(ids) for ids in rollouts.response_ids)
    columns = {"old": torch.zeros(len(rollouts), width, device=device)}
    if with_end_values:
        columns["end_values"] = torch.zeros(len(rollouts), device=device)
    parts = plan_micro_batches(sizes_of(rollouts), range(len(rollouts)), models.layout)
    # Ranks have equally many rows, so that each has as many micro-batches as the one that needs most.
    for part in cut_further(parts, most_of_ranks(len(parts), device)):
        batch = make_micro_batch(rollouts, part, device, models.layout)
        flat, values = {"ref": models.reference_logprobs(batch, rollouts.temperature)}, None
        if with_old:
            flat["old"], _, values = models.policy_forward(batch, rollouts.temperature)
        if models.critic is not None:
            values = models.critic_forward(batch)
        if values is not None:
            flat["values"] = values
        for name, column in flat.items():
            table = columns.setdefault(name, torch.zeros(len(rollouts), width, device=device))
            table[batch.source_rows] = batch.scatter(column.float(), width)
        if with_end_values:
            columns["end_values"][batch.source_rows] = models.end_values(batch).float()
    # The placeholder of an empty response must not count; the reward marks such rows invalid.
    lengths = torch.from_numpy(rollouts.response_lengths).to(device)
    valid = torch.from_numpy(rewards.valid).to(device)
    dense = rewards.token_scores
    return Experience(
        response_mask=lengths_to_mask(lengths, width) & valid[:, None],
        rollout_logprobs=pad_rows(rollouts.rollout_logprobs, width, device),
        old_logprobs=columns["old"],
        ref_logprobs=columns["ref"],
        values=columns.get("values"),
        end_values=columns.get("end_values"),
        scores=torch.from_numpy(np.where(rewards.valid, rewards.scores, 0.0)).float().to(device),
        valid=valid,
        group_ids=torch.tensor(group_ids, device=device),
        is_truncated=torch.from_numpy(rollouts.is_truncated).to(device),
        parts={name: torch.from_numpy(part).float().to(device) for name, part in rewards.parts.items()},
        token_scores=None if dense is None else pad_rows(dense, width, device),
    )
