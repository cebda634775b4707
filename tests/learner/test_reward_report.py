"""The numbers of an evaluation, on scores made by hand."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from raylhf.batch import Pair, RewardExample
from raylhf.config.reward_model import BradleyTerryLoss, MSELoss, RewardLoss
from raylhf.learner.reward_report import (
    ScoredExample,
    disagreement,
    evaluation_report,
    length_correlation,
    member_disagreement,
    metric_names,
    reliability_lists,
    step_metrics,
)
from raylhf.tracking.catalogue import require_metrics


def scored(scores: list[float], texts: tuple[str, ...] | None = None, **fields) -> ScoredExample:
    values = np.array(scores)
    outputs = fields.pop("outputs", values[:, None])
    probs = fields.pop("step_probs", ())
    responses = texts or tuple("word " * (i + 1) for i in range(len(scores)))
    return ScoredExample(RewardExample(0, (), responses, **fields), values, outputs, probs)


BT = BradleyTerryLoss(kind="bradley_terry")
MSE = MSELoss(kind="mse")


def report(examples, *, members=0, attributes=(), loss: RewardLoss = BT):
    return evaluation_report(examples, loss=loss, members=members, attributes=attributes, num_bins=2)


def test_accuracy_counts_ties_half_and_is_told_by_subset():
    examples = [
        scored([2.0, 1.0], pairs=(Pair(0, 1),), subset="Safety (hard)"),
        scored([1.0, 1.0, 3.0], pairs=(Pair(0, 1), Pair(1, 2)), subset="math"),
    ]
    found = report(examples)
    assert found.metrics["rm_eval/accuracy"] == pytest.approx(0.5)  # right, half, wrong
    assert found.metrics["rm_eval/subset/safety_hard_accuracy"] == 1.0
    assert found.metrics["rm_eval/subset/math_accuracy"] == 0.25


def test_names_that_would_be_called_the_same_stay_apart():
    assert metric_names(["Safety (hard)", "safety-hard", "???", "\u4f60", "safety_hard_2"]) == [
        "safety_hard",
        "safety_hard_2",
        "unnamed",
        "unnamed_2",
        "safety_hard_2_2",
    ]
    pair = (Pair(0, 1),)
    examples = [scored([1.0, 0.0], pairs=pair, subset="\u4f60"), scored([0.0, 1.0], pairs=pair, subset="\u597d")]
    metrics = report(examples).metrics
    assert metrics["rm_eval/subset/unnamed_accuracy"] == 1
    assert metrics["rm_eval/subset/unnamed_2_accuracy"] == 0


def test_the_calibration_error_is_told_for_probabilities_only():
    # sigmoid(1) = 0.731 and sigmoid(2) = 0.881: one right and one wrong, in a bin each.
    examples = [scored([1.0, 0.0], pairs=(Pair(0, 1),)), scored([2.0, 0.0], pairs=(Pair(1, 0),))]
    found = report(examples)
    assert found.metrics["rm_eval/ece"] == pytest.approx((1 - 0.7310586 + 0.8807971) / 2)
    assert reliability_lists(found.reliability)["counts"] == [1, 1]
    other = report(examples, loss=MSE)
    assert "rm_eval/ece" not in other.metrics
    assert reliability_lists(other.reliability) == {}


LN_1_5 = float(np.log(1.5))
"""Gap of a probability of 0.6."""


@pytest.mark.parametrize("kind", ["bradley_terry", "token_aggregate"])
def test_a_model_at_the_minimum_of_its_loss_has_no_calibration_error(kind):
    adapter = TypeAdapter(RewardLoss)
    agreed = [scored([LN_1_5, 0.0], pairs=(Pair(0, 1, agreement=0.6),))] * 200
    assert report(agreed, loss=adapter.validate_python({"kind": kind})).metrics["rm_eval/ece"] == pytest.approx(0)
    # Agreement stands for itself also where labels without it are smoothed.
    smooth = adapter.validate_python({"kind": kind, "label_smoothing": 0.4})
    assert report(agreed, loss=smooth).metrics["rm_eval/ece"] == pytest.approx(0)
    certain = [scored([LN_1_5, 0.0], pairs=(Pair(0, 1),))]
    assert report(certain, loss=smooth).metrics["rm_eval/ece"] == pytest.approx(0)
    assert report(certain, loss=adapter.validate_python({"kind": kind})).metrics["rm_eval/ece"] == pytest.approx(0.4)
    # Gap 2 with margin 2 - ln 1.5, of which 60 % of the raters are behind.
    far = [scored([2.0, 0.0], pairs=(Pair(0, 1, margin=2 - LN_1_5, agreement=0.6),))]
    margin = adapter.validate_python({"kind": kind, "use_margin": True})
    assert report(far, loss=margin).metrics["rm_eval/ece"] == pytest.approx(0)
    unused = report(far, loss=adapter.validate_python({"kind": kind})).metrics["rm_eval/ece"]
    assert unused == pytest.approx(0.8807971 - 0.6)  # sigmoid(2)


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


def test_an_attribute_that_never_varies_does_not_take_the_mean_of_the_others_away():
    targets = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    outputs = np.array([[1.0, 9.0], [2.0, 1.0], [3.0, 2.0]])
    metrics = report([scored([0.0] * 3, targets=targets, outputs=outputs)], attributes=("a", "b")).metrics
    assert metrics["rm_eval/pearson"] == pytest.approx(1)
    assert metrics["rm_eval/spearman"] == pytest.approx(1)
    assert "rm_eval/attribute/b_spearman" not in metrics


def test_members_that_differ_in_scale_and_offset_alone_do_not_disagree():
    member = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(disagreement(np.stack([member, 10 * member + 3], axis=1)), 0, atol=1e-12)
    np.testing.assert_allclose(disagreement(np.array([[1.0, -1.0], [-1.0, 1.0]])), [1, 1])
    outputs = np.array([[2.0, 0.0], [1.0, 1.0]])
    metrics = report([scored([1.0, 1.0], outputs=outputs, pairs=(Pair(0, 1),))], members=2).metrics
    assert metrics["rm_eval/member/0_accuracy"] == 1
    assert metrics["rm_eval/member/1_accuracy"] == 0


def test_each_member_of_an_ensemble_has_its_own_numbers():
    # Standardised, the first two members are (1, -1) and the third (-1, 1).
    outputs = np.array([[2.0, 4.0, 0.0], [1.0, 2.0, 2.0]])
    pair, targets = (Pair(0, 1),), np.array([[5.0], [3.0]])
    examples = [scored([2.0, 5 / 3], outputs=outputs, pairs=pair, targets=targets)]
    np.testing.assert_allclose(member_disagreement(outputs), [1.0, 1.0, 2.0])
    metrics = report(examples, members=3).metrics
    sigmoids = (0.7310586, 0.8807971, 0.8807971)
    errors = (1 - sigmoids[0], 1 - sigmoids[1], sigmoids[2])
    for k in range(3):
        assert metrics[f"rm_eval/member/{k}_ece"] == pytest.approx(errors[k])
        assert metrics[f"rm_eval/member/{k}_disagreement"] == pytest.approx(2.0 if k == 2 else 1.0)
        assert metrics[f"rm_eval/member/{k}_length_correlation"] == pytest.approx(1 if k == 2 else -1)
        assert f"rm_eval/member/{k}_spearman" not in metrics
    regression = report(examples, members=3, loss=MSE).metrics
    assert [regression[f"rm_eval/member/{k}_spearman"] for k in range(3)] == pytest.approx([1, 1, -1])
    assert "rm_eval/member/0_ece" not in regression
    require_metrics([*metrics, *regression])


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


def test_what_nobody_judged_is_no_correct_solution():
    nan = np.nan
    judged = [
        scored([0.0], step_labels=(np.array([1.0, 0.0]),), step_probs=(np.array([0.9, 0.2]),)),
        scored([0.0], step_labels=(np.array([1.0, 1.0]),), step_probs=(np.array([0.9, 0.4]),)),
        # Right as far as it was judged; of what comes then nobody said anything.
        scored([0.0], step_labels=(np.array([1.0, nan]),), step_probs=(np.array([0.8, 0.1]),)),
    ]
    silent = scored([0.0], step_labels=(np.array([nan, nan]),), step_probs=(np.array([0.9, 0.9]),))
    assert step_metrics([*judged, silent]) == step_metrics(judged)
    assert step_metrics(judged)["rm_eval/first_error_f1"] == pytest.approx(2 / 3)  # 1 on errors, 1/2 without
    assert all(np.isnan(value) for value in step_metrics([silent]).values())


def test_a_number_that_does_not_exist_is_not_reported():
    metrics = report([scored([1.0, 1.0], ("a", "b"))]).metrics
    assert set(metrics) == {"rm_eval/score_mean", "rm_eval/score_std"}
