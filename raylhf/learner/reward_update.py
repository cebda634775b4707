"""One optimizer step of a reward model.

Every rank holds all examples, so each knows the whole plan of a step: the global denominator, its own share, and how
many micro-batches the rank with the most of them runs. Ranks with fewer run forward passes that count nothing, so that
all take part in equally many collectives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raylhf.algos.reward_losses import bootstrap_weights
from raylhf.config.reward_model import EnsembleHead
from raylhf.config.run import RewardModelRunConfig
from raylhf.learner.engine import optimizer_step
from raylhf.learner.reward_batch import EncodedExample, RowBatch, cut_counts, deal, draw, fits, pack_examples, pack_rows
from raylhf.learner.reward_scorer import RowScorer
from raylhf.learner.reward_targets import TargetScale
from raylhf.learner.reward_terms import flat_pairs, loss_sum, num_units, response_scores
from raylhf.learner.schedule import lr_scale
from raylhf.learner.totals import Totals

MicroLoss = Callable[[], Tensor]


@dataclass(frozen=True)
class Job:
    """One rank's part in a batch of examples; an ensemble of adapters has one batch a member in each step."""

    member: int | None
    """Which adapter learns; None: all that the model outputs."""
    examples: tuple[EncodedExample, ...]
    """This rank's."""
    denominator: int
    """Units in the batch, over all ranks."""
    num_micro_batches: int
    """Of the rank with the most."""
    in_two_passes: bool
    """Whether an example of the batch, of any rank, has more responses than a micro-batch holds."""


