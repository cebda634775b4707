import math

import numpy as np

from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards.worker import RewardWorker


def worker(penalty=1.0, clip=None, **graph):
    graph = graph or {"kind": "characters", "characters": "a"}
    config = RewardPlaneConfig.model_validate({"graph": graph, "missing_eos_penalty": penalty, "clip": clip})
    started = RewardWorker(config)
    started.start()
    return started


def test_the_penalty_meets_truncated_responses_only_and_the_clip_comes_after_it(rollouts_of):
    rollouts = rollouts_of("aaab", "aaab", "bbbb", truncated=[1, 2])
    assert worker(penalty=1.0).score(rollouts)[0].scores.tolist() == [0.75, -0.25, -1.0]
    # Clipped first, the second would be 0.5 - 1 = -0.5.
    assert worker(penalty=1.0, clip=0.5).score(rollouts)[0].scores.tolist() == [0.5, -0.25, -0.5]


def test_the_summary_is_lists_with_a_sentence_for_what_is_invalid(rollouts_of):
    output, summary = worker().score(rollouts_of("aaaa", "aabb", "aaaa", empty=[2]))
    assert output.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(output.scores, [1.0, 0.5, np.nan])
    assert summary.pop("seconds") >= 0
    assert summary["scores"][:2] == [1.0, 0.5]
    assert math.isnan(summary.pop("scores")[2])
    assert summary == {
        "valid": [True, True, False],
        "parts": {},
        "errors": ("1 of 3 responses have no tokens and are not scored",),
    }


def test_the_summarys_parts_are_raw_and_the_penalty_is_on_the_sum_alone(rollouts_of):
    part = {"name": "a_share", "weight": 2.0, "reward": {"kind": "characters", "characters": "a"}}
    _, summary = worker(kind="sum", parts=[part]).score(rollouts_of("ab", truncated=[0]))
    assert summary["scores"] == [0.0]
    assert summary["parts"] == {"a_share": [0.5]}


def test_a_response_of_an_end_token_alone_is_scored(rollouts_of):
    output, _ = worker().score(rollouts_of(""))
    assert output.valid.tolist() == [True]
    assert output.scores.tolist() == [0.0]


def test_a_batch_without_one_valid_score_has_three_sentences_at_most(rollouts_of):
    output, summary = worker(kind="function", path="math:sqrt").score(rollouts_of("a", "b", "c", "d", truncated=[0]))
    assert not output.valid.any()
    assert np.isnan(output.scores).all()
    assert len(output.errors) == 4
    assert len(summary["errors"]) == 3
    assert summary["errors"][0].startswith("math:sqrt: prompt 10: TypeError")


def test_no_responses_are_no_error(rollouts_of):
    output, summary = worker().score(rollouts_of())
    assert len(output.scores) == 0
    assert summary["scores"] == summary["valid"] == []
