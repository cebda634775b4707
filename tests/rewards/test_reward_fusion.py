from typing import Literal

import numpy as np
import pytest
from pydantic import TypeAdapter

from raylhf.batch import RewardOutput
from raylhf.config.reward import RewardConfig
from raylhf.rewards.build import build_reward
from raylhf.rewards.fusion import WeightedSum


class GivenReward:
    """Returns the scores it was made with."""

    def __init__(self, *scores, valid=None, arity: Literal["point", "group"] = "point", token_scores=None, errors=()):
        self.arity: Literal["point", "group"] = arity
        valid = np.isfinite(scores) if valid is None else np.array(valid)
        self.output = RewardOutput(
            scores=np.array(scores, dtype=float), valid=valid, token_scores=token_scores, errors=errors
        )

    def score(self, rollouts):
        return self.output


def characters(name, weight, wanted):
    return {"name": name, "weight": weight, "reward": {"kind": "characters", "characters": wanted}}


def test_a_sum_weighs_its_parts_and_names_nested_ones_with_a_slash(rollouts_of):
    inner = {"name": "style", "weight": 0.5, "reward": {"kind": "sum", "parts": [characters("b", 2.0, "b")]}}
    config = {"kind": "sum", "parts": [characters("a", 3.0, "a"), inner]}
    output = build_reward(TypeAdapter(RewardConfig).validate_python(config)).score(rollouts_of("aabb", "abbb"))
    # a: 1/2, 1/4; b: 1/2, 3/4; style = 2 b: 1, 3/2; total = 3 a + style / 2.
    assert output.scores.tolist() == [2.0, 1.5]
    assert {name: scores.tolist() for name, scores in output.parts.items()} == {
        "a": [0.5, 0.25],
        "style": [1.0, 1.5],
        "style/b": [0.5, 0.75],
    }


def test_a_sum_is_invalid_where_any_part_is_and_passes_the_sentences_on(rollouts_of):
    first = GivenReward(1.0, np.nan, 3.0, errors=("rule: prompt 11: no",))
    second = GivenReward(4.0, 5.0, np.nan, errors=("judge: prompt 12: no",))
    output = WeightedSum({"x": (1.0, first), "y": (-1.0, second)}).score(rollouts_of("", "", ""))
    assert output.valid.tolist() == [True, False, False]
    np.testing.assert_array_equal(output.scores, [-3.0, np.nan, np.nan])
    assert output.errors == ("x: rule: prompt 11: no", "y: judge: prompt 12: no")


def test_a_weight_of_zero_does_not_hide_a_failure(rollouts_of):
    output = WeightedSum({"x": (0.0, GivenReward(np.nan)), "y": (1.0, GivenReward(2.0))}).score(rollouts_of("a"))
    assert not output.valid.any()
    assert np.isnan(output.scores).all()


def test_a_part_that_calls_infinity_valid_is_corrected(rollouts_of):
    output = WeightedSum({"x": (1.0, GivenReward(np.inf, 1.0, valid=[True, True]))}).score(rollouts_of("a", "b"))
    assert output.valid.tolist() == [False, True]
    assert output.errors == ("x: GivenReward: 1 scores are called valid and are not finite",)


def test_a_part_with_the_wrong_number_of_scores_makes_every_response_invalid(rollouts_of):
    output = WeightedSum({"x": (1.0, GivenReward(1.0, 2.0)), "y": (1.0, GivenReward(1.0))}).score(rollouts_of("a", "b"))
    assert output.valid.tolist() == [False, False]
    assert output.errors == ("y: GivenReward: 1 scores for 2 responses",)
    assert list(output.parts) == ["x", "y"]


def test_dense_scores_are_summed_with_the_same_weights(rollouts_of):
    def dense(*rows):
        return [np.array(row, dtype=np.float32) for row in rows]

    rollouts = rollouts_of("a", "")  # two tokens and one
    parts = {
        "x": (2.0, GivenReward(0.0, 0.0, token_scores=dense([1, 2], [3]))),
        "y": (-1.0, GivenReward(0.0, 0.0, token_scores=dense([1, 0], [1]))),
        "z": (1.0, GivenReward(0.0, 0.0)),
    }
    output = WeightedSum(parts).score(rollouts)
    assert output.token_scores is not None
    assert [scores.tolist() for scores in output.token_scores] == [[1.0, 4.0], [5.0]]


def test_a_sum_needs_whole_groups_as_soon_as_one_part_does():
    point, group = GivenReward(0.0), GivenReward(0.0, arity="group")
    assert WeightedSum({"x": (1.0, point)}).arity == "point"
    assert WeightedSum({"x": (1.0, point), "y": (1.0, group)}).arity == "group"


def test_two_parts_of_one_name_are_refused():
    config = {"kind": "sum", "parts": [characters("a", 1.0, "a"), characters("a", 1.0, "b")]}
    with pytest.raises(ValueError, match="a is repeated"):
        build_reward(TypeAdapter(RewardConfig).validate_python(config))
