"""Constants of the training targets: how scores are standardised, and how much each one counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylhf.batch import RewardExample
from raylhf.config.reward_model import MSELoss


@dataclass(frozen=True)
class TargetScale:
    """Per attribute, float64 [J]."""

    mean: np.ndarray
    """Subtracted from targets."""
    std: np.ndarray
    """Divides them then."""
    variance: np.ndarray
    """Of the training targets."""
    rater_std: np.ndarray
    """Mean deviation of the raters behind the training targets; stands in where it is not known."""
    weight_mean: np.ndarray
    """Of 1 / (rater variance + variance) over the training targets."""

    def standardized(self, targets: np.ndarray) -> np.ndarray:
        """Targets [K, J] as the model learns them."""
        return (targets - self.mean) / self.std

    def rater_weights(self, stds: np.ndarray) -> np.ndarray:
        """Weight of each target [K, J] from its raters' deviation (NaN: unknown), 1 on average over training."""
        return inverse_variances(stds, self.rater_std, self.variance) / self.weight_mean


def target_scale(examples: Sequence[RewardExample], names: Sequence[str], loss: MSELoss) -> TargetScale:
    """The constants of these training examples; `names` are those of the J attributes.

    Raises:
        ValueError: an attribute has no two scores that differ.
    """
    targets = np.concatenate([e.targets for e in examples if e.targets is not None])
    stds = np.concatenate([e.target_stds for e in examples if e.target_stds is not None])
    for name, column in zip(names, targets.T, strict=True):
        if len(np.unique(column[~np.isnan(column)])) < 2:
            raise ValueError(
                f"data: no two training scores of {name} differ, so there is nothing to learn from them; give more "
                "data, or leave it out"
            )
    is_observed = ~np.isnan(targets)
    variance = np.nanvar(targets, axis=0)
    is_known = is_observed & ~np.isnan(stds)
    rater_std = np.where(is_known, stds, 0.0).sum(axis=0) / np.maximum(is_known.sum(axis=0), 1)
    weights = np.where(is_observed, inverse_variances(stds, rater_std, variance), 0.0)
    return TargetScale(
        mean=np.nanmean(targets, axis=0) if loss.standardize else np.zeros(targets.shape[1]),
        std=np.sqrt(variance) if loss.standardize else np.ones(targets.shape[1]),
        variance=variance,
        rater_std=rater_std,
        weight_mean=weights.sum(axis=0) / is_observed.sum(axis=0),
    )


def inverse_variances(stds: np.ndarray, rater_std: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """1 / (rater variance + variance of the targets) for `stds` [K, J]; `rater_std` [J] where one is NaN.

    The second part bounds the weight of a score on which a few raters happened to agree.
    """
    return 1 / (np.where(np.isnan(stds), rater_std, stds) ** 2 + variance)
