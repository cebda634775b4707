import math

import numpy as np

from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards.worker import RewardWorker


def worker(penalty=1.0, clip=None, **graph):
    graph = graph or {"kind": "characters", "characters": "a"}
    return RewardWorker(
        RewardPlaneConfig.model_validate({"graph": graph, "missing_eos_penalty": penalty, "clip": clip})
    )


def test_the_penalty_meets_truncated_responses_only_and_the_clip_comes_after_it(rollouts_of):
    rollouts = rollouts_of("aaab", "aaab", "bbbb", truncated=[1, 2])
    assert worker(penalty=1.0).score(rollouts)[0].scores.tolist() == [0.75, -0.25, -1.0]
    # Clipped first, the second would be 0.5 - 1 = -0.5.
    assert worker(penalty=1.0, clip=0.5).score(rollouts)[0].scores.tolist() == [0.5, -0.25, -0.5]


def test_the_summary_counts_what_is_invalid_and_averages_what_is_not(rollouts_of):
    output, summary = worker().score(rollouts_of("aaaa", "aabb", "aaaa", empty=[2]))
    assert output.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(output.scores, [1.0, 0.5, np.nan])
    assert summary.pop("seconds") >= 0
    assert summary == {
        "num_responses": 3,
        "num_invalid": 1,
        "errors": ("1 of 3 responses have no tokens and are not scored",),
        "score_mean": 0.75,
    }


def test_a_response_of_an_end_token_alone_is_scored(rollouts_of):
    output, _ = worker().score(rollouts_of(""))
    assert output.valid.tolist() == [True] and output.scores.tolist() == [0.0]


def test_a_batch_without_one_valid_score_has_no_mean_and_three_sentences_at_most(rollouts_of):
    output, summary = worker(kind="function", path="math:sqrt").score(rollouts_of("a", "b", "c", "d", truncated=[0]))
    assert not output.valid.any() and np.isnan(output.scores).all()
    assert len(output.errors) == 4 and len(summary["errors"]) == 3
    assert summary["num_invalid"] == 4 and math.isnan(summary["score_mean"])
    assert summary["errors"][0].startswith("math:sqrt: prompt 10: TypeError")


def test_no_responses_are_no_error(rollouts_of):
    output, summary = worker().score(rollouts_of())
    assert len(output.scores) == 0 and summary["num_responses"] == summary["num_invalid"] == 0
