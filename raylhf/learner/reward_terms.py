"""What scored rows contribute to the loss: single losses, their weights, and how many units the mean is over.

The loss of a step is the sum of losses times weights over the number of `units` in all its examples. A unit is an
example (its comparisons share its weight, as in InstructGPT), an observed target or a labelled step. Scores are [R, H]
from sequence heads, of which an ensemble's members come here one column at a time, and [R, L] from a token head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylhf.algos.masking import lengths_to_mask
from raylhf.algos.reward_losses import (
    aggregate_tokens,
    pairwise_losses,
    plackett_luce_losses,
    process_losses,
    squared_errors,
    token_step_losses,
)
from raylhf.batch import RewardExample
from raylhf.config.reward_model import (
    BradleyTerryLoss,
    MSELoss,
    PlackettLuceLoss,
    ProcessLoss,
    RewardLoss,
    TokenAggregateLoss,
    TokenStepLoss,
)
from raylhf.learner.reward_batch import EncodedExample, RowBatch
from raylhf.learner.reward_targets import TargetScale


@dataclass(frozen=True)
class Terms:
    """n single losses."""

    losses: Tensor
    """fp32 [n]."""
    weights: Tensor
    """What part of a unit each one is, fp32 [n]."""
    examples: Tensor
    """Position in the batch of the example behind each, long [n]."""


@dataclass(frozen=True)
class FlatPairs:
    """All comparisons of a batch, [P] each."""

    chosen: Tensor
    """Row of the preferred response, long."""
    rejected: Tensor
    """Row of the other one, long."""
    margins: Tensor
    """fp32."""
    agreement: Tensor
    """Share of raters who prefer it, fp32; NaN where unknown."""
    weights: Tensor
    """1 over the number of the example's pairs, fp32."""
    examples: Tensor
    """long."""


def flat_pairs(batch: RowBatch) -> FlatPairs:
    """The comparisons of `batch` by row."""
    columns: list[tuple[float, ...]] = []
    for position, (encoded, start) in enumerate(zip(batch.examples, batch.starts, strict=True)):
        pairs = encoded.example.pairs
        for pair in pairs:
            agreement = float("nan") if pair.agreement is None else pair.agreement
            rows = (start + pair.chosen, start + pair.rejected)
            columns.append((*rows, pair.margin, agreement, 1 / len(pairs), position))
    table = torch.tensor(columns, dtype=torch.float64, device=batch.device).reshape(-1, 6).unbind(1)
    chosen, rejected, margins, agreement, weights, examples = table
    return FlatPairs(
        chosen.long(), rejected.long(), margins.float(), agreement.float(), weights.float(), examples.long()
    )


