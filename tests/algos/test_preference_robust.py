import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylhf.algos.preference import dpo_loss
from raylhf.algos.preference_robust import (
    MIN_BETA,
    Ema,
    alpha_dpo_loss,
    beta_dpo_beta,
    beta_dpo_keep,
    dr_dpo_weights,
    kldpo_weights,
    ns_dpo_weights,
    wdpo_penalty,
)

close = partial(torch.testing.assert_close, atol=2e-6, rtol=0)
losses_of_a_batch = st.lists(st.floats(0, 30), min_size=1, max_size=8)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


GAP = vector(1.5, -1.3, 0.7)
LOSSES = vector(0.2, 0.5, 1.0, 2.0)


def test_batch_beta_on_worked_numbers():
    all_pairs = beta_dpo_beta(GAP.mean(), beta=0.1, sensitivity=0.6, center=0.5)
    close(all_pairs.item(), 0.088)
    close(dpo_loss(GAP, beta=all_pairs).mean().item(), 0.681376)
    kept = GAP[[0, 2]]
    beta = beta_dpo_beta(kept.mean(), beta=0.1, sensitivity=0.6, center=0.5)
    close(beta.item(), 0.136)
    close(dpo_loss(kept, beta=beta).mean().item(), 0.62151)


def test_batch_beta_stays_positive_and_has_no_gradient():
    gap = vector(-1e4).requires_grad_()
    beta = beta_dpo_beta(gap.mean(), beta=0.1, sensitivity=0.6, center=0.0)
    assert beta.item() == MIN_BETA and not beta.requires_grad


def likelihood_of_drawing(kept, weights, num_kept):
    """Probability that drawing one by one without replacement, in any order, gives the set `kept`."""
    total = 0.0
    for order in itertools.permutations(kept, num_kept):
        left, probability = sum(weights), 1.0
        for row in order:
            probability *= weights[row] / left
            left -= weights[row]
        total += probability
    return total


def test_pairs_are_drawn_one_by_one_in_proportion_to_their_weights():
    # The weights of the worked numbers: exp(-(gap - 0.5)^2 / 2).
    weights = [0.606531, 0.197899, 0.980199]
    num_draws, counts = 4000, dict.fromkeys(itertools.combinations(range(3), 2), 0)
    for seed in range(num_draws):
        keep = beta_dpo_keep(GAP, center=0.5, spread=1.0, keep_share=2 / 3, seed=seed)
        counts[tuple(keep.nonzero().flatten().tolist())] += 1
    for kept, count in counts.items():
        expected = likelihood_of_drawing(kept, weights, 2)
        deviation = math.sqrt(expected * (1 - expected) / num_draws)
        assert abs(count / num_draws - expected) < 4 * deviation


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), max_size=20), st.floats(0.01, 1), st.floats(0, 10), st.integers(0, 2**31))
def test_the_share_that_is_kept_is_exact_and_the_draw_repeats(gaps, keep_share, spread, seed):
    options = {"center": 0.5, "spread": spread, "keep_share": keep_share, "seed": seed}
    keep = beta_dpo_keep(torch.tensor(gaps), **options)
    assert keep.shape == (len(gaps),) and keep.dtype == torch.bool
    if gaps:
        assert keep.sum() == max(1, math.floor(keep_share * len(gaps) + 1e-9))
    assert torch.equal(keep, beta_dpo_keep(torch.tensor(gaps), **options))


def test_a_share_of_a_batch_does_not_lose_a_pair_to_rounding():
    assert 0.29 * 100 < 29
    assert beta_dpo_keep(torch.zeros(100), center=0.0, spread=1.0, keep_share=0.29, seed=0).sum() == 29


def test_far_outliers_are_dropped_even_where_all_weights_underflow():
    gaps = torch.tensor([1000.0, -1200, 1100, 5000])
    keep = beta_dpo_keep(gaps, center=0.0, spread=1.0, keep_share=0.5, seed=3)
    assert keep.tolist() == [True, False, True, False]


def test_moving_averages_start_at_the_first_batch():
    first = Ema().updated(0.3, 1.44222, 0.9)
    assert (first.mean, first.std, first.num_updates) == (0.3, 1.44222, 1)
    released = Ema(is_corrected=False).updated(0.3, 1.44222, 0.9)
    assert (released.mean, released.std) == pytest.approx((0.03, 0.144222))


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0, 10)), min_size=1, max_size=6), st.floats(0, 0.99))
def test_moving_averages_are_the_weighted_means_of_all_batches(batches, decay):
    corrected, released = Ema(), Ema(is_corrected=False)
    for mean, std in batches:
        corrected, released = corrected.updated(mean, std, decay), released.updated(mean, std, decay)
    weights = np.array([(1 - decay) * decay**age for age in reversed(range(len(batches)))])
    expected = weights @ np.array(batches)
    assert (released.mean, released.std) == pytest.approx(tuple(expected), abs=1e-12)
    assert (corrected.mean, corrected.std) == pytest.approx(tuple(expected / weights.sum()), abs=1e-12)


@pytest.mark.parametrize("is_corrected", [True, False])
def test_moving_averages_continue_from_what_was_saved(is_corrected):
    ema = Ema(is_corrected=is_corrected).updated(0.3, 1.4, 0.9).updated(-0.2, 0.7, 0.9)
    resumed = Ema.from_dict(ema.as_dict())
    assert resumed == ema
    assert resumed.updated(0.1, 0.2, 0.9) == ema.updated(0.1, 0.2, 0.9)


