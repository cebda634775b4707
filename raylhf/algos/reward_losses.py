"""Losses of reward-model training, one per comparison, ranking, score or step, never reduced.

A loss is summed and divided by the trainer, whose denominator is that of the whole optimizer step: all micro-batches
and all ranks. Inputs below fp32 are lifted to fp32; float64 stays float64. Every function selects with masks instead of
multiplying by them, so that NaN in padding or behind a missing label reaches neither a loss nor a gradient.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from raylhf.algos.masking import last_response_index, lift, select


def pairwise_losses(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margins: Tensor | None = None,
    flip_probs: Tensor | float = 0.0,
    center_coef: float = 0.0,
) -> Tensor:
    """Bradley-Terry losses [P] of the scores `chosen` [P] and `rejected` [P] (InstructGPT, arXiv 2203.02155).

    With d = chosen - rejected - margin, (1 - eps) * softplus(-d) + eps * softplus(d) + center_coef * (chosen +
    rejected)^2. `margins` [P] say by how much a response is better (Llama 2, arXiv 2307.09288). `flip_probs`, eps, is
    the probability that a label is wrong, one for all or [P], in the convention of cDPO: the minimum lies at
    d = log((1 - eps) / eps), whereas torch's label_smoothing puts only eps / 2 on the wrong class. `center_coef` holds
    scores around 0, which the gap alone leaves open (arXiv 2312.09244).
    """
    chosen, rejected = lift(chosen), lift(rejected)
    gaps = chosen - rejected
    if margins is not None:
        gaps = gaps - margins
    # -logsigmoid(d) is softplus(-d) without the kink that torch's softplus has where it turns linear.
    losses = -(1 - flip_probs) * logsigmoid(gaps) - flip_probs * logsigmoid(-gaps)
    return losses + center_coef * (chosen + rejected).square()


def squared_errors(scores: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(losses, observed), both [N, J]: squared errors of `scores` [N, J], and where there is one.

    `targets` [N, J] are NaN where nobody gave a score: the loss is 0 there. `weights` [N, J] scale the losses (inverse
    variances of the raters, say) and are read only where a target is.
    """
    observed = ~targets.isnan()
    losses = (select(scores, observed) - select(targets, observed)).square()
    if weights is not None:
        losses = losses * select(weights, observed)
    return losses, observed