def rankings_of(example: RewardExample) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(responses, their places) of each ranking with a choice in it; comparisons that make no ranking are one each."""
    if example.ranks is None:
        return [((pair.chosen, pair.rejected), (1.0, 2.0)) for pair in example.pairs]
    if len(example.ranks) < 2 or np.isnan(example.ranks).all():
        return []
    return [(tuple(range(len(example.ranks))), tuple(example.ranks.tolist()))]


# --- terms of each loss -----------------------------------------------------------------------------------------------


def mse_terms(batch: RowBatch, scores: Tensor, loss: MSELoss, scale: TargetScale | None) -> Terms:
    """One an observed target; `scores` [R, J]."""
    assert scale is not None
    judged = [encoded.example for encoded in batch.examples]
    targets = np.concatenate([scale.standardized(_required(example.targets)) for example in judged])
    weights = None
    if loss.use_rater_std:
        values = [scale.rater_weights(_required(example.target_stds)) for example in judged]
        weights = torch.from_numpy(np.concatenate(values)).float().to(batch.device)
    goals = torch.from_numpy(targets).float().to(batch.device)
    losses, observed = squared_errors(scores, goals, weights=weights)
    sizes = torch.tensor([len(encoded.rows) for encoded in batch.examples], device=batch.device)
    examples = torch.arange(len(sizes), device=batch.device).repeat_interleave(sizes)
    flat = losses[observed]
    return Terms(flat, torch.ones_like(flat), examples[:, None].expand_as(observed)[observed])


def _pair_terms(pairs: FlatPairs, scores: Tensor, loss: BradleyTerryLoss | TokenAggregateLoss) -> Terms:
    """One a comparison; `scores` [R]."""
    flip_probs = torch.where(pairs.agreement.isnan(), loss.label_smoothing, 1 - pairs.agreement)
    losses = pairwise_losses(
        scores[pairs.chosen],
        scores[pairs.rejected],
        margins=pairs.margins if loss.use_margin else None,
        flip_probs=flip_probs,
        center_coef=loss.center_coef,
    )
    return Terms(losses, pairs.weights, pairs.examples)


def bradley_terry_terms(batch: RowBatch, scores: Tensor, loss: BradleyTerryLoss, scale: TargetScale | None) -> Terms:
    """One a comparison; `scores` [R, 1]."""
    return _pair_terms(flat_pairs(batch), scores[:, 0], loss)


def token_aggregate_terms(
    batch: RowBatch, scores: Tensor, loss: TokenAggregateLoss, scale: TargetScale | None
) -> Terms:
    """One a comparison; `scores` [R, L]."""
    sums = aggregate_tokens(scores, batch.response_mask(scores.shape[1]), how=loss.aggregate)
    return _pair_terms(flat_pairs(batch), sums, loss)


def plackett_luce_terms(batch: RowBatch, scores: Tensor, loss: PlackettLuceLoss, scale: TargetScale | None) -> Terms:
    """One a ranking; `scores` [R, 1]."""
    found = [rankings_of(encoded.example) for encoded in batch.examples]
    flat = [
        (np.asarray(responses) + start, places, 1 / len(rankings), position)
        for position, (rankings, start) in enumerate(zip(found, batch.starts, strict=True))
        for responses, places in rankings
    ]
    width = max((len(places) for _, places, _, _ in flat), default=1)
    rows, ranks = np.zeros((len(flat), width), dtype=np.int64), np.zeros((len(flat), width))
    for i, (responses, places, _, _) in enumerate(flat):
        rows[i, : len(responses)], ranks[i, : len(places)] = responses, places
    lengths = torch.tensor([len(places) for _, places, _, _ in flat], dtype=torch.long, device=batch.device)
    losses = plackett_luce_losses(
        scores[:, 0][torch.from_numpy(rows).to(batch.device)],
        torch.from_numpy(ranks).float().to(batch.device),
        lengths_to_mask(lengths, width),
        top=loss.top,
    )
    weights = torch.tensor([weight for _, _, weight, _ in flat], dtype=torch.float32, device=batch.device)
    return Terms(losses, weights, _long([position for _, _, _, position in flat], batch))


def token_step_terms(batch: RowBatch, scores: Tensor, loss: TokenStepLoss, scale: TargetScale | None) -> Terms:
    """One a comparison, the mean over its positions; `scores` [R, L]."""
    tokens = [np.flatnonzero(row.response_mask) for row in batch.rows]
    width = max(len(positions) for positions in tokens)
    columns = np.zeros((len(tokens), width), dtype=np.int64)
    for i, positions in enumerate(tokens):
        columns[i, : len(positions)] = positions
    aligned = scores.gather(1, torch.from_numpy(columns).to(batch.device))
    mask = lengths_to_mask(_long([len(positions) for positions in tokens], batch), width)
    pairs = flat_pairs(batch)
    sums, counts = token_step_losses(
        aligned[pairs.chosen],
        aligned[pairs.rejected],
        mask[pairs.chosen],
        mask[pairs.rejected],
        past_shorter=loss.past_shorter,
    )
    return Terms(sums / counts, pairs.weights, pairs.examples)


def process_terms(batch: RowBatch, scores: Tensor, loss: ProcessLoss, scale: TargetScale | None) -> Terms:
    """One a labelled step; `scores` [R, L]."""
    steps = [
        (start + k, token, label, position)
        for position, (encoded, start) in enumerate(zip(batch.examples, batch.starts, strict=True))
        for k in range(len(encoded.rows))
        for token, label in labelled_steps(encoded, k)
    ]
    rows, tokens, labels, examples = zip(*steps, strict=True) if steps else ((), (), (), ())
    goals = torch.tensor(labels, dtype=torch.float32, device=batch.device)
    losses = process_losses(scores[_long(rows, batch), _long(tokens, batch)], goals)
    return Terms(losses, torch.ones_like(losses), _long(examples, batch))


def labelled_steps(encoded: EncodedExample, k: int) -> list[tuple[int, float]]:
    """(token, label) of the steps of response k that somebody labelled and that were not cut off."""
    tokens, labels = encoded.rows[k].step_tokens, encoded.example.step_labels[k]
    both = zip(tokens.tolist(), labels.tolist(), strict=True)
    return [(token, label) for token, label in both if token >= 0 and label == label]


TERMS: dict[str, Callable[[RowBatch, Tensor, Any, TargetScale | None], Terms]] = {
    "mse": mse_terms,
    "bradley_terry": bradley_terry_terms,
    "plackett_luce": plackett_luce_terms,
    "token_aggregate": token_aggregate_terms,
    "token_step": token_step_terms,
    "process": process_terms,
}


# --- what a run minimises ---------------------------------------------------------------------------------------------


def num_units(encoded: EncodedExample, loss: RewardLoss) -> int:
    """What the example adds to the denominator."""
    if isinstance(loss, MSELoss):
        return int((~np.isnan(_required(encoded.example.targets))).sum())
    if isinstance(loss, ProcessLoss):
        return sum(len(labelled_steps(encoded, k)) for k in range(len(encoded.rows)))
    if isinstance(loss, PlackettLuceLoss):
        return int(bool(rankings_of(encoded.example)))
    return int(bool(encoded.example.pairs))


def require_units(examples: Sequence[EncodedExample], loss: RewardLoss, *, part: str) -> None:
    """Refuse a `part` of the data (`training`, `held-out`) from which the loss can take nothing.

    Raises:
        ValueError: no example has a unit.
    """
    if any(num_units(encoded, loss) for encoded in examples):
        return
    if isinstance(loss, MSELoss):
        why = "no response has a score; give scores"
    elif isinstance(loss, ProcessLoss):
        num_labels = sum((~np.isnan(own)).sum() for encoded in examples for own in encoded.example.step_labels)
        why = "no step has a label; give labels"
        if num_labels:
            why = f"data.max_tokens cuts off all {num_labels} labelled steps; raise it"
    else:
        why = (
            "none has two responses of which one is judged better; give comparisons or several responses a prompt "
            "(of single scores, loss mse can learn)"
        )
    elsewhere = ", or hold out others (data.held_out, data.held_out_path)" if part == "held-out" else ""
    raise ValueError(f"data: loss {loss.kind} finds nothing in the {len(examples)} {part} prompts: {why}{elsewhere}")


def loss_sum(
    batch: RowBatch,
    scores: Tensor,
    *,
    loss: RewardLoss,
    scale: TargetScale | None,
    by_member: bool,
    member_weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the losses (fp32 scalar), to be divided by the step's number of units.

    With `by_member` the columns of `scores` are members of an ensemble, each with a loss of its own; `member_weights`
    [columns, E] says how often each one sees each of the batch's E examples.
    """
    columns = scores.split(1, dim=1) if by_member else (scores,)
    total = scores.new_zeros(())
    for member, column in enumerate(columns):
        terms = TERMS[loss.kind](batch, column, loss, scale)
        weights = terms.weights
        if member_weights is not None:
            weights = weights * member_weights[member][terms.examples]
        total = total + (terms.losses * weights).sum()
    return total


def response_scores(batch: RowBatch, scores: Tensor, *, loss: RewardLoss) -> Tensor:
    """One score a response, [R]: the mean over members or attributes; what the loss aggregates of token scores.

    Step-wise losses aggregate nothing: the mean over the response's tokens stands in, and for a process model the score
    of its worst step.
    """
    if isinstance(loss, ProcessLoss):
        steps = [row.step_tokens[row.step_tokens >= 0] for row in batch.rows]
        return torch.stack(
            [scores[i, torch.from_numpy(s).to(batch.device) if len(s) else [-1]].amin() for i, s in enumerate(steps)]
        )
    if isinstance(loss, TokenAggregateLoss | TokenStepLoss):
        how = loss.aggregate if isinstance(loss, TokenAggregateLoss) else "mean"
        return aggregate_tokens(scores, batch.response_mask(scores.shape[1]), how=how)
    return scores.mean(dim=1)


def _long(values: Sequence[int], batch: RowBatch) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=batch.device)


def _required(values: np.ndarray | None) -> np.ndarray:
    assert values is not None  # data.kind is checked against the loss
    return values
