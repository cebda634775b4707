"""What a preference loss, or fine-tuning, learns from in stored judgements. Without a tokenizer, so that the driver and
`raylhf check` know it too."""

from collections.abc import Iterable, Sequence

import numpy as np

from raylhf.batch import RewardExample
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import (
    KTOLoss,
    MODPOLoss,
    NSDPOLoss,
    PlackettLuceDPOLoss,
    PreferenceLoss,
    TREGLoss,
)
from raylhf.text.judgements import Split

LEAST_WEIGHT = 1e-6
"""Median weight of NS-DPO's pairs below which the unit of their times is wrong."""


def usable(examples: Sequence[RewardExample], loss: PreferenceLoss | SFTConfig) -> list[RewardExample]:
    """The prompts that have something to learn from; the others hold ties alone, or judgements of another kind.

    Raises:
        ValueError: a prompt lacks a field that the loss needs.
    """
    for example in examples:
        _require_fields(example, loss)
    return [example for example in examples if _is_usable(example, loss)]


def usable_parts(split: Split, loss: PreferenceLoss | SFTConfig) -> tuple[list[RewardExample], list[RewardExample]]:
    """(training, held-out) prompts that have something to learn from, or to be measured on.

    Raises:
        ValueError: there is nothing to train on, or it does not count.
    """
    train, held_out = usable(split.train, loss), usable(split.held_out, loss)
    if not train:
        raise ValueError(
            f"data.path holds nothing for {loss.kind}: none of its {len(split.train)} training prompts has a "
            "comparison, ranking or response that it learns from (ties are none)"
        )
    if isinstance(loss, NSDPOLoss):
        now = newest_time(train)
        ages = [now - pair.time for example in train for pair in example.pairs if pair.time is not None]
        if loss.gamma ** float(np.median(ages)) < LEAST_WEIGHT:
            raise ValueError(
                f"objective.loss.gamma = {loss.gamma:g} leaves half of the pairs a weight below {LEAST_WEIGHT:g}: the "
                f"median age is {np.median(ages):g} in units of the field time; give time in larger units, such as "
                "days, or raise gamma"
            )
    return train, held_out


def _is_usable(example: RewardExample, loss: PreferenceLoss | SFTConfig) -> bool:
    match loss:
        case SFTConfig():
            return bool(unbeaten(example))
        case PlackettLuceDPOLoss():
            return bool(example.pairs) and example.ranks is not None
        case KTOLoss():
            return not np.isnan(good_by_itself(example, loss)).all()
        case _:
            return bool(example.pairs)


def unbeaten(example: RewardExample) -> list[int]:
    """Positions of the responses that no comparison rejects: what fine-tuning learns from."""
    losers = {pair.rejected for pair in example.pairs}
    return [k for k in range(len(example.responses)) if k not in losers]


def good_by_itself(example: RewardExample, loss: KTOLoss) -> np.ndarray:
    """1 for a good response, 0 for a bad one, NaN where it is not judged by itself, float64 [K].

    Of scores, those from good_from are good; of pairs, those that won more often than they lost.
    """
    if example.targets is not None:
        scores = example.targets[:, 0]
        return np.where(np.isnan(scores), np.nan, scores >= loss.good_from)
    return good_by_wins([(pair.chosen, pair.rejected) for pair in example.pairs], len(example.responses))


def good_by_wins(pairs: Iterable[tuple[int, int]], num_rows: int) -> np.ndarray:
    """1 for rows that are (chosen, rejected) more often in the first place, 0 in the second, NaN as often, [R]."""
    wins = np.zeros(num_rows)
    for chosen, rejected in pairs:
        wins[chosen] += 1
        wins[rejected] -= 1
    return np.select([wins > 0, wins < 0], [1.0, 0.0], np.nan)


def newest_time(examples: Sequence[RewardExample]) -> float:
    """The time of the newest pair, 0 where none has a time."""
    return max((pair.time for example in examples for pair in example.pairs if pair.time is not None), default=0.0)


def _require_fields(example: RewardExample, loss: PreferenceLoss | SFTConfig) -> None:
    if isinstance(loss, NSDPOLoss) and any(pair.time is None for pair in example.pairs):
        raise ValueError(f"the loss ns_dpo needs the field time in every row; prompt {example.index} has none")
    if isinstance(loss, MODPOLoss):
        for pair in example.pairs:
            if missing := sorted(loss.other_weights.keys() - pair.reward_gaps.keys()):
                raise ValueError(
                    f"the loss modpo needs {', '.join(missing)} in chosen_rewards and rejected_rewards of every row; "
                    f"prompt {example.index} lacks it"
                )
    if isinstance(loss, TREGLoss) and not example.messages:
        raise ValueError(f"the loss t_reg asks for better and worse answers, but prompt {example.index} is empty")