def test_adaptive_margins_on_worked_numbers():
    difference = vector(0.238095, -0.138889, 0.15)
    margins = 0.15 + vector(0.059524, -0.034722, 0.0375)
    mean_gap = vector(-0.2, 0.1, 0.3).requires_grad_()
    options = {"beta": 2.5, "gamma_ratio": 0.15, "alpha": 0.05, "center": 0.0, "spread": 0.2}
    losses = alpha_dpo_loss(mean_gap, mean_gap.detach() - difference, **options)
    close(margins, vector(0.209524, 0.115278, 0.1875))
    close(losses, dpo_loss(mean_gap - margins, beta=2.5))
    # The margin moves with the gap, but is a constant for the gradient.
    (gradient,) = torch.autograd.grad(losses.sum(), mean_gap)
    close(gradient, -2.5 * (-2.5 * (mean_gap - margins)).sigmoid())


def test_a_batch_without_spread_has_the_plain_margin():
    options = {"beta": 2.5, "gamma_ratio": 0.15, "alpha": 0.05, "spread": 0.0}
    for center in (0.4 - 0.3, 3.0):  # after single pairs, the center is what they were and the spread still 0
        losses = alpha_dpo_loss(vector(0.4, 0.4), vector(0.3, 0.3), center=center, **options)
        close(losses, dpo_loss(vector(0.25, 0.25), beta=2.5))


def test_worst_case_weights_on_worked_numbers():
    weights = kldpo_weights(LOSSES, temperature=0.5)
    close(weights / 4, vector(0.022536, 0.041063, 0.111622, 0.824779))
    close((weights * LOSSES).mean().item(), 1.786218)


def test_best_case_weights_on_worked_numbers():
    weights = dr_dpo_weights(LOSSES, temperature=1.0)
    close(weights / 4, vector(0.424548, 0.314513, 0.190762, 0.070177))


@pytest.mark.parametrize(
    ("weights_of", "sign", "temperature", "expected"),
    [(kldpo_weights, 1, 0.5, 1.403173), (dr_dpo_weights, -1, 1.0, 0.729564)],
)
def test_weights_are_the_gradient_of_the_robust_loss(weights_of, sign, temperature, expected):
    losses = LOSSES.clone().requires_grad_()
    robust = sign * temperature * (sign * losses / temperature).exp().mean().log()
    close(robust.item(), expected)
    (gradient,) = torch.autograd.grad(robust, losses)
    weights = weights_of(losses, temperature=temperature)
    close(weights / 4, gradient)
    assert not weights.requires_grad


@given(losses_of_a_batch, st.floats(0.05, 100))
def test_weights_are_those_of_a_plain_loop_and_have_mean_one(losses, temperature):
    worst = kldpo_weights(torch.tensor(losses, dtype=torch.float64), temperature=temperature)
    best = dr_dpo_weights(torch.tensor(losses, dtype=torch.float64), temperature=temperature)
    for weights, sign in ((worst, 1), (best, -1)):
        powers = [math.exp(sign * loss / temperature) for loss in losses]
        expected = [len(losses) * power / sum(powers) for power in powers]
        assert weights.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-250)
        assert weights.mean().item() == pytest.approx(1)


def test_weights_at_tiny_temperatures_are_those_of_the_extremes():
    losses = torch.tensor([1e4, 0.0, 1e4, 3.0])
    assert kldpo_weights(losses, temperature=1e-6).tolist() == [2, 0, 2, 0]
    assert dr_dpo_weights(losses, temperature=1e-6).tolist() == [0, 4, 0, 0]
    assert kldpo_weights(torch.zeros(0), temperature=0.5).shape == (0,)


def test_old_pairs_fade():
    assert ns_dpo_weights(torch.tensor([0, 1, 2, 100_000]), gamma=0.5).tolist() == [1, 0.5, 0.25, 0]


def test_gradient_penalties_on_worked_numbers():
    # Scores are theta . z, and gradients those of a pair's loss in both embeddings z.
    theta = vector(0.5, -1.0)
    chosen = torch.tensor([[1.0, 0.2], [0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([[0.1, 0.4], [0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    losses = dpo_loss((chosen - rejected) @ theta, beta=1.0)
    close(losses, vector(0.420055, 1.350058))
    gradients = torch.autograd.grad(losses.sum(), [chosen, rejected])
    squared_norms = torch.cat(gradients, dim=1).square().sum(dim=1)
    close(squared_norms, vector(0.294105, 1.371869))
    paper = wdpo_penalty(squared_norms, rho=0.1, form="paper")
    squared = wdpo_penalty(squared_norms, rho=0.1, form="squared")
    assert paper.shape == () and squared.shape == (2,)
    close((losses + paper).mean().item(), 0.976325)
    close((losses + squared).mean().item(), 0.968356)


@pytest.mark.parametrize("norms", [[0.0, 0.0], []])
def test_a_penalty_on_gradients_that_vanish_is_zero_with_zero_slope(norms):
    squared_norms = vector(*norms).requires_grad_()
    penalty = wdpo_penalty(squared_norms, rho=0.1, form="paper")
    assert penalty.item() == 0
    assert not torch.autograd.grad(penalty, squared_norms)[0].any()