def plackett_luce_losses(scores: Tensor, ranks: Tensor, mask: Tensor, *, top: int | None = None) -> Tensor:
    """Negative log-likelihood [B] of rankings under Plackett-Luce, divided by the number of choices in each.

    A ranking is a sequence of choices: the best of all, then the best of what is left. `scores`, `ranks` and `mask`
    are [B, K]; `ranks` hold 1 for the best, equal numbers for a tie, NaN for responses below all that have a place
    (never chosen, but always among what is left); `mask` is False on padding. Only the first `top` choices count (1:
    softmax cross-entropy on the best), and a choice among one does not. A row without any choice gives 0.

    Ties follow Efron (1977): the l-th choice (from 0) among d tied responses has their mean score as numerator and
    leaves each of them in the denominator with weight 1 - l / d. This is the mean loss over all orders that the ties
    allow, with the mean of the log-denominators replaced by the log of their mean: a close upper bound in O(K^2)
    instead of O(d!), exact where tied scores are equal and at the first choice of a tie (so two responses that tie
    have the pairwise loss with flip probability 1/2).
    """
    scores = select(scores, mask)
    ranked = mask & ~ranks.isnan()
    places = torch.where(ranked, ranks, torch.inf)
    # Entry [b, i, j] relates response j to response i; row i stands for the choice that puts i into its place.
    here, other = places[:, :, None], places[:, None, :]
    tied = (here == other) & ranked[:, :, None] & ranked[:, None, :]
    below = (other > here) & mask[:, None, :]
    num_tied = tied.sum(dim=2).clamp(min=1)
    num_chosen_ties = tied.tril(diagonal=-1).sum(dim=2)  # l: tied responses are taken in the order of their columns
    num_candidates = num_tied - num_chosen_ties + below.sum(dim=2)
    counted = ranked & (num_candidates > 1)
    if top is not None:
        num_chosen = (other < here).sum(dim=2) + num_chosen_ties
        counted &= num_chosen < top
    log_share = (1 - num_chosen_ties.to(scores.dtype) / num_tied).log()[:, :, None]
    log_weights = torch.where(tied, log_share, torch.where(below, 0.0, -torch.inf))
    # A row of -inf alone, as padding has, would make the gradient NaN even though its loss is not selected.
    log_weights = torch.where(counted[:, :, None], log_weights, 0.0)
    numerators = torch.where(tied, scores[:, None, :], 0.0).sum(dim=2) / num_tied
    losses = torch.logsumexp(scores[:, None, :] + log_weights, dim=2) - numerators
    return select(losses, counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def aggregate_tokens(token_scores: Tensor, mask: Tensor, *, how: Literal["sum", "mean", "last"]) -> Tensor:
    """One score [B] a response from `token_scores` [B, T] under `mask` [B, T]; 0 for a response without tokens.

    A sum grows with length; the last score is that of an ordinary reward model. Only the aggregate is supervised, so
    single token scores are identified up to shifts that cancel in it.
    """
    selected = select(token_scores, mask)
    if how == "sum":
        return selected.sum(dim=1)
    if how == "mean":
        return selected.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    if how == "last":
        return _last_score(selected, mask)
    assert_never(how)


def token_step_losses(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    past_shorter: Literal["truncate", "zero", "hold"],
) -> tuple[Tensor, Tensor]:
    """(sums, counts), both [B]: Bradley-Terry losses summed over the positions of a pair, and how many these are.

    All inputs [B, T]; the masks are prefix masks (True at the first so many positions). Past the end of the shorter
    response, `truncate` stops, `zero` takes 0 for its scores and `hold` its last score (0 if it has no token); both go
    on to the end of the longer one. Divide by the counts to keep long pairs from weighing more.
    """
    chosen, rejected = select(chosen, chosen_mask), select(rejected, rejected_mask)
    if past_shorter == "truncate":
        counted = chosen_mask & rejected_mask
    elif past_shorter in ("zero", "hold"):
        counted = chosen_mask | rejected_mask
    else:
        assert_never(past_shorter)
    if past_shorter == "hold":
        chosen = torch.where(chosen_mask, chosen, _last_score(chosen, chosen_mask)[:, None])
        rejected = torch.where(rejected_mask, rejected, _last_score(rejected, rejected_mask)[:, None])
    losses = select(pairwise_losses(chosen, rejected), counted)
    return losses.sum(dim=1), counted.sum(dim=1)


def process_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies [N] of "this step is right" (arXiv 2305.20050).

    `logits` [N] are read at the ends of the labelled steps; `labels` [N] are 1 for a right step, 0 for a wrong one, or
    a probability in between. Steps without a label are left out by the caller.
    """
    logits = lift(logits)
    return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def bootstrap_weights(num_members: int, indexes: Sequence[int], *, seed: int) -> Tensor:
    """How often each member of an ensemble sees each example: Poisson(1) draws [M, B] (fp32).

    In the limit of much data this is resampling with replacement. A draw depends on `seed` (>= 0), the member and the
    example's index in `indexes` [B] alone, so neither batching nor the number of ranks or members changes it.
    """
    # Philox is made for keys that count up: neighbouring keys give independent streams.
    streams = [np.random.Generator(np.random.Philox(key=(seed << 64) + int(index))) for index in indexes]
    draws = [stream.poisson(1.0, size=num_members) for stream in streams]
    return torch.tensor(np.array(draws).reshape(len(indexes), num_members).T, dtype=torch.float32)


def _last_score(selected: Tensor, mask: Tensor) -> Tensor:
    """Entry [B] of `selected` [B, T], which is 0 outside `mask` [B, T], at the last True position; 0 without any."""
    index = last_response_index(mask).clamp(min=0)
    return selected.gather(1, index[:, None]).squeeze(1)
