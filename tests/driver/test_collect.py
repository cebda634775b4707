"""What the driver computes from small numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

from raylhf.driver.batch_metrics import batch_metrics, clustered_standard_error
from raylhf.driver.collect import ScoredGroup, response_seed, share_among_ranks


def group(scores, valid=None, lengths=None, truncated=0, parts=None, seconds=(0.5,)):
    lengths = lengths or [4] * len(scores)
    return ScoredGroup(
        rollouts=SimpleNamespace(),
        rewards=SimpleNamespace(),
        rollout_summary={"lengths": lengths, "num_tokens": sum(lengths), "num_truncated": truncated},
        reward_summary={
            "scores": scores,
            "valid": valid or [True] * len(scores),
            "parts": parts or {},
            "errors": ("it broke",) if valid else (),
            "seconds": 0.5,
            "resample": [False] * len(scores),
            "sources": [
                {
                    "source": "quality",
                    "seconds": s,
                    "num_responses": 3,
                    "num_failed": 1,
                    "num_truncated": 2,
                    "score_mean": 4.0 * i,
                    "score_std": 1.0,
                }
                for i, s in enumerate(seconds)
            ],
        },
    )


def test_invalid_scores_are_counted_and_left_out():
    groups = [group([1.0, np.nan], [True, False], lengths=[2, 6]), group([3.0, 5.0], truncated=1)]
    metrics = batch_metrics(groups, area="reward", seconds=4.0)
    assert metrics["reward/score_mean"] == 3.0
    assert metrics["reward/invalid_count"] == 1
    assert metrics["rollout/truncated_frac"] == 0.25
    assert metrics["rollout/num_tokens"] == 16
    assert metrics["rollout/tokens_per_s"] == 4.0
    assert metrics["rollout/response_length_mean"] == 4.0


def test_calls_of_a_leaf_become_latencies_and_failures():
    groups = [group([1.0], seconds=(1.0, 2.0)), group([2.0], seconds=(3.0,))]
    metrics = batch_metrics(groups, area="reward", seconds=1.0)
    assert metrics["reward/source/quality_latency_p50_s"] == 2.0
    assert metrics["reward/source/quality_latency_p95_s"] == pytest.approx(2.9)
    assert metrics["reward/source/quality_failed_count"] == 3
    assert metrics["reward/source/quality_truncated_count"] == 6
    # Two calls around 0 and one around 4, two scores each: mean 4/3, variance 1 + (16 / 3 - 16 / 9).
    assert metrics["reward/source/quality_score_mean"] == pytest.approx(4 / 3)
    assert metrics["reward/source/quality_score_std"] == pytest.approx((1 + 32 / 9) ** 0.5)


def test_a_part_that_does_not_apply_is_left_out_of_its_mean():
    groups = [group([1.0, 2.0, 3.0], parts={"a": [1.0, np.nan, 5.0]}), group([2.0], parts={"a": [np.nan]})]
    metrics = batch_metrics(groups, area="eval")
    assert (metrics["eval/part/a_mean"], metrics["eval/part/a_std"]) == (3.0, 2.0)


def test_a_part_that_a_group_was_not_asked_for_counts_where_it_was():
    metrics = batch_metrics([group([1.0]), group([2.0], parts={"rare": [4.0]})], area="eval")
    assert metrics["eval/part/rare_mean"] == 4.0


def test_a_batch_without_one_valid_score_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="no response of the batch got a valid score .* it broke"):
        batch_metrics([group([np.nan], [False])], area="eval")


def test_the_standard_error_takes_a_prompt_as_one_cluster():
    # Two prompts, means 1 and 3: the error of the mean of two numbers is their deviation / sqrt(2) = sqrt(2) / sqrt(2).
    assert clustered_standard_error([np.array([1.0, 1.0]), np.array([3.0, 3.0])]) == pytest.approx(1.0)
    singles = [np.array([x]) for x in (1.0, 2.0, 4.0)]
    assert clustered_standard_error(singles) == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert clustered_standard_error([np.array([1.0])]) == 0.0


def test_ranks_get_equally_many_groups_and_nearly_equally_many_tokens():
    groups = [group([0.0], lengths=[n]) for n in (9, 1, 8, 2, 7, 3, 6, 4)]
    shares = share_among_ranks(groups, 2)
    assert [len(share) for share in shares] == [4, 4]
    assert [sum(g.rollout_summary["num_tokens"] for g in share) for share in shares] == [20, 20]
    assert {id(g) for share in shares for g in share} == {id(g) for g in groups}


def test_seeds_differ_by_every_part_of_their_key_and_leave_room_for_a_group():
    seeds = {
        response_seed(seed, area, step, place, prompt)
        for seed in (0, 1)
        for area in (0, 1)
        for step in (0, 1)
        for place in (0, 1)
        for prompt in (0, 1)
    }
    assert len(seeds) == 32
    assert all(0 <= seed < 2**31 for seed in seeds)
