"""One optimizer step of a preference loss, or of supervised fine-tuning, on one rank.

The loss has one global denominator. Whatever it needs to know of the whole batch is computed first, with collectives;
then every micro-batch stands for itself. Ranks with fewer micro-batches than others run forward passes that count
nothing, so that all take part in equally many collectives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raylhf.algos.preference import Responses
from raylhf.algos.preference_robust import wdpo_penalty
from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import PreferenceLoss, TGDPOLoss, WDPOLoss
from raylhf.learner.engine import optimizer_step
from raylhf.learner.microbatch import MicroBatch, in_order, make_micro_batch
from raylhf.learner.models import LearnerModels
from raylhf.learner.preference_batch import (
    Fits,
    Part,
    PreferenceBatch,
    parts_of_groups,
    parts_of_pairs,
    parts_of_rows,
)
from raylhf.learner.preference_metrics import Observed, implicit_rewards, observe
from raylhf.learner.preference_shared import BatchStatistics, gathered_prompts, num_units
from raylhf.learner.preference_terms import PartOfBatch, Shared, form_of, loss_sum
from raylhf.learner.totals import Totals, most_of_ranks

Columns = dict[str, Tensor]
"""Log-probabilities [R, width] of models that are not trained, by name: ref, guide, better, worse, and old (the policy
before the step)."""


class PreferenceUpdate:
    """A loss over the rank's models; its state is what the loss remembers between batches."""

    def __init__(
        self,
        loss: PreferenceLoss | SFTConfig,
        models: LearnerModels,
        *,
        seed: int,
        device: torch.device,
        max_tokens: int | None = None,
    ) -> None:
        """`max_tokens` limits rows that the loss makes up."""
        self._max_tokens = max_tokens
        self._loss = loss
        self._models = models
        self._device = device
        self.needs = frozenset[Need]() if isinstance(loss, SFTConfig) else LOSSES[loss.kind].needs
        self.statistics = BatchStatistics(loss, models, seed=seed, device=device)

    # --- before the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def columns(
        self,
        batch: PreferenceBatch,
        known: Columns | None = None,
        *,
        with_policy: bool = False,
        one_by_one: bool = False,
    ) -> Columns:
        """What the loss compares with, on all rows; `known` is not computed again, `with_policy` asks for `old`.

        `one_by_one`: what models that are not trained say of a group does not depend, to the last bit, on the others.
        """
        models, columns = self._models, dict(known or {})
        frozen = partial(self.all_rows, one_by_one=one_by_one)
        wanted: dict[str, Callable[[], Tensor]] = {}
        if Need.REFERENCE in self.needs:
            wanted["ref"] = partial(frozen, batch, models.reference_logprobs)
        if isinstance(self._loss, TGDPOLoss):
            wanted["guide"] = partial(frozen, batch, models.guide_logprobs)
        for name, prompts in (("better", batch.better_prompt_ids), ("worse", batch.worse_prompt_ids)):
            if prompts is not None:
                wanted[name] = partial(frozen, batch.with_prompts(prompts), models.reference_logprobs)
        if with_policy or self.statistics.needs_policy:
            wanted["old"] = partial(self.all_rows, batch, self._policy_logprobs)
        return columns | {name: compute() for name, compute in wanted.items() if name not in columns}

    def _policy_logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        return self._models.policy_forward(micro, temperature)[0]

    @torch.no_grad()
    def all_rows(
        self, batch: PreferenceBatch, forward: Callable[[MicroBatch, float], Tensor], *, one_by_one: bool = False
    ) -> Tensor:
        """`forward` on every row, [R, width]; 0 after a response's end. `one_by_one`: a group at a time."""
        table = torch.zeros(len(batch), batch.width, device=self._device)
        if one_by_one:
            sizes, layout = batch.row_sizes, self._models.layout
            parts = [part for group in batch.groups for part in in_order(sizes, group, layout)]
        else:
            parts = [list(part.rows) for part in parts_of_rows(batch, self._fits(batch))]
        self._fill(table, batch, parts, forward)
        return table

    @torch.no_grad()
    def _fill(
        self,
        table: Tensor,
        batch: PreferenceBatch,
        parts: Sequence[Sequence[int]],
        forward: Callable[[MicroBatch, float], Tensor],
    ) -> None:
        """Put `forward` of the rows of `parts` into `table` [R, width] (collective)."""
        for number in range(most_of_ranks(len(parts), self._device)):
            # A rank that is done goes on with its last part, or with a row whose number is known already.
            rows = parts[min(number, len(parts) - 1)] if parts else [0]
            micro = self._micro_batch(batch, rows)
            found = micro.scatter(forward(micro, batch.temperature).float(), batch.width)
            if parts:
                table[micro.source_rows] = found

    def prepare(self, batch: PreferenceBatch, columns: Columns, *, step: int) -> Shared:
        """What the loss must know about the whole batch (collective)."""
        mismatched = None
        if self.statistics.needs_mismatched and len(prompts := gathered_prompts(batch)) > 1:
            others = batch.mismatched(prompts, max_tokens=self._max_tokens)
            policy = self.all_rows(others, self._policy_logprobs)
            mismatched = (policy, self.all_rows(others, self._models.reference_logprobs))
        whole = self._whole(batch, columns)
        return self.statistics.shared(batch, whole, mismatched=mismatched, step=step)

    def _whole(self, batch: PreferenceBatch, columns: Columns) -> PartOfBatch:
        """All rows as one part, without gradients, under the policy before the step where that is known."""
        rows = tuple(range(len(batch)))
        old = columns.get("old")
        logprobs = torch.zeros(len(batch), batch.width, device=self._device) if old is None else old
        part = Part(rows, tuple(range(len(batch.chosen))), groups=batch.groups)
        return self._part(batch, columns, part, logprobs, None)

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(
        self,
        batch: PreferenceBatch,
        columns: Columns,
        shared: Shared,
        totals: Totals,
        *,
        lrs: Sequence[float],
        old: Tensor | None = None,
    ) -> float:
        """One optimizer step; adds to `totals` what the metrics are made of, and returns the gradient's norm.

        A batch without a single pair (row, group) that counts, on any rank, changes nothing: the norm is 0. Log-
        probabilities before the step are written into `old` [R, width], those of rows that it does not learn from too.
        """
        units = torch.tensor(num_units(self._loss, batch, shared), dtype=torch.float64, device=self._device)
        dist.all_reduce(units)
        denominator = units.item()
        parts = self._parts(batch) if denominator else []
        if old is not None:
            learnt = {row for part in parts for row in part.rows}
            others = [
                [row for row in part.rows if row not in learnt] for part in parts_of_rows(batch, self._fits(batch))
            ]
            self._fill(old, batch, [rows for rows in others if rows], self._policy_logprobs)
        if denominator == 0:
            return 0.0
        seen = Observed.nothing(len(batch), batch.width, self._device)
        losses = [partial(self._part_loss, batch, columns, shared, part, denominator, seen) for part in parts]
        losses += [partial(self._nothing, batch)] * (most_of_ranks(len(parts), self._device) - len(parts))
        norm = optimizer_step(self._models.policy, losses, lrs)
        if old is not None:
            old[seen.is_seen] = seen.logprobs[seen.is_seen]
        observe(self._loss, self._whole(batch, columns | {"old": seen.logprobs}), seen.is_seen, totals)
        totals.add(loss=seen.loss, entropy=seen.entropies.sum(), entropy_tokens=seen.entropy_tokens.sum())
        return norm

    def _parts(self, batch: PreferenceBatch) -> list[Part]:
        fits = self._fits(batch)
        match form_of(self._loss):
            case "rows":
                return parts_of_rows(batch, fits)
            case "groups":
                return parts_of_groups(batch, fits)
            case form:
                return parts_of_pairs(batch, fits, may_share=form == "pairs")

    def _fits(self, batch: PreferenceBatch) -> Fits:
        return partial(self._models.layout.fits, batch.row_sizes)

    def _micro_batch(self, batch: PreferenceBatch, rows: Sequence[int]) -> MicroBatch:
        return make_micro_batch(batch, rows, self._device, self._models.layout)

    def _part_loss(
        self, batch: PreferenceBatch, columns: Columns, shared: Shared, part: Part, denominator: float, seen: Observed
    ) -> Tensor:
        micro = self._micro_batch(batch, part.rows)
        rows, seq_kl = micro.source_rows, None
        embeddings: list[Tensor] = []
        if Need.FULL_VOCABULARY_KL in self.needs:
            flat, divergences = self._models.policy_forward_with_kl(micro, batch.temperature)
            spans = batch.mask(self._device)[list(part.rows)]
            seq_kl = torch.where(spans, micro.scatter(divergences, batch.width), 0.0).sum(dim=1)
        else:
            if Need.DOUBLE_BACKWARD in self.needs:
                with captured_embeddings(self._models.policy, embeddings):
                    flat, entropies = self._models.policy_forward_past_engine(micro, batch.temperature)
            else:
                flat, entropies, _ = self._models.policy_forward(micro, batch.temperature)
            seen.entropies[rows] = micro.scatter(entropies.detach().float(), batch.width).sum(dim=1)
            seen.entropy_tokens[rows] = micro.rows.bincount(minlength=len(rows)).float()
        known = self._part(batch, columns, part, micro.scatter(flat, batch.width), seq_kl)
        loss = loss_sum(self._loss, known, shared)
        if isinstance(self._loss, WDPOLoss):
            pair_weights = shared.pair_weights[known.places]
            row_weights = pair_weights.new_zeros(len(part.rows))
            row_weights[known.pairs.chosen] = row_weights[known.pairs.rejected] = pair_weights
            loss = loss + embedding_penalty(loss, embeddings[0], row_weights, rho=self._loss.rho)
        seen.logprobs[rows], seen.is_seen[rows] = known.responses.logprobs.detach().float(), True
        seen.loss += loss.detach() / denominator
        return loss / denominator

    def _part(
        self, batch: PreferenceBatch, columns: Columns, part: Part, logprobs: Tensor, seq_kl: Tensor | None
    ) -> PartOfBatch:
        """The rows of `part` and what is known about them; `logprobs` [B, width] are the policy's."""
        rows, pairs, device = list(part.rows), list(part.pairs), self._device

        def own(name: str) -> Tensor | None:
            return columns[name][rows] if name in columns else None

        responses = Responses(
            logprobs=logprobs,
            mask=batch.mask(device)[rows],
            ref_logprobs=own("ref"),
            guide_logprobs=own("guide"),
            better_logprobs=own("better"),
            worse_logprobs=own("worse"),
            seq_kl=seq_kl,
        )
        ranks, group_rows = _padded_groups(batch, part)
        return PartOfBatch(
            responses=responses,
            pairs=part.local_pairs(batch, device),
            places=torch.tensor(pairs, dtype=torch.long, device=device),
            prompts=torch.from_numpy(np.searchsorted(batch.group_starts, batch.chosen[pairs], side="right")).to(device),
            smoothing=_tensor(batch.smoothing[pairs], device),
            reward_gaps=_tensor(batch.reward_gaps[pairs], device),
            ranks=_tensor(ranks, device),
            group_rows=torch.from_numpy(group_rows).to(device),
            is_good=_tensor(batch.is_good[rows], device),
        )

    def _nothing(self, batch: PreferenceBatch) -> Tensor:
        """A forward pass for the other ranks' sake; its gradient is zero."""
        micro = self._micro_batch(batch, [0])
        if Need.FULL_VOCABULARY_KL in self.needs:
            return self._models.policy_forward_with_kl(micro, batch.temperature)[0].sum() * 0.0
        return self._models.policy_forward(micro, batch.temperature)[0].sum() * 0.0

    # --- measuring --------------------------------------------------------------------------------------------------

    def measure(self, batch: PreferenceBatch, columns: Columns, totals: Totals) -> Tensor:
        """Add to `totals` what the metrics say about `batch` under the present policy; `columns` hold `old`.

        Returns the implicit rewards of all rows, [R]; for sft, their mean log-probabilities.
        """
        whole = self._whole(batch, columns)
        observe(self._loss, whole, torch.ones(len(batch), dtype=torch.bool, device=self._device), totals)
        return implicit_rewards(self._loss, whole.responses)

    def state_dict(self) -> dict[str, Any]:
        """What the loss remembers between batches."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.statistics.load_state_dict(state)


@contextmanager
def captured_embeddings(policy: Any, captured: list[Tensor]) -> Iterator[None]:
    """Put the input embeddings [B, L, D] of forward passes inside it into `captured`, to be differentiated by."""

    def capture(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()  # frozen under LoRA
        captured.append(output)
        return output

    handle = policy.module.lm.get_input_embeddings().register_forward_hook(capture)
    try:
        yield
    finally:
        handle.remove()


def embedding_penalty(loss: Tensor, embeddings: Tensor, row_weights: Tensor, *, rho: float) -> Tensor:
    """WDPO's penalty on a part whose pairs share no row, so that each row's gradient is of one pair's loss, times that
    pair's weight. `row_weights` [B] are these weights; the penalties have them too."""
    (slopes,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    squares = slopes.float().square().sum(dim=(1, 2))
    weighted_once = torch.where(row_weights > 0, squares / row_weights.clamp(min=1e-12), 0.0)
    return wdpo_penalty(weighted_once, rho=rho, form="squared").sum()


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)


def _padded_groups(batch: PreferenceBatch, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """(ranks [G, K], NaN-padded; rows of the part [G, K], padded with 0)."""
    width = max((len(group) for group in part.groups), default=0)
    ranks = np.full((len(part.groups), width), np.nan)
    rows = np.zeros((len(part.groups), width), dtype=np.int64)
    for g, group in enumerate(part.groups):
        ranks[g, : len(group)] = batch.ranks[[part.rows[i] for i in group]]
        rows[g, : len(group)] = group
    return ranks, rows
