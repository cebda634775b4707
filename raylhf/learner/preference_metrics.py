"""What the log says about preference optimisation, from sums over all ranks (docs/metrics.md explains each)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from raylhf.algos.preference import Responses
from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import KTOLoss, PreferenceLoss
from raylhf.learner.preference_terms import PartOfBatch, beta_of
from raylhf.learner.totals import Totals

_SIDES = ("chosen", "rejected")


@dataclass
class Observed:
    """What an optimizer step sees of the policy before it moves. A row that stands in several micro-batches counts
    once, and what is made of the numbers does not depend on how the rows were cut."""

    logprobs: Tensor
    """Of the rows seen, [R, T]; 0 in others."""
    entropies: Tensor
    """Summed over the response's tokens, [R]; 0 where the loss's forward pass gives none."""
    entropy_tokens: Tensor
    """How many these are, [R]."""
    is_seen: Tensor
    """Rows that stand in a micro-batch, bool [R]."""
    loss: Tensor
    """Sum over the micro-batches, a number."""

    @classmethod
    def nothing(cls, num_rows: int, width: int, device: torch.device) -> Self:
        """Before the first micro-batch."""
        zeros = torch.zeros(num_rows, width, device=device)
        return cls(zeros, zeros[:, 0].clone(), zeros[:, 0].clone(), zeros[:, 0].bool(), torch.zeros((), device=device))


def declare(totals: Totals) -> None:
    """Every rank adds the same names, whether it has a pair or not."""
    totals.add(loss=0.0, entropy=0.0, entropy_tokens=0.0, nll=0.0, nll_tokens=0.0, wins=0.0, pairs=0.0)
    totals.add(square_wins=0.0, wins_by_pairs=0.0, square_pairs=0.0)
    for side in _SIDES:
        totals.add(**{f"{side}_{name}": 0.0 for name in ("reward", "logprob", "length", "rows", "log_ratio")})


@torch.no_grad()
def implicit_rewards(loss: PreferenceLoss | SFTConfig, responses: Responses) -> Tensor:
    """beta times the log-ratio to the reference, [R]; without a reference, beta times the mean log-probability."""
    if isinstance(loss, SFTConfig):
        return responses.means()
    compares = Need.REFERENCE in LOSSES[loss.kind].needs
    return beta_of(loss) * (responses.log_ratios() if compares else responses.means())


@torch.no_grad()
def observe(loss: PreferenceLoss | SFTConfig, whole: PartOfBatch, is_seen: Tensor, totals: Totals) -> None:
    """Sums over the rank's pairs (of a loss of single responses: over its good and bad ones).

    `is_seen` [R] tells the rows whose log-probabilities are known; those of pairs, and good and bad ones, are.
    """
    responses, pairs = whole.responses, whole.pairs
    sums, lengths = responses.sums(), responses.lengths()
    totals.add(nll=-sums[is_seen].sum(), nll_tokens=lengths[is_seen].sum())
    if isinstance(loss, SFTConfig):
        return
    ratios = None if responses.ref_logprobs is None else responses.log_ratios()
    means, rewards = responses.means(), implicit_rewards(loss, responses)
    judged = {"chosen": whole.is_good == 1, "rejected": whole.is_good == 0}
    for side in _SIDES:
        rows = judged[side].nonzero()[:, 0] if isinstance(loss, KTOLoss) else getattr(pairs, side)
        totals.add(
            **{
                f"{side}_reward": rewards[rows].sum(),
                f"{side}_logprob": means[rows].sum(),
                f"{side}_length": lengths[rows].sum(),
                f"{side}_rows": len(rows),
            }
        )
        if ratios is not None:
            totals.add(**{f"{side}_log_ratio": ratios[rows].sum()})
    gap = pairs.gap(rewards)
    wins = (gap > 0).double() + 0.5 * (gap == 0).double()
    totals.add(wins=wins.sum(), pairs=len(gap))
    # Pairs of one prompt resemble each other: their sums are what the standard error is made of.
    _, group = whole.prompts.unique(return_inverse=True)
    won, made = (torch.zeros(len(gap), dtype=torch.float64, device=gap.device) for _ in range(2))
    won.index_add_(0, group, wins)
    made.index_add_(0, group, torch.ones_like(wins))
    totals.add(square_wins=won.square().sum(), wins_by_pairs=(won * made).sum(), square_pairs=made.square().sum())


def preference_metrics(sums: Mapping[str, float], *, area: str) -> dict[str, float]:
    """Metrics from global sums; `area` is `pref` in training and `pref_eval` on held-out judgements."""
    metrics: dict[str, float] = {}
    if sums["entropy_tokens"]:
        metrics["policy/entropy"] = sums["entropy"] / sums["entropy_tokens"]
    if sums.get("nll_tokens"):
        metrics[f"{area}/nll_mean"] = sums["nll"] / sums["nll_tokens"]
    for side in _SIDES:
        if count := sums.get(f"{side}_rows", 0):
            metrics[f"{area}/{side}_reward_mean"] = sums[f"{side}_reward"] / count
            metrics[f"{area}/{side}_logprob_mean"] = sums[f"{side}_logprob"] / count
            metrics[f"{area}/{side}_length_mean"] = sums[f"{side}_length"] / count
            if f"{side}_log_ratio" in sums:
                metrics[f"{area}/{side}_log_ratio_mean"] = sums[f"{side}_log_ratio"] / count
    if sums.get("chosen_rows") and sums.get("rejected_rows"):
        metrics[f"{area}/margin_mean"] = metrics[f"{area}/chosen_reward_mean"] - metrics[f"{area}/rejected_reward_mean"]
    if pairs := sums.get("pairs", 0):
        accuracy = sums["wins"] / pairs
        squares = sums["square_wins"] - 2 * accuracy * sums["wins_by_pairs"] + accuracy**2 * sums["square_pairs"]
        metrics |= {f"{area}/accuracy": accuracy, f"{area}/accuracy_se": max(squares, 0.0) ** 0.5 / pairs}
    return metrics
