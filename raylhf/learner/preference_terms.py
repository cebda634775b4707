"""From the settings of a preference loss to its value on a micro-batch: which numbers each loss is a function of."""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from raylhf.algos import preference as losses
from raylhf.algos import preference_robust as robust
from raylhf.algos.preference import Pairs, Responses
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import (
    AlphaDPOLoss,
    AuxDPOLoss,
    BetaDPOLoss,
    CDPOLoss,
    DPOLoss,
    DrDPOLoss,
    IPOLoss,
    KLDPOLoss,
    KTOLoss,
    MODPOLoss,
    NSDPOLoss,
    ORPOLoss,
    PlackettLuceDPOLoss,
    PreferenceLoss,
    RobustDPOLoss,
    SimPOLoss,
    StepDPOLoss,
    TDPO1Loss,
    TDPO2Loss,
    TGDPOLoss,
    TREGLoss,
    WDPOLoss,
)

Form = Literal["rows", "pairs", "pairs_apart", "groups"]
"""What a loss adds up over: single responses, pairs (that may share rows of one forward pass, or not), whole groups."""


@dataclass(frozen=True)
class Shared:
    """What a loss needs to know about the whole batch before it looks at a part; every rank has the same numbers."""

    pair_weights: Tensor
    """Of this rank's pairs, [N]: those of the data times those of the loss."""
    offsets: Tensor
    """Of this rank's pairs, [N, 2]: added to the log-ratios of chosen and rejected (AuxDPO), else 0."""
    beta: float = 0.0
    """beta-DPO's, of this batch."""
    center: float = 0.0
    """Running mean of a gap."""
    spread: float = 0.0
    """Running standard deviation of a gap."""
    reference_point: float = 0.0
    """KTO's z."""


@dataclass(frozen=True)
class PartOfBatch:
    """One micro-batch: its responses and what is known about its pairs, rows and groups."""

    responses: Responses
    pairs: Pairs
    places: Tensor
    """Which of the rank's pairs these are, long [n]."""
    prompts: Tensor
    """Number of the prompt of each pair, long [n]."""
    smoothing: Tensor
    """Probability that a pair's label is wrong, NaN where the data does not say, [n]."""
    reward_gaps: Tensor
    """MODPO's margins, [n]."""
    ranks: Tensor
    """Places of the rows of each group, [G, K], NaN-padded."""
    group_rows: Tensor
    """The rows of each group, long [G, K]; 0 where padded."""
    is_good: Tensor
    """1 good, 0 bad, NaN not judged, of each row [B]."""


def form_of(loss: PreferenceLoss | SFTConfig) -> Form:
    """What the loss adds up over."""
    match loss:
        case SFTConfig() | KTOLoss():
            return "rows"
        case PlackettLuceDPOLoss():
            return "groups"
        case WDPOLoss():
            return "pairs_apart"
    return "pairs"


def beta_of(loss: PreferenceLoss) -> float:
    """Scale of the implicit rewards that are logged."""
    return 1.0 if isinstance(loss, ORPOLoss) else loss.beta


def loss_sum(loss: PreferenceLoss | SFTConfig, part: PartOfBatch, shared: Shared) -> Tensor:
    """The part's sum of weighted losses, to be divided by the batch's number of pairs, rows, groups or tokens."""
    responses = part.responses
    match loss:
        case SFTConfig():
            return losses.sft_loss(responses).sum()
        case KTOLoss():
            return _kto(loss, part, shared)
        case PlackettLuceDPOLoss():
            log_ratios = responses.log_ratios()[part.group_rows]
            return losses.plackett_luce_dpo_loss(log_ratios, part.ranks, beta=loss.beta).sum()
    values = pair_losses(loss, part, shared)
    # A pair without weight must not spread a NaN.
    weights = shared.pair_weights[part.places]
    return torch.where(weights > 0, values * weights, 0.0).sum()


