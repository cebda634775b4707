"""The numbers of an evaluation, on scores made by hand."""

import numpy as np
import pytest

from raylhf.batch import Pair, RewardExample
from raylhf.learner.reward_report import (
    ScoredExample,
    disagreement,
    evaluation_report,
    length_correlation,
    metric_name,
    reliability_lists,
)


def scored(scores: list[float], texts: tuple[str, ...] | None = None, **fields) -> ScoredExample:
    values = np.array(scores)
    outputs = fields.pop("outputs", values[:, None])
    probs = fields.pop("step_probs", ())
    responses = texts or tuple("word " * (i + 1) for i in range(len(scores)))
    return ScoredExample(RewardExample(0, (), responses, **fields), values, outputs, probs)


def report(examples, *, members=0, attributes=(), is_logistic=True):
    return evaluation_report(examples, members=members, attributes=attributes, is_logistic=is_logistic, num_bins=2)


def test_accuracy_counts_ties_half_and_is_told_by_subset():
    examples = [
        scored([2.0, 1.0], pairs=(Pair(0, 1),), subset="Safety (hard)"),
        scored([1.0, 1.0, 3.0], pairs=(Pair(0, 1), Pair(1, 2)), subset="math"),
    ]
    found = report(examples)
    assert found.metrics["rm_eval/accuracy"] == pytest.approx(0.5)  # right, half, wrong
    assert found.metrics["rm_eval/subset/safety_hard_accuracy"] == 1.0
    assert found.metrics["rm_eval/subset/math_accuracy"] == 0.25
    assert found.subsets["math"] == {"num_pairs": 2, "accuracy": 0.25}
    assert metric_name("???") == "unnamed"


def test_the_calibration_error_is_told_for_probabilities_only():
    # sigmoid(1) = 0.731 and sigmoid(2) = 0.881: one right and one wrong, in a bin each.
    examples = [scored([1.0, 0.0], pairs=(Pair(0, 1),)), scored([2.0, 0.0], pairs=(Pair(1, 0),))]
    found = report(examples)
    assert found.metrics["rm_eval/ece"] == pytest.approx((1 - 0.7310586 + 0.8807971) / 2)
    assert reliability_lists(found.reliability)["counts"] == [1, 1]
    other = report(examples, is_logistic=False)
    assert "rm_eval/ece" not in other.metrics
    assert reliability_lists(other.reliability) == {}


def test_length_correlation_is_taken_within_prompts():
    # Within each prompt the longer response has the lower score; over all responses length and score rise together.
    examples = [scored([2.0, 1.0], ("a", "a b")), scored([12.0, 11.0], ("a b c d", "a b c d e"))]
    assert length_correlation(examples) == pytest.approx(-1)
    alone = [scored([1.0], ("a",)), scored([2.0], ("a b",)), scored([3.0], ("a b c",))]
    assert length_correlation(alone) == pytest.approx(1)


def test_a_ranking_is_compared_prompt_by_prompt_with_the_unplaced_last():
    examples = [
        scored([3.0, 2.0, 1.0], ranks=np.array([1.0, 2.0, np.nan])),
        scored([1.0, 2.0, 3.0], ranks=np.array([1.0, 2.0, 3.0])),
    ]
    assert report(examples).metrics["rm_eval/ranking_spearman"] == pytest.approx(0.0)  # 1 and -1


def test_attributes_are_correlated_one_by_one_without_missing_targets():
    targets = np.array([[1.0, np.nan], [2.0, 5.0], [3.0, 4.0]])
    examples = [scored([0.0] * 3, targets=targets, outputs=np.array([[1.0, 9.0], [2.0, 1.0], [4.0, 2.0]]))]
    metrics = report(examples, attributes=("Help", "Truth")).metrics
    assert metrics["rm_eval/attribute/help_spearman"] == pytest.approx(1)
    assert metrics["rm_eval/attribute/truth_spearman"] == pytest.approx(-1)
    assert metrics["rm_eval/spearman"] == pytest.approx(0)


def test_members_that_differ_in_scale_and_offset_alone_do_not_disagree():
    member = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(disagreement(np.stack([member, 10 * member + 3], axis=1)), 0, atol=1e-12)
    np.testing.assert_allclose(disagreement(np.array([[1.0, -1.0], [-1.0, 1.0]])), [1, 1])
    outputs = np.array([[2.0, 0.0], [1.0, 1.0]])
    metrics = report([scored([1.0, 1.0], outputs=outputs, pairs=(Pair(0, 1),))], members=2).metrics
    assert metrics["rm_eval/member/0_accuracy"] == 1
    assert metrics["rm_eval/member/1_accuracy"] == 0


def test_steps_count_where_they_are_labelled_and_the_first_error_where_it_is():
    nan = np.nan
    examples = [
        scored([0.0], step_labels=(np.array([1.0, 0.0, nan]),), step_probs=(np.array([0.9, 0.2, 0.1]),)),
        scored([0.0], step_labels=(np.array([1.0, 1.0]),), step_probs=(np.array([0.9, 0.4]),)),
        scored([0.0], step_labels=(np.array([1.0]),), step_probs=(np.array([0.8]),)),
    ]
    metrics = report(examples).metrics
    assert metrics["rm_eval/step_accuracy"] == pytest.approx(4 / 5)
    assert metrics["rm_eval/first_error_f1"] == pytest.approx(2 / 3)  # 1 on errors, 1/2 without


def test_a_number_that_does_not_exist_is_not_reported():
    metrics = report([scored([1.0, 1.0], ("a", "b"))]).metrics
    assert set(metrics) == {"rm_eval/score_mean", "rm_eval/score_std"}
