import math

import numpy as np
import pytest
from scipy import stats

from raylhf.algos.agreement import (
    cluster_bootstrap,
    first_error_scores,
    pair_accuracy,
    pair_reliability,
    pearson,
    reliability,
    spearman,
)

SCORES, LENGTHS = [0.1, 0.4, 0.35, 0.8, 0.9], [10, 20, 30, 40, 60]


def test_pair_accuracy_on_worked_numbers_with_ties_as_half():
    assert pair_accuracy([1.0, 0.2, -0.5], [0.5, 0.6, -1.5]) == pytest.approx(0.666667, abs=1e-6)
    assert pair_accuracy([1.0, 0.2], [0.5, 0.2]) == 0.75
    assert pair_accuracy(np.ones(9), np.ones(9)) == 0.5


def test_pair_accuracy_is_nan_without_pairs_and_with_a_failed_score():
    assert math.isnan(pair_accuracy([], [])) and math.isnan(pair_accuracy([1.0, math.nan], [0.0, 0.0]))


def test_correlations_on_worked_numbers():
    assert pearson(SCORES, LENGTHS) == pytest.approx(0.93445, abs=1e-6)
    assert spearman(SCORES, LENGTHS) == pytest.approx(0.9)


def test_correlations_equal_those_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=50)
    y = x + rng.integers(5, size=50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlations_are_nan_where_undefined(correlation):
    varied = [1.0, 2.0, 3.0]
    # The mean of three times 0.1 is not 0.1 in floating point.
    assert math.isnan(correlation([0.1] * 3, varied)) and math.isnan(correlation(varied, [0.1] * 3))
    assert math.isnan(correlation([], [])) and math.isnan(correlation([1.0], [2.0]))
    assert math.isnan(correlation([1.0, math.nan, 2.0], varied))


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlations_stay_within_one_and_refuse_unequal_lengths(correlation):
    x = np.array([0.1, 0.2, 0.7])
    assert correlation(x, 3 * x) == pytest.approx(1) and correlation(x, 3 * x) <= 1
    assert correlation(x, -x) == pytest.approx(-1) and correlation(x, -x) >= -1
    with pytest.raises(ValueError, match="as many x as y, got 3 and 2"):
        correlation(x, x[:2])


def test_reliability_on_worked_numbers():
    # Two bins: (0.1, 0.3, 0.3) with one of three true, and (0.9) true. ECE = 3/4 * 0.1 + 1/4 * 0.1.
    result = reliability([0.1, 0.3, 0.9, 0.3], [0, 1, 1, 0], edges=[0, 0.5, 1])
    assert result.edges.tolist() == [0, 0.5, 1] and result.counts.tolist() == [3, 1]
    np.testing.assert_allclose(result.predicted, [0.7 / 3, 0.9])
    np.testing.assert_allclose(result.observed, [1 / 3, 1])
    assert result.ece == pytest.approx(0.1)


def test_bins_hold_their_lower_border_and_empty_bins_are_nan():
    result = reliability([0.0, 0.5, 1.0], [0, 0.5, 1], edges=[0, 0.25, 0.5, 0.75, 1])
    assert result.counts.tolist() == [1, 0, 1, 1] and result.ece == 0
    np.testing.assert_array_equal(result.predicted, [0, math.nan, 0.5, 1])
    np.testing.assert_array_equal(result.observed, [0, math.nan, 0.5, 1])


def test_calibration_error_of_nothing_is_nan():
    result = pair_reliability([], num_bins=3)
    assert math.isnan(result.ece) and result.counts.tolist() == [0, 0, 0]


def test_pair_reliability_on_worked_numbers():
    # sigmoid(ln 3) = 0.75, twice right and once wrong; sigmoid(ln 19) = 0.95, right; a gap of 0 is half right.
    # ECE = (3 * |0.75 - 2/3| + |0.95 - 1| + 0) / 5.
    gaps = np.log([3, 1 / 3, 3, 19, 1])
    result = pair_reliability(gaps, num_bins=5)
    np.testing.assert_allclose(result.edges, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert result.counts.tolist() == [1, 0, 3, 0, 1]
    np.testing.assert_allclose(result.predicted, [0.5, math.nan, 0.75, math.nan, 0.95])
    np.testing.assert_allclose(result.observed, [0.5, math.nan, 2 / 3, math.nan, 1])
    assert result.ece == pytest.approx(0.06)


def test_pair_reliability_is_zero_for_the_true_gaps_and_not_for_exaggerated_ones():
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.normal(size=20_000))
    agreed = np.where(rng.random(20_000) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    assert pair_reliability(agreed, num_bins=10).ece < 0.015
    assert pair_reliability(3 * agreed, num_bins=10).ece > 0.1
    assert pair_reliability(agreed / 10, num_bins=10).ece > 0.1


def test_pair_reliability_is_of_the_share_of_raters_behind_the_models_favourite():
    # ln 1.5 is the gap of a probability of 0.6: what 60 % of the raters say, and against what 60 % say, which is 0.4.
    right = pair_reliability(np.full(200, math.log(1.5)), np.full(200, 0.6), num_bins=10)
    assert right.ece == pytest.approx(0)
    turned = pair_reliability([-math.log(1.5)], [0.6], num_bins=10)
    assert turned.ece == pytest.approx(0.6 - 0.4)
    minority = pair_reliability([-math.log(1.5)], [0.4], num_bins=10)
    assert minority.ece == pytest.approx(0)
    assert pair_reliability([0.0], [0.9], num_bins=10).ece == 0  # no favourite


def test_pair_reliability_survives_huge_gaps():
    result = pair_reliability([1e4, -1e4], num_bins=2)
    assert result.ece == 0.5 and result.counts.tolist() == [0, 2]


def test_bootstrap_interval_of_single_values_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=400)
    low, high = cluster_bootstrap([np.array([v]) for v in values], num_samples=2000)
    half_width = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half_width, abs=0.008)
    assert high == pytest.approx(values.mean() + half_width, abs=0.008)


