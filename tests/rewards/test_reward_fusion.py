"""The maths of combining members, against METHODS' oracles and its limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from raylhf.rewards.fusion import (
    kl_dro,
    laid_out,
    lower_confidence,
    softmax,
    tchebycheff,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)

# Three members' scores of three responses, as the oracle writes them: one row a member.
MEMBERS = np.array([[1.0, 0.6, -0.5], [0.2, 0.5, -0.4], [1.6, 0.4, -0.6]]).T
MEANS = [0.933333, 0.5, -0.5]
NAN = np.nan

COMBINATIONS = {
    "worst_case": worst_case,
    "lower_confidence": lambda members: lower_confidence(members, coef=1.0),
    "uncertainty_weighted": lambda members: uncertainty_weighted(members, coef=0.5),
    "kl_dro": lambda members: kl_dro(members, beta=0.7),
    "weighted_sum": lambda members: weighted_sum(members, np.ones(members.shape[1]) / members.shape[1]),
}


def test_the_worst_case_is_the_lowest_member_and_its_tokens_are_the_ones_that_count():
    scores, weights = worst_case(MEMBERS)
    assert_array_equal(scores, [0.2, 0.4, -0.6])
    assert_array_equal(weights, [[0, 1, 0], [0, 0, 1], [0, 0, 1]])


def test_the_lower_confidence_bound_is_the_mean_less_one_sample_deviation():
    scores, weights = lower_confidence(MEMBERS, coef=1.0)
    assert_allclose(scores, [0.230956, 0.4, -0.6], atol=1e-6)
    assert_allclose(weights, np.full((3, 3), 1 / 3))


@pytest.mark.parametrize(("coef", "expected"), [(0.1, [0.884, 0.499, -0.501]), (0.5, [0.686667, 0.495, -0.505])])
def test_uncertainty_weighting_takes_off_the_sample_variance(coef, expected):
    assert_allclose(uncertainty_weighted(MEMBERS, coef=coef).scores, expected, atol=1e-6)


def test_mean_worst_case_and_uncertainty_weighting_prefer_different_responses():
    assert np.argmax(lower_confidence(MEMBERS, coef=0).scores) == 0
    assert np.argmax(worst_case(MEMBERS).scores) == 1
    assert np.argmax(uncertainty_weighted(MEMBERS, coef=1.0).scores) == 1


def test_without_a_coefficient_the_spread_does_not_count():
    assert_allclose(lower_confidence(MEMBERS, coef=0).scores, MEANS, atol=1e-6)
    assert_allclose(uncertainty_weighted(MEMBERS, coef=0).scores, MEANS, atol=1e-6)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_single_member_is_its_own_combination(name):
    members = np.array([[0.3], [-2.0]])
    scores, weights = COMBINATIONS[name](members)
    assert_allclose(scores, [0.3, -2.0], rtol=1e-15)
    assert_allclose(weights, [[1.0], [1.0]])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_member_that_does_not_apply_is_left_out_and_a_row_of_none_has_no_score(name):
    combine = COMBINATIONS[name]
    scores, weights = combine(np.array([[1.0, NAN, 3.0], [NAN, NAN, NAN], [NAN, NAN, 5.0]]))
    expected, expected_weights = combine(np.array([[1.0, 3.0]]))
    assert_allclose(scores, [expected[0], NAN, 5.0])
    assert_allclose(weights[0], [expected_weights[0, 0], 0, expected_weights[0, 1]])
    assert_allclose(weights[1:], [[0, 0, 0], [0, 0, 1]])


def test_kl_dro_on_numbers_worked_by_hand():
    # exp(0) = 1 and exp(-ln 3) = 1/3: mean 2/3, weights 3/4 and 1/4.
    scores, weights = kl_dro(np.array([[0.0, np.log(3.0)]]), beta=1.0)
    assert_allclose(scores, [-np.log(2 / 3)])
    assert_allclose(weights, [[0.75, 0.25]])


def test_kl_dro_goes_to_the_mean_as_beta_grows_and_to_the_minimum_as_it_vanishes():
    assert_allclose(kl_dro(MEMBERS, beta=1e7).scores, MEANS, atol=1e-6)
    assert_allclose(kl_dro(MEMBERS, beta=1e7).weights, np.full((3, 3), 1 / 3), atol=1e-6)
    assert_allclose(kl_dro(MEMBERS, beta=1e-6).scores, [0.2, 0.4, -0.6], atol=2e-6)
    assert_allclose(kl_dro(MEMBERS, beta=1e-6).weights, worst_case(MEMBERS).weights)


def test_kl_dro_does_not_overflow():
    scores, weights = kl_dro(np.array([[-1e5, 1e5], [1e5, 1e5 + 1]]), beta=0.1)
    assert_allclose(scores, [-1e5 + 0.1 * np.log(2), 1e5 - 0.1 * np.log((1 + np.exp(-10)) / 2)])
    assert_allclose(weights, [[1, 0], [1, 0]], atol=1e-4)


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_kl_dros_weights_are_its_gradient(beta):
    members, step = MEMBERS[:1], 1e-6
    gradient = [
        (kl_dro(members + step * unit, beta=beta).scores - kl_dro(members - step * unit, beta=beta).scores) / (2 * step)
        for unit in np.eye(3)
    ]
    assert_allclose(kl_dro(members, beta=beta).weights[0], np.concatenate(gradient), atol=1e-8)


CANDIDATES = np.array([[1.0, 0.0], [0.55, 0.4], [0.0, 1.0]])


def test_tchebycheff_picks_the_balanced_candidate_that_no_weighted_sum_picks():
    linear = weighted_sum(CANDIDATES, [0.5, 0.5]).scores
    scores, weights = tchebycheff(CANDIDATES, weights=[0.5, 0.5], ideal=[1.0, 1.0])
    assert_allclose(linear, [0.5, 0.475, 0.5])
    assert_allclose(scores, [-0.5, -0.3, -0.5])
    assert np.argmax(scores) == 1
    assert_allclose(weights, [[0, 0.5], [0, 0.5], [0.5, 0]])


def test_tchebycheff_punishes_an_objective_beyond_its_ideal_too():
    scores, weights = tchebycheff(np.array([[3.0, 0.9]]), weights=[1.0, 1.0], ideal=[1.0, 1.0])
    assert scores.tolist() == [-2.0]
    assert weights.tolist() == [[-1.0, 0.0]]


def test_a_missing_source_makes_the_others_count_more_and_is_no_zero():
    members = np.array([[1.0, 0.5], [NAN, 0.2], [0.0, NAN]])
    scores, weights = weighted_sum(members, [0.7, 0.3])
    assert_allclose(scores, [0.85, 0.2, 0.0])
    assert_allclose(weights, [[0.7, 0.3], [0.0, 1.0], [1.0, 0.0]])


def test_weights_of_either_sign_keep_their_total_size_where_a_source_is_missing():
    scores, _ = weighted_sum(np.array([[2.0, 3.0, NAN]]), [1.0, -1.0, 2.0])
    assert_allclose(scores, [(2.0 - 3.0) * 2])


def test_armorms_gate_and_its_debiased_weights():
    assert_allclose(softmax(np.array([5.0, 0.0, -5.0]), temperature=10), [0.50648, 0.307196, 0.186324], atol=1e-6)
    rewards, gate = np.array([[0.8, 0.4, 0.6]]), np.array([[0.5, 0.3, 0.2]])
    penalty = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-0.5, -0.2, 0.0]])
    assert_allclose(gate @ penalty.T, [[0.5, 0.3, -0.31]])
    assert_allclose(weighted_sum(rewards, gate @ penalty.T).scores, [0.334])
    assert_allclose(weighted_sum(rewards, gate).scores, [0.64])


def test_pures_soft_minimum_puts_the_credit_on_the_worst_step():
    steps = np.array([[0.8, 0.6, 0.0, 0.9]])
    weights = kl_dro(steps, beta=0.1).weights
    assert_allclose(weights, [[0.000334, 0.002471, 0.997071, 0.000123]], atol=1e-6)
    assert_allclose((weights * steps).sum(), 0.001861, atol=1e-6)


def test_softmax_gives_nothing_to_what_does_not_apply():
    shares = softmax(np.array([[0.0, NAN, 0.0], [NAN, NAN, NAN]]), temperature=1.0)
    assert_allclose(shares, [[0.5, 0, 0.5], [0, 0, 0]])


def test_what_token_scores_leave_of_the_score_stands_on_the_last_token():
    rows = laid_out([np.array([1.0, 2.0, 4.0]), np.array([0.5]), np.array([]), np.array([1.0, 2.0])], np.array(
        [10.0, -1.0, 3.0, NAN]
    ))  # fmt: skip
    assert [row.tolist() for row in rows] == [[1.0, 2.0, 7.0], [-1.0], [], [0.0, 0.0]]
    assert all(row.dtype == np.float32 for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(0.01, 100),
    st.permutations(range(3)),
)
def test_combinations_lie_between_minimum_and_mean_and_do_not_depend_on_the_order(rows, beta, order):
    members = np.array(rows)
    low, mean = members.min(axis=1), members.mean(axis=1)
    for combine in (worst_case, lambda m: kl_dro(m, beta=beta), lambda m: lower_confidence(m, coef=0.5)):
        scores, weights = combine(members)
        assert_allclose(weights.sum(axis=1), 1.0)
        assert_allclose(combine(members[:, order]).scores, scores, rtol=1e-9, atol=1e-9)
        assert (scores <= mean + 1e-9).all()
    assert (kl_dro(members, beta=beta).scores >= low - 1e-9).all()


@pytest.mark.parametrize("beta", [1e9, 1e17, 1e300])
def test_a_large_beta_of_kl_dro_does_not_round_the_members_away(beta):
    assert_allclose(kl_dro(np.array([[0.0, 1.0, np.nan]]), beta=beta).scores, [0.5])
