"""Preference losses and weights that depend on the rest of the batch: on its outliers, its worst case, its age.

Names and conventions as in `preference`. What is asked for of a batch is of the GLOBAL batch of an optimizer step, all
micro-batches and ranks, and of its real pairs, not of padding; nothing here communicates.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylhf.algos.masking import lift

MIN_BETA = 1e-3
"""beta-DPO's batch-wise beta does not fall below this (as in the authors' code)."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving averages of a batch statistic's mean and standard deviation, of beta-DPO and alpha-DPO.

    Both start at 0. The authors' codes leave it so, which after one step has only (1 - decay) of the mean and of the
    deviation and makes the first steps degenerate. `is_corrected` takes the bias out: the averages are over what was
    seen, and the first update gives the first batch's own numbers.
    """

    mean: float = 0.0
    std: float = 0.0
    num_updates: int = 0
    is_corrected: bool = True

    def updated(self, mean: float, std: float, decay: float) -> Self:
        """With one more batch, whose global `mean` and `std` these are; `decay` in [0, 1) is one for all updates.

        `std` is 0 for a batch of one (the authors' codes, which divide by N - 1, have NaN there, for good).
        """
        num_updates = self.num_updates + 1
        # Dividing an average by 1 - decay^n is the same as giving its n-th batch this weight.
        weight = (1 - decay) / (1 - decay**num_updates) if self.is_corrected else 1 - decay
        return replace(
            self,
            mean=self.mean + weight * (mean - self.mean),
            std=self.std + weight * (std - self.std),
            num_updates=num_updates,
        )

    def as_dict(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, float]) -> Self:
        """The one whose `as_dict` this is."""
        return cls(
            mean=float(state["mean"]),
            std=float(state["std"]),
            num_updates=int(state["num_updates"]),
            is_corrected=bool(state["is_corrected"]),
        )


def beta_dpo_keep(
    gaps: Tensor, *, center: Tensor | float, spread: Tensor | float, keep_share: float, seed: int
) -> Tensor:
    """Which pairs beta-DPO learns from, bool [N] (arXiv 2407.08639): outliers of the gap are likely to be left out.

    floor(keep_share * N), but at least one, are drawn without replacement with probabilities in proportion to
    exp(-((gap - center) / spread)^2 / 2). `gaps` [N] of rho, without beta, are those of the GLOBAL batch; with equal
    gaps in equal order, every rank draws the same pairs (the authors' code lets each rank draw its own).
    """
    log_weights = -_standardized(gaps.detach().double().cpu(), center, spread).square() / 2
    # Adding Gumbel noise to log-weights and taking the largest is drawing one by one. It also works where a weight
    # underflows to 0. The 1e-9 keeps 0.29 * 100 at 29.
    noise = np.random.default_rng(seed).gumbel(size=len(gaps))
    num_kept = min(len(gaps), max(1, math.floor(keep_share * len(gaps) + 1e-9)))
    keep = torch.zeros(len(gaps), dtype=torch.bool)
    keep[(log_weights + torch.from_numpy(noise)).topk(num_kept).indices] = True
    return keep.to(gaps.device)


def beta_dpo_beta(mean_gap_of_kept: Tensor, *, beta: float, sensitivity: float, center: Tensor | float) -> Tensor:
    """beta * (1 + sensitivity * (mean - center)) (scalar, detached, at least MIN_BETA): the beta of a batch.

    `mean_gap_of_kept` is the mean gap of rho, without beta, over the kept pairs of the global batch (arXiv 2407.08639;
    the paper writes beta into the gap, the authors' code, whose `sensitivity` 0.6 is meant, does not).
    """
    return (beta * (1 + sensitivity * (lift(mean_gap_of_kept).detach() - center))).clamp(min=MIN_BETA)


def alpha_dpo_loss(
    mean_gap: Tensor,
    ref_mean_gap: Tensor,
    *,
    beta: float,
    gamma_ratio: float,
    alpha: float,
    center: Tensor | float,
    spread: Tensor | float,
) -> Tensor:
    """l(beta * (mean_gap - sg(gamma_ratio + alpha * z))) [N] (arXiv 2410.10148).

    `mean_gap` and `ref_mean_gap` [N] are gaps of S divided by length under policy and reference; z standardises their
    difference with the moving `center` and `spread` of the global batches. SimPO whose margin is larger for pairs that
    the policy separates already; alpha = 0 is SimPO with gamma = beta * gamma_ratio.
    """
    mean_gap = lift(mean_gap)
    margin = gamma_ratio + alpha * _standardized(mean_gap - lift(ref_mean_gap), center, spread)
    return -logsigmoid(beta * (mean_gap - margin.detach()))


def kldpo_weights(losses: Tensor, *, temperature: float) -> Tensor:
    """Weights [N] (mean 1, detached) of KLDPO, robust to a shift of preferences (arXiv 2502.01930).

    In proportion to exp(loss / temperature): the worst case within a KL ball around the data. `losses` [N] are those
    of the GLOBAL batch. The released code does not normalise, but clamps at 10, which changes the learning rate too.
    Wrong labels have high losses and gain weight: `dr_dpo_weights` goes the other way.
    """
    return (lift(losses).detach() / temperature).softmax(dim=0) * len(losses)


def dr_dpo_weights(losses: Tensor, *, temperature: float) -> Tensor:
    """Weights [N] (mean 1, detached) of Dr. DPO, robust to wrong labels (arXiv 2407.07880).

    In proportion to exp(-loss / temperature), of the GLOBAL batch: the gradient of -temperature * log mean exp(-loss /
    temperature), the loss of the paper.
    """
    return kldpo_weights(-losses, temperature=temperature)


def ns_dpo_weights(ages: Tensor, *, gamma: float) -> Tensor:
    """gamma^age [N], for preferences that change with time (NS-DPO, arXiv 2407.18676).

    `ages` [N] (>= 0) is the time since a pair was judged, 0 for the newest, in the unit that `gamma` was chosen for.
    Not normalised, as in the paper: a batch of old pairs takes a smaller step.
    """
    return gamma ** lift(ages)


def wdpo_penalty(squared_norms: Tensor, *, rho: float, form: Literal["paper", "squared"]) -> Tensor:
    """What Wasserstein-robust DPO adds to the loss (arXiv 2502.01930).

    `squared_norms` [N] of the gradients of each pair's loss in its input embeddings. `paper`: rho * sqrt(mean), a
    scalar, whose norms must be those of the whole batch. `squared`: rho * norm^2 [N], one per pair, which is what the
    authors' code does.
    """
    squared_norms = lift(squared_norms)
    if form == "squared":
        return rho * squared_norms
    if form == "paper":
        mean = squared_norms.sum() / max(1, len(squared_norms))
        # The root has no slope at 0, where all gradients vanish; 0 is the right one.
        return rho * torch.where(mean > 0, mean, 1.0).sqrt() * (mean > 0)
    assert_never(form)


def _standardized(values: Tensor, center: Tensor | float, spread: Tensor | float) -> Tensor:
    """(values - center) / spread; 0 where nothing is known about the spread, as after single values."""
    spread = torch.as_tensor(spread, dtype=values.dtype, device=values.device)
    # As in `advantages.whiten`, a small spread does not amplify rounding.
    return torch.where(spread > 1e-6, (values - center) * (spread * spread + 1e-8) ** -0.5, 0.0)