def _kto(loss: KTOLoss, part: PartOfBatch, shared: Shared) -> Tensor:
    judged = ~part.is_good.isnan()
    values = losses.kto_loss(
        part.responses.log_ratios(),
        part.is_good == 1,
        beta=loss.beta,
        reference_point=shared.reference_point,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
    )
    return torch.where(judged, values, 0.0).sum()


def pair_losses(loss: PreferenceLoss, part: PartOfBatch, shared: Shared) -> Tensor:
    """One loss a pair, [n], not weighted."""
    responses, pairs = part.responses, part.pairs
    match loss:
        case SimPOLoss():
            return losses.simpo_loss(pairs.gap(responses.means()), beta=loss.beta, gamma=loss.gamma)
        case ORPOLoss():
            means = responses.means()
            chosen = means[pairs.chosen]
            return loss.odds_coef * losses.orpo_loss(chosen, means[pairs.rejected]) - chosen
        case IPOLoss():
            return losses.ipo_loss(pairs.gap(responses.mean_log_ratios()), beta=loss.beta)
        case AlphaDPOLoss():
            means = responses.means()
            return robust.alpha_dpo_loss(
                pairs.gap(means),
                pairs.gap(means - responses.mean_log_ratios()),
                beta=loss.beta,
                gamma_ratio=loss.gamma_ratio,
                alpha=loss.alpha,
                center=shared.center,
                spread=shared.spread,
            )
        case TGDPOLoss():
            return losses.tgdpo_loss(responses, pairs, beta=loss.beta, alpha=loss.alpha)
        case TREGLoss():
            return losses.treg_loss(responses, pairs, beta=loss.beta, alpha=loss.alpha)
        case KTOLoss() | PlackettLuceDPOLoss():
            raise AssertionError(f"{loss.kind} is not a loss of pairs")
    return _gap_losses(loss, pairs.gap(responses.log_ratios()), part, shared)


def _gap_losses(
    loss: DPOLoss
    | CDPOLoss
    | RobustDPOLoss
    | BetaDPOLoss
    | TDPO1Loss
    | TDPO2Loss
    | StepDPOLoss
    | WDPOLoss
    | KLDPOLoss
    | DrDPOLoss
    | AuxDPOLoss
    | MODPOLoss
    | NSDPOLoss,
    gap: Tensor,
    part: PartOfBatch,
    shared: Shared,
) -> Tensor:
    """Losses of the gap of log-ratios [n]."""
    match loss:
        case CDPOLoss():
            # What the data says about a pair's label goes before the setting.
            smoothing = torch.where(part.smoothing.isnan(), loss.label_smoothing, part.smoothing)
            return losses.cdpo_loss(gap, beta=loss.beta, label_smoothing=smoothing)
        case RobustDPOLoss():
            return losses.robust_dpo_loss(gap, beta=loss.beta, label_noise=loss.label_noise)
        case BetaDPOLoss():
            return losses.dpo_loss(gap, beta=shared.beta)
        case TDPO1Loss() | TDPO2Loss():
            seq_kl = part.responses.seq_kl
            assert seq_kl is not None
            chosen, rejected = seq_kl[part.pairs.chosen], seq_kl[part.pairs.rejected]
            if isinstance(loss, TDPO1Loss):
                return losses.tdpo1_loss(gap, chosen, rejected, beta=loss.beta)
            return losses.tdpo2_loss(gap, chosen, rejected, beta=loss.beta, alpha=loss.alpha)
        case MODPOLoss():
            return losses.modpo_loss(gap, part.reward_gaps, beta=loss.beta, weight=loss.weight)
        case AuxDPOLoss():
            offsets = shared.offsets[part.places]
            return losses.aux_dpo_loss(gap, offsets[:, 0], offsets[:, 1], beta=loss.beta)
        case DPOLoss() | StepDPOLoss() | WDPOLoss() | KLDPOLoss() | DrDPOLoss() | NSDPOLoss():
            return losses.dpo_loss(gap, beta=loss.beta)
    assert_never(loss)
