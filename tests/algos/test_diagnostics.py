import math

import pytest
import torch

from raylhf.algos.diagnostics import ev_moments, explained_variance_from_moments, mismatch_sums


def test_explained_variance_on_worked_numbers():
    # Returns (1, 2, 3, 4): variance 1.25. Errors (1, -1, 1, -1): variance 1. 1 - 1 / 1.25 = 0.2.
    returns, values = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 3.0, 2.0, 5.0]])
    moments = ev_moments(returns, values, torch.ones(1, 4, dtype=torch.bool))
    assert explained_variance_from_moments(moments).item() == pytest.approx(0.2)


def test_explained_variance_of_parts_equals_that_of_the_whole():
    torch.manual_seed(0)
    mask = torch.rand(6, 4) < 0.7
    returns = torch.randn(6, 4).where(mask, math.nan)
    values = returns + 0.5 * torch.randn(6, 4)
    parts = ev_moments(returns[:1], values[:1], mask[:1]) + ev_moments(returns[1:], values[1:], mask[1:])
    whole = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert explained_variance_from_moments(parts).item() == pytest.approx(whole.item(), abs=1e-5)


def test_critic_off_by_a_constant_explains_everything_and_a_constant_critic_nothing():
    returns, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    perfect = explained_variance_from_moments(ev_moments(returns, returns + 7, mask))
    constant = explained_variance_from_moments(ev_moments(returns, torch.full((3, 5), 7.0), mask))
    assert perfect.item() == pytest.approx(1.0) and constant.item() == pytest.approx(0.0, abs=1e-6)


def test_explained_variance_of_constant_returns_is_nan():
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    assert explained_variance_from_moments(ev_moments(ones, torch.randn(2, 2), mask)).isnan()


def test_mismatch_sums_on_worked_numbers():
    old, rollout = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.5, -1.0, math.nan]])
    sums = mismatch_sums(old, rollout, torch.tensor([[True, True, False]]))
    # log(learner / rollout) = (0.5, -1)
    assert sums["abs_dlogp"].item() == pytest.approx(1.5)
    assert sums["kl"].item() == pytest.approx((math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1), abs=1e-6)
    assert sums["ratio_max"].item() == pytest.approx(math.exp(0.5))


def test_mismatch_kl_is_in_expectation_that_of_rollout_from_learner():
    # Every token of a vocabulary of 3 as one row, weighted by the rollout engine's probability of sampling it.
    old = torch.log_softmax(torch.tensor([0.3, -0.2, 0.5]), dim=0)
    rollout = torch.log_softmax(torch.tensor([0.1, 0.4, -0.6]), dim=0)
    one = torch.ones(1, 1, dtype=torch.bool)
    kl = [mismatch_sums(old[a].view(1, 1), rollout[a].view(1, 1), one)["kl"] for a in range(3)]
    expected = (rollout.exp() * (rollout - old)).sum()
    torch.testing.assert_close((rollout.exp() * torch.stack(kl)).sum(), expected)
