"""AuxDPO's offsets (2510.20413): a number for each response of the training pairs, learnt beside the policy.

They stand for what the true reward has and no policy of the class can express. A penalty keeps out what it can express:
the part of the offsets that a small step of the policy could bring about, measured with the reference's gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylhf.algos.preference import aux_dpo_loss, aux_dpo_penalty
from raylhf.config.preference_losses import AuxDPOLoss
from raylhf.learner.microbatch import make_micro_batch
from raylhf.learner.models import LearnerModels
from raylhf.learner.preference_batch import PreferenceBatch
from raylhf.learner.preference_terms import PartOfBatch

_BETAS, _EPS = (0.9, 0.999), 1e-8


class AuxiliaryOffsets:
    """The table of offsets, with an Adam of its own; equal on every rank."""

    def __init__(self, loss: AuxDPOLoss, models: LearnerModels, *, device: torch.device) -> None:
        self._loss = loss
        self._models = models
        self._device = device
        self._table = torch.zeros(0, 2, 4, dtype=torch.float64)
        """Raw offset, first and second moment, number of updates of chosen and rejected, by the pair's key."""

    def updated(self, batch: PreferenceBatch, whole: PartOfBatch) -> Tensor:
        """The offsets [N, 2] of this rank's pairs before their own step, which is then taken (collective)."""
        keys = torch.from_numpy(batch.keys)
        self._grow(keys)
        raw = self._table[keys, :, 0].float().to(self._device).requires_grad_()
        offsets = self._loss.bound * raw.tanh()
        (slopes,) = torch.autograd.grad(self._penalised_loss(offsets, batch, whole), raw)
        self._step(keys, slopes)
        return offsets.detach()

    def _penalised_loss(self, offsets: Tensor, batch: PreferenceBatch, whole: PartOfBatch) -> Tensor:
        """Whose gradient in the offsets is that of the batch's loss over all ranks."""
        loss = self._loss
        count = torch.tensor(float(len(offsets)), dtype=torch.float64, device=self._device)
        dist.all_reduce(count)
        total = max(count.item(), 1.0)
        gap = whole.pairs.gap(whole.responses.log_ratios())
        data = aux_dpo_loss(gap, offsets[:, 0], offsets[:, 1], beta=loss.beta).sum() / total
        share = len(offsets) / total
        if not len(offsets):
            self._expressible(offsets, batch)  # the collectives in it
            return offsets.sum() * 0.0
        expressible, amplitude_coef = self._expressible(offsets, batch), loss.amplitude_coef * share
        penalty = aux_dpo_penalty(expressible, offsets, null_coef=loss.null_coef, amplitude_coef=amplitude_coef)
        return data + penalty

    def _expressible(self, offsets: Tensor, batch: PreferenceBatch) -> Tensor:
        """A number with the gradient of |sum_i offset_i grad log ref(y_i)|^2, the sum over all ranks' responses.

        With the sum v known, that gradient is 2 grad log ref(y_i) . v. The reference's last layer stands for all.
        """
        weights = torch.zeros(len(batch), device=self._device)
        detached = offsets.detach()
        for side, rows in enumerate((batch.chosen, batch.rejected)):
            weights.index_add_(0, torch.from_numpy(rows).to(self._device), detached[:, side])
        gradients = self._row_gradients(batch)
        total = (weights[:, None] * gradients).sum(dim=0)
        dist.all_reduce(total)
        along = gradients @ total
        chosen, rejected = (along[torch.from_numpy(rows).to(self._device)] for rows in (batch.chosen, batch.rejected))
        return 2 * (offsets[:, 0] * chosen + offsets[:, 1] * rejected).sum()

    def _row_gradients(self, batch: PreferenceBatch) -> Tensor:
        """Gradient of each response's log-probability in the reference's last layer, [R, P]."""
        reference: Any = self._models.reference
        parameters = reference.last_layer_parameters()
        mask = batch.mask(self._device)
        rows = []
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                for row in range(len(batch)):
                    micro = make_micro_batch(batch, [row], self._device, self._models.layout)
                    flat = self._models.reference_logprobs(micro, batch.temperature)
                    total = flat[mask[row, : len(flat)]].sum()
                    found = torch.autograd.grad(total, parameters, allow_unused=True)
                    pieces = zip(found, parameters, strict=True)
                    rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pieces]))
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        return torch.stack(rows).float()

    def _grow(self, keys: Tensor) -> None:
        missing = int(keys.max()) + 1 - len(self._table) if len(keys) else 0
        if missing > 0:
            self._table = torch.cat([self._table, torch.zeros(missing, *self._table.shape[1:], dtype=torch.float64)])

    def _step(self, keys: Tensor, slopes: Tensor) -> None:
        """Adam on the rows of all ranks' pairs; what no batch touches stays as it is."""
        updates: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(updates, (keys, slopes.double().cpu()))
        for rows, gradients in updates:
            self._grow(rows)
            raw, first, second, count = self._table[rows].unbind(dim=2)
            count = count + 1
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradients
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradients.square()
            step = (first / (1 - _BETAS[0] ** count)) / ((second / (1 - _BETAS[1] ** count)).sqrt() + _EPS)
            self._table[rows] = torch.stack([raw - self._loss.offset_lr * step, first, second, count], dim=2)

    def state_dict(self) -> dict[str, Any]:
        """The table."""
        return {"table": self._table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._table = state["table"]