def test_bootstrap_interval_does_not_shrink_when_every_value_of_a_cluster_is_repeated():
    values = np.random.default_rng(0).normal(size=50)
    once = cluster_bootstrap([np.array([v]) for v in values], seed=3)
    repeated = cluster_bootstrap([np.full(16, v) for v in values], seed=3)
    assert repeated == pytest.approx(once)


def test_bootstrap_interval_is_of_the_mean_over_values_and_not_over_clusters():
    clusters = [np.zeros(1)] * 500 + [np.ones(3)] * 500 + [np.zeros(0)]
    low, high = cluster_bootstrap(clusters)
    assert 0.7 < low < 0.75 < high < 0.8


def test_bootstrap_interval_is_repeatable_by_seed_and_nan_without_values():
    clusters = [np.array([v]) for v in np.random.default_rng(0).normal(size=30)]
    assert cluster_bootstrap(clusters, seed=1) == cluster_bootstrap(clusters, seed=1)
    assert cluster_bootstrap(clusters, seed=1) != cluster_bootstrap(clusters, seed=2)
    assert all(math.isnan(end) for end in (*cluster_bootstrap([]), *cluster_bootstrap([np.zeros(0)])))


def test_first_error_scores_on_worked_numbers():
    # Two of three errors found at the right step, one of two correct solutions left alone: 2 * 2/3 * 1/2 / (7/6) = 4/7.
    scores = first_error_scores(predicted=[2, -1, 0, 3, -1], actual=[2, 1, 0, -1, -1])
    assert scores == pytest.approx({"error_accuracy": 2 / 3, "correct_accuracy": 1 / 2, "f1": 4 / 7})


def test_first_error_scores_at_their_borders():
    assert first_error_scores([0, 0], [1, -1])["f1"] == 0
    assert first_error_scores([-1, -1], [1, -1])["f1"] == 0  # never finding an error is worth nothing
    only_errors = first_error_scores([1, 2], [1, 1])
    assert only_errors["error_accuracy"] == 0.5
    assert math.isnan(only_errors["correct_accuracy"]) and math.isnan(only_errors["f1"])
