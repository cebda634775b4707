"""Masks from lengths, and the sums, means and moments taken under them."""

import torch
from torch import Tensor


def lengths_to_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Mask [B, max_length] (bool), True at the first `lengths[b]` positions of row b; lengths [B] may hold 0."""
    positions = torch.arange(max_length, device=lengths.device)
    return positions < lengths[:, None]


def mask_out(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in fp32, 0 wherever `mask` (same shape) is False.

    Selects instead of multiplying, so that NaN or inf outside the mask reaches neither the result nor the gradient.
    """
    return torch.where(mask, values.float(), 0.0)


def lift(values: Tensor) -> Tensor:
    """`values` in fp32, or in float64 if that is what they are (finite differences need it)."""
    return values if values.dtype == torch.float64 else values.float()


def select(values: Tensor, mask: Tensor) -> Tensor:
    """`mask_out` for losses that keep float64: `values`, lifted, where `mask` (same shape) is True, and 0 elsewhere."""
    return torch.where(mask, lift(values), 0.0)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum (fp32 scalar) of `values` where `mask` (same shape) is True; 0 for an empty mask."""
    return mask_out(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (fp32 scalar) of `values` where `mask` (same shape) is True; 0 for an empty mask.

    The denominator is local, so this is for reporting: a loss needs the denominator of the whole optimizer step.
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def last_response_index(response_mask: Tensor) -> Tensor:
    """Index [B] (long) of the last True position of each row of `response_mask` [B, T]; -1 for a row without any.

    Holes (tool tokens inside a response) are skipped. T must be at least 1.
    """
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, positions, -1).amax(dim=1)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) [3] of `values` where `mask` (same shape) is True.

    Moments of parts of a batch add up to those of the whole: all-reduce them with SUM, then call `mean_and_std`.
    float64, because the variance is a difference of two sums that may be large.
    """
    selected = torch.where(mask, values.double(), 0.0)
    return torch.stack([mask.sum().double(), selected.sum(), selected.square().sum()])


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation (float64 scalars) of summed `masked_moments` [3]; both 0 at count 0."""
    count, total, total_of_squares = moments.unbind()
    count = count.clamp(min=1)
    mean = total / count
    # Rounding can leave a constant batch slightly below zero.
    variance = (total_of_squares / count - mean.square()).clamp(min=0)
    return mean, variance.sqrt()
