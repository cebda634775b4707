"""What a preference loss must know about the whole batch, over all ranks, before it looks at a part of it."""

import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raylhf.algos.preference import dpo_loss, kto_reference_point
from raylhf.algos.preference_robust import Ema, beta_dpo_beta, beta_dpo_keep, dr_dpo_weights, kldpo_weights
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import (
    AlphaDPOLoss,
    AuxDPOLoss,
    BetaDPOLoss,
    DrDPOLoss,
    KLDPOLoss,
    KTOLoss,
    PlackettLuceDPOLoss,
    PreferenceLoss,
)
from raylhf.learner.auxiliary_offsets import AuxiliaryOffsets
from raylhf.learner.models import LearnerModels
from raylhf.learner.preference_batch import PreferenceBatch
from raylhf.learner.preference_terms import PartOfBatch, Shared


class BatchStatistics:
    """Collectives before the loss, and what is remembered from batch to batch."""

    def __init__(
        self, loss: PreferenceLoss | SFTConfig, models: LearnerModels, *, seed: int, device: torch.device
    ) -> None:
        self._loss = loss
        self._seed = seed
        self._device = device
        self._ema = Ema()
        self._offsets = AuxiliaryOffsets(loss, models, device=device) if isinstance(loss, AuxDPOLoss) else None

    @property
    def needs_policy(self) -> bool:
        """Whether the policy's log-probabilities of the whole batch are wanted before the step."""
        return isinstance(self._loss, BetaDPOLoss | AlphaDPOLoss | KLDPOLoss | DrDPOLoss | AuxDPOLoss)

    @property
    def needs_mismatched(self) -> bool:
        """Whether responses behind other prompts are wanted."""
        return isinstance(self._loss, KTOLoss)

    def shared(
        self, batch: PreferenceBatch, whole: PartOfBatch, *, mismatched: tuple[Tensor, Tensor] | None, step: int
    ) -> Shared:
        """The numbers of this batch (collective); running statistics move.

        `mismatched` are log-probabilities [R, width] of policy and reference behind other prompts; None where there is
        one prompt only.
        """
        loss, weights = self._loss, torch.from_numpy(batch.weights).to(self._device)
        shared = Shared(weights, offsets=torch.zeros(len(weights), 2, device=self._device))
        match loss:
            case KTOLoss():
                point = 0.0 if mismatched is None else self._reference_point(batch, *mismatched)
                return Shared(weights, shared.offsets, reference_point=point)
            case BetaDPOLoss():
                return self._beta_dpo(loss, whole, shared, step)
            case AlphaDPOLoss():
                mean, std, everything = self._moments(whole.pairs.gap(whole.responses.mean_log_ratios()))
                if len(everything):
                    self._ema = self._ema.updated(mean, std, loss.decay)
                return Shared(weights, shared.offsets, center=self._ema.mean, spread=self._ema.std)
            case KLDPOLoss() | DrDPOLoss():
                values = dpo_loss(whole.pairs.gap(whole.responses.log_ratios()), beta=loss.beta)
                everything, own = self._gathered(values)
                weigh = kldpo_weights if isinstance(loss, KLDPOLoss) else dr_dpo_weights
                return Shared(weights * weigh(everything, temperature=loss.temperature)[own], shared.offsets)
            case AuxDPOLoss():
                assert self._offsets is not None
                return Shared(weights, self._offsets.updated(batch, whole))
        return shared

    def _beta_dpo(self, loss: BetaDPOLoss, whole: PartOfBatch, shared: Shared, step: int) -> Shared:
        gaps = whole.pairs.gap(whole.responses.log_ratios())
        mean, std, everything = self._moments(gaps)
        if not len(everything):
            return shared
        self._ema = self._ema.updated(mean, std, loss.decay)
        keep = beta_dpo_keep(
            everything,
            center=self._ema.mean,
            spread=self._ema.std,
            keep_share=1 - loss.filter_share,
            seed=int(np.random.SeedSequence((self._seed, step)).generate_state(1)[0]),
        )
        beta = beta_dpo_beta(
            everything[keep].mean(), beta=loss.beta, sensitivity=loss.sensitivity, center=self._ema.mean
        )
        own = self._own(len(gaps))
        return Shared(shared.pair_weights * keep[own], shared.offsets, beta=float(beta))

    def _reference_point(self, batch: PreferenceBatch, policy: Tensor, reference: Tensor) -> float:
        """KTO's z over the batches of all ranks."""
        mask = batch.mask(self._device)
        ratios = torch.where(mask, policy - reference, 0.0).sum()
        sums = torch.stack([ratios.double(), mask.any(dim=1).sum().double()])
        dist.all_reduce(sums)
        return float(kto_reference_point(sums[0], sums[1]))

    def _moments(self, values: Tensor) -> tuple[float, float, Tensor]:
        """Mean and standard deviation over all ranks, and all the values."""
        everything, _ = self._gathered(values)
        if not len(everything):
            return 0.0, 0.0, everything
        return float(everything.mean()), float(everything.std(correction=0)), everything

    def _gathered(self, values: Tensor) -> tuple[Tensor, slice]:
        """The values [n] of all ranks in their order, and where this rank's stand."""
        lists: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lists, values.detach().double().cpu().numpy())
        start = sum(len(part) for part in lists[: dist.get_rank()])
        return torch.from_numpy(np.concatenate(lists)).to(self._device), slice(start, start + len(values))

    def _own(self, count: int) -> slice:
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, count)
        start = sum(counts[: dist.get_rank()])
        return slice(start, start + count)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"ema": self._ema.as_dict()} | ({} if self._offsets is None else {"offsets": self._offsets.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._ema = Ema.from_dict(state["ema"])
        if self._offsets is not None:
            self._offsets.load_state_dict(state["offsets"])


def gathered_prompts(batch: PreferenceBatch) -> list[np.ndarray]:
    """The different prompts of all ranks' batches (collective), in an order that depends on nothing but them."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, batch.group_prompts)
    different = {ids.tobytes(): ids for prompts in lists for ids in prompts}
    # By digest: in the order of their tokens, neighbours would resemble each other.
    return [different[key] for key in sorted(different, key=lambda key: hashlib.blake2b(key).digest())]


def num_units(loss: PreferenceLoss | SFTConfig, batch: PreferenceBatch, shared: Shared) -> float:
    """What this rank adds to the loss's denominator: tokens (sft), judged responses (kto), rankings, or pairs."""
    match loss:
        case SFTConfig():
            return float((batch.spans[:, 1] - batch.spans[:, 0]).sum())
        case KTOLoss():
            return float((~np.isnan(batch.is_good)).sum())
        case PlackettLuceDPOLoss():
            return float(sum((~np.isnan(batch.ranks[list(rows)])).sum() > 1 for rows in batch.groups))
        case BetaDPOLoss():
            return float((shared.pair_weights > 0).sum())
    return float(len(batch.chosen))