class RewardUpdate:
    """The training of a run, without state of its own beyond weights and optimizer."""

    def __init__(
        self,
        config: RewardModelRunConfig,
        engine: Any,
        score: RowScorer,
        train: Sequence[EncodedExample],
        scale: TargetScale | None,
        *,
        rank: int,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._engine = engine
        self._score = score
        self._train = train
        self._scale = scale
        self._rank = rank
        self._num_steps = num_steps
        self._device = device
        head = config.objective.head
        self._ensemble = head if isinstance(head, EnsembleHead) else None

    def run(self, step: int) -> dict[str, float]:
        """Take optimizer step number `step` (from 0); returns metrics, equal on every rank."""
        started = time.perf_counter()
        totals = Totals(self._device)
        totals.add(loss=0.0, scores=0.0, squares=0.0, responses=0.0, gaps=0.0, wins=0.0, pairs=0.0)
        totals.add(tokens=0.0, **cut_counts(()))
        losses = [loss for job in self._jobs(step) for loss in self._micro_losses(job, totals)]
        learner = self._config.learner
        lr = learner.lr * lr_scale(learner, steps_taken=step, share_done=step / self._num_steps)
        grad_norm = optimizer_step(self._engine, losses, [lr])
        sums = totals.reduced()
        count = max(sums["responses"], 1)
        mean = sums["scores"] / count
        metrics = {
            "rm/loss": sums["loss"] / (1 if self._ensemble is None else self._ensemble.members),
            "rm/score_mean": mean,
            "rm/score_std": max(sums["squares"] / count - mean**2, 0.0) ** 0.5,
            "rm/grad_norm": grad_norm,
            "rm/lr": lr,
            "rm/num_tokens": sums["tokens"],
            "rm/tokens_per_s": sums["tokens"] / (time.perf_counter() - started),
            **{f"rm/{key}": sums[key] for key in cut_counts(())},
        }
        if sums["pairs"]:
            metrics["rm/accuracy"] = sums["wins"] / sums["pairs"]
            metrics["rm/gap_mean"] = sums["gaps"] / sums["pairs"]
        return metrics

    # --- plan -------------------------------------------------------------------------------------------------------

    def _jobs(self, step: int) -> list[Job]:
        """What this rank does in the step."""
        seed = self._config.seed
        if self._ensemble is not None and self._ensemble.trunk == "lora":
            return [self._job(step, member=k, seed=seed + k) for k in range(self._ensemble.members)]
        return [self._job(step, member=None, seed=seed)]

    def _job(self, step: int, *, member: int | None, seed: int) -> Job:
        objective, learner = self._config.objective, self._config.learner
        drawn = draw(step, num_examples=len(self._train), batch_size=objective.batch_size, seed=seed)
        examples = [self._train[i] for i in drawn]
        dealt = deal([encoded.num_tokens for encoded in examples], learner.num_ranks)
        shares = [tuple(examples[i] for i in positions) for positions in dealt]
        layout = self._score.layout
        in_two_passes = not all(fits([encoded], layout) for encoded in examples)
        if in_two_passes:
            counts = [len(pack_rows(_rows(share), layout)) for share in shares]
        else:
            counts = [len(pack_examples(share, layout)) for share in shares]
        return Job(
            member=member,
            examples=shares[self._rank],
            denominator=max(sum(num_units(encoded, objective.loss) for encoded in examples), 1),
            num_micro_batches=max(counts),
            in_two_passes=in_two_passes,
        )

    # --- losses -----------------------------------------------------------------------------------------------------

    def _micro_losses(self, job: Job, totals: Totals) -> Iterator[MicroLoss]:
        """As many as on every other rank; their sum over ranks is the batch's loss."""
        rows = _rows(job.examples)
        totals.add(tokens=sum(len(row.ids) for row in rows), **cut_counts(rows))
        found = self._surrogates(job, totals) if job.in_two_passes else self._direct_losses(job, totals)
        yield from found
        for _ in range(job.num_micro_batches - len(found)):
            yield partial(self._nothing, job.member)

    def _direct_losses(self, job: Job, totals: Totals) -> list[MicroLoss]:
        packs = pack_examples(job.examples, self._score.layout)
        return [partial(self._direct_loss, job, pack, totals) for pack in packs]

    def _direct_loss(self, job: Job, examples: tuple[EncodedExample, ...], totals: Totals) -> Tensor:
        batch = RowBatch(examples, self._device)
        return self._loss(job, batch, self._score(batch.rows, member=job.member), totals)

    def _surrogates(self, job: Job, totals: Totals) -> list[MicroLoss]:
        """Losses whose gradient is that of the batch's, over micro-batches that cut examples apart.

        A first pass gives the scores of all rows, the small graph from scores to loss gives dL/dscores, and by the
        chain rule the gradient of (scores * dL/dscores).sum() over a second pass is that of the loss.
        """
        batch = RowBatch(job.examples, self._device)
        packs = pack_rows(batch.rows, self._score.layout)
        with torch.no_grad():
            parts = [self._score([batch.rows[i] for i in pack], member=job.member) for pack in packs]
            for _ in range(job.num_micro_batches - len(packs)):
                self._nothing(job.member)
        if not packs:
            return []
        scores = parts[0].new_zeros(len(batch.rows), max(part.shape[1] for part in parts))
        for pack, part in zip(packs, parts, strict=True):
            scores[pack, : part.shape[1]] = part
        scores.requires_grad_()
        (slopes,) = torch.autograd.grad(self._loss(job, batch, scores, totals), scores)
        return [partial(self._surrogate, job, batch, pack, slopes) for pack in packs]

    def _surrogate(self, job: Job, batch: RowBatch, pack: Sequence[int], slopes: Tensor) -> Tensor:
        scores = self._score([batch.rows[i] for i in pack], member=job.member)
        return (scores * slopes[list(pack), : scores.shape[1]]).sum()

    def _nothing(self, member: int | None) -> Tensor:
        """A forward pass for the other ranks' sake; its gradient is zero."""
        return self._score(self._train[0].rows[:1], member=member).sum() * 0.0

    def _loss(self, job: Job, batch: RowBatch, scores: Tensor, totals: Totals) -> Tensor:
        """The batch's part of the loss, divided already."""
        loss = self._config.objective.loss
        member_weights = None
        if self._ensemble is not None and job.member is None:
            indexes = [encoded.example.index for encoded in batch.examples]
            drawn = bootstrap_weights(self._ensemble.members, indexes, seed=self._config.seed)
            member_weights = drawn.to(self._device)
        total = loss_sum(
            batch,
            scores,
            loss=loss,
            scale=self._scale,
            by_member=self._ensemble is not None,
            member_weights=member_weights,
        )
        self._observe(batch, scores.detach(), totals)
        totals.add(loss=total / job.denominator)
        return total / job.denominator

    def _observe(self, batch: RowBatch, scores: Tensor, totals: Totals) -> None:
        """Sums behind the step's metrics."""
        values = response_scores(batch, scores, loss=self._config.objective.loss).double()
        pairs = flat_pairs(batch)
        gaps = values[pairs.chosen] - values[pairs.rejected]
        totals.add(
            scores=values.sum(),
            squares=values.square().sum(),
            responses=len(values),
            gaps=gaps.sum(),
            wins=(gaps > 0).sum() + 0.5 * (gaps == 0).sum(),
            pairs=len(gaps),
        )


def _rows(examples: Sequence[EncodedExample]) -> list:
    return [row for encoded in examples for row in encoded.rows]
