"""From settings to a reward graph."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pydantic import TypeAdapter

from raylhf.batch import RewardOutput
from raylhf.config.reward import RewardConfig
from raylhf.rewards.build import LEAF_BUILDERS, NODE_BUILDERS, BuildContext, build_reward, can_be_dense
from raylhf.rewards.state import RewardState

A, B = {"kind": "characters", "characters": "a"}, {"kind": "characters", "characters": "b"}


def config_of(settings):
    return TypeAdapter(RewardConfig).validate_python(settings)


def build(settings, **context):
    return build_reward(config_of(settings), BuildContext(**context))


def parts(**rewards):
    return [{"name": name, "reward": reward} for name, reward in rewards.items()]


def node(kind, below=None, **settings):
    return {"kind": kind, "parts": parts(**(below or {"a": A, "b": B})), **settings}


# Of "aab": a = 2/3, b = 1/3; mean 1/2, sample variance 1/18.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (node("sum"), 1.0),
        (node("min"), 1 / 3),
        (node("lower_confidence", coef=2.0), 0.5 - 2 * np.sqrt(1 / 18)),
        (node("uncertainty_weighted", coef=0.5), 0.5 - 0.5 / 18),
        (node("kl_dro", beta=1.0), -np.log((np.exp(-2 / 3) + np.exp(-1 / 3)) / 2)),
        (node("tchebycheff", ideal=[1.0, 1.0]), -2 / 3),
        (node("gate", rules=[{"pattern": "question", "weights": {"b": 6.0}}]), 2.0),
        (node("adaptive"), 1.0),
        (node("route", rules=[{"pattern": "question 0", "part": "b"}]), 1 / 3),
        ({"kind": "veto", "reward": A, "rule": B, "below": 0.5, "cap": 0.25}, 0.25),
        ({"kind": "calibrate", "source": "given", "mean": 0.5, "std": 0.5, "reward": A}, 1 / 3),
        ({"kind": "calibrate", "source": "reference", "reward": A}, 2 / 3),
        ({"kind": "whiten", "reward": A}, 2 / 3),
        ({"kind": "clip", "reward": A, "low": 0.0, "high": 0.5}, 0.5),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_every_node_is_built_from_its_settings(settings, expected, rollouts_of):
    output = build(settings).score(rollouts_of("aab"))
    assert_allclose(output.scores, [expected])


def test_every_kind_is_a_leaf_or_a_node_and_has_one_builder():
    kinds = TypeAdapter(RewardConfig).json_schema()["discriminator"]["mapping"].keys()
    assert not LEAF_BUILDERS.keys() & NODE_BUILDERS.keys()
    assert LEAF_BUILDERS.keys() | NODE_BUILDERS.keys() == kinds


def test_nodes_nest_freely_and_sources_are_named_by_their_path_of_parts(rollouts_of):
    inner = {"kind": "clip", "reward": node("sum", {"quality": A, "tone": B}), "low": -1, "high": 1}
    graph = {"kind": "veto", "reward": node("sum", {"helpful": inner, "plain": A}), "rule": B, "below": -1}
    state = RewardState()
    output = build(graph, state=state).score(rollouts_of("aab"))
    assert sorted(call.source for call in state.take_calls()) == ["helpful/quality", "helpful/tone", "plain", "rule"]
    assert sorted(output.parts) == ["helpful", "helpful/quality", "helpful/tone", "plain", "rule"]


def test_a_leaf_that_is_the_whole_graph_is_named_by_its_kind(rollouts_of):
    state = RewardState()
    build({"kind": "whiten", "reward": A}, state=state).score(rollouts_of("a"))
    assert [call.source for call in state.take_calls()] == ["characters"]


def test_vetoes_above_one_reward_name_their_rules_apart(rollouts_of):
    lower = {"kind": "veto", "reward": A, "rule": B}
    state = RewardState()
    output = build({"kind": "veto", "reward": lower, "rule": A}, state=state).score(rollouts_of("aab"))
    assert {name: scores.tolist() for name, scores in output.parts.items()} == {"rule": [2 / 3], "rule_2": [1 / 3]}
    assert [call.source for call in state.take_calls()] == ["characters", "rule_2", "rule"]


def test_memory_is_kept_by_the_place_in_the_settings():
    below = {"helpful": {"kind": "whiten", "reward": A}, "b": {"kind": "calibrate", "source": "reference", "reward": B}}
    state = RewardState()
    build({"kind": "clip", "low": 0, "high": 1, "reward": node("adaptive", below)}, state=state)
    assert sorted(state.state_dict()) == [
        "graph.reward.parts.b",
        "graph.reward.parts.b.reward",
        "graph.reward.parts.helpful",
        "graph.reward.parts.helpful.reward",
    ]


def test_the_policy_of_a_leaf_is_the_one_of_its_settings(rollouts_of):
    failing = {"kind": "function", "path": "math:sqrt", "on_failure": "resample"}
    output = build(node("sum", {"a": A, "f": failing})).score(rollouts_of("aab"))
    assert output.resample is not None
    assert output.resample.tolist() == [True]


def test_two_parts_of_one_name_are_refused():
    twice = {"kind": "sum", "parts": [*parts(a=A), *parts(a=B)]}
    with pytest.raises(ValueError, match="a is repeated"):
        build(twice)


def test_ideals_that_do_not_match_the_parts_are_refused():
    with pytest.raises(ValueError, match=r"graph\.ideal has 1 values for 2 parts"):
        build(node("tchebycheff", ideal=[1.0]))


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a route rule's pattern="):
        build(node("route", rules=[{"pattern": "(", "part": "a"}]))


def test_calibration_by_a_model_without_one_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"graph\.source is model, but the characters reward below.*set source"):
        build({"kind": "calibrate", "reward": A})


class StandInModel:
    """A reward model that scores by length, with a calibration."""

    calibration = SimpleNamespace(mean=(2.0, 9.0), std=(4.0, 9.0), q01=(0.0, 9.0), q99=(6.0, 9.0))

    def __init__(self, config, context):
        self.config, self.context = config, context

    def score(self, rollouts):
        scores = np.array([float(len(text)) for text in rollouts.response_texts])
        return RewardOutput(scores=scores, valid=np.ones(len(scores), dtype=bool))


class StandInClassifier:
    def __init__(self, path, *, temperature, num_outputs, context):
        self.row = [temperature, *[0.0] * (num_outputs - 1)]

    def weights(self, prompts):
        return np.array([self.row] * len(prompts)), {}


@pytest.fixture
def stand_in_models(monkeypatch):
    """Model leaves without models."""
    module = ModuleType("raylhf.rewards.model_leaves")
    for name in ("Explicit", "TokenLevel", "Process", "Ensemble", "MultiValue", "Implicit"):
        setattr(module, f"{name}ModelReward", StandInModel)
    setattr(module, "PromptClassifier", StandInClassifier)  # noqa: B010
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("raylhf.rewards.model_leaves", module, raising=False)


@pytest.mark.usefixtures("stand_in_models")
def test_calibration_by_a_model_takes_its_files_numbers(rollouts_of):
    settings = {"kind": "calibrate", "reward": {"kind": "explicit", "path": "rm"}}
    rollouts = rollouts_of("xx", "x" * 10)
    assert build(settings).score(rollouts).scores.tolist() == [0.0, 2.0]
    assert build(settings | {"clip_to_quantiles": True}).score(rollouts).scores.tolist() == [0.0, 1.0]


@pytest.mark.usefixtures("stand_in_models")
def test_a_gates_classifier_is_built_with_one_output_a_part(rollouts_of):
    gate = node("gate", path="classifier", temperature=0.5)
    assert_allclose(build(gate).score(rollouts_of("aab")).scores, [0.5 * 2 / 3])


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ({"kind": "token_level", "path": "rm"}, True),
        ({"kind": "process", "path": "rm"}, True),
        ({"kind": "implicit", "policy": "p", "reference": "r", "form": "token"}, True),
        ({"kind": "implicit", "policy": "p", "reference": "r"}, False),
        ({"kind": "explicit", "path": "rm"}, False),
        (A, False),
    ],
)
def test_a_graph_is_dense_where_one_leaf_is(leaf, expected):
    graph = {"kind": "clip", "low": 0, "high": 1, "reward": node("sum", {"a": A, "x": leaf})}
    assert can_be_dense(config_of(leaf)) is expected
    assert can_be_dense(config_of(graph)) is expected
