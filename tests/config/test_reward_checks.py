"""Reward graphs whose settings are each legal but make no sense together."""

import pytest
from rich.console import Console
from rich.tree import Tree

from raylhf.cli.reward_tree import grow
from raylhf.config.reward import RewardPlaneConfig, walk
from raylhf.config.reward_checks import find_reward_problems

A, B = {"kind": "format"}, {"kind": "sentiment"}
MODEL = {"kind": "explicit", "path": "rm"}
ENSEMBLE = {"kind": "ensemble", "paths": ["rm"]}
REMOTE = {"kind": "remote", "url": "http://localhost:8000"}


def node(kind, below=None, **settings):
    return {
        "kind": kind,
        "parts": [{"name": n, "reward": r} for n, r in (below or {"a": A, "b": B}).items()],
        **settings,
    }


def rule(**settings):
    return {"pattern": "x", **settings}


def problems(graph, held_out=8):
    plane = RewardPlaneConfig.model_validate({"graph": graph})
    return [f"{key}: {text}" for key, text in find_reward_problems(plane, held_out=held_out)]


LEGAL = [
    A,
    {"kind": "overlong", "max_tokens": 20, "buffer": 19},
    {"kind": "regex", "pattern": r"\d+"},
    {"kind": "answer", "pattern": "answer: (.*)"},
    {"kind": "json", "json_schema": {"type": "object"}},
    {"kind": "json"},
    REMOTE | {"token_env": "TOKEN"},
    {"kind": "multi_value", "path": "rm", "weights": {"helpful": -1.0}},
    {"kind": "multi_value", "path": "rm"},
    node("sum", {"a": A}),
    {"kind": "sum", "parts": [{"name": "a", "reward": A}, {"name": "logged", "weight": 0, "reward": B}]},
    node("min"),
    node("min", {"e": ENSEMBLE}),
    node("lower_confidence", {"e": {"kind": "multi_value", "path": "rm"}}),
    node("tchebycheff", ideal=[1.0, 0.5]),
    node("gate", rules=[rule(weights={"a": 1.0})]),
    node("gate", path="classifier", temperature=10),
    node("gate", weights_key="w"),
    node("route", rules=[rule(part="b")], default="a"),
    node("route", key="task"),
    {"kind": "veto", "reward": node("sum"), "rule": A},
    {"kind": "veto", "reward": {"kind": "veto", "reward": A, "rule": B}, "rule": A},
    {"kind": "calibrate", "reward": MODEL, "clip_to_quantiles": True},
    {"kind": "calibrate", "source": "given", "mean": 1.0, "reward": A},
    {"kind": "calibrate", "source": "reference", "reward": A},
    {"kind": "clip", "low": 0, "high": 1, "reward": A},
]


@pytest.mark.parametrize("graph", LEGAL, ids=lambda graph: graph["kind"])
def test_a_graph_that_makes_sense_has_no_problem(graph):
    assert problems(graph) == []


REFUSED = [
    ({"kind": "length", "min_words": 9, "max_words": 3}, ".min_words: is 9, more than max_words = 3"),
    ({"kind": "overlong", "max_tokens": 20, "buffer": 20}, ".buffer: is 20, not less than max_tokens = 20"),
    ({"kind": "regex", "pattern": "("}, ".pattern: is '(', which is no regular expression"),
    ({"kind": "answer", "pattern": "["}, ".pattern: is '[', which is no regular expression"),
    ({"kind": "answer", "pattern": "answer"}, ".pattern: is 'answer', which has no group"),
    ({"kind": "json", "json_schema": {"type": "objekt"}}, ".json_schema: is no JSON Schema"),
    ({"kind": "function", "path": "mine.score"}, ".path: is 'mine.score'; write package.module:function"),
    (REMOTE | {"token_env": "T", "token_file": "f"}, ".token_file: is 'f', but token_env is 'T'"),
    ({"kind": "multi_value", "path": "rm", "weights": {}}, ".weights: is {}, by which every score is 0"),
    ({"kind": "multi_value", "path": "rm", "weights": {"a": 0.0}}, ".weights: is {'a': 0.0}, by which"),
    (node("min", {"a": A}), ".parts: holds one format reward, but kind: min compares several"),
    (node("lower_confidence", {"m": MODEL}), ".parts: holds one explicit reward, but kind: lower_confidence"),
    (node("uncertainty_weighted", {"m": MODEL}), "but kind: uncertainty_weighted compares several"),
    (node("kl_dro", {"m": MODEL}), "but kind: kl_dro compares several"),
    (node("tchebycheff", ideal=[1.0]), ".ideal: has 1 values for 2 parts"),
    (
        {"kind": "tchebycheff", "ideal": [1.0], "parts": [{"name": "a", "weight": -1.0, "reward": A}]},
        ".parts.0.weight: is -1, but a distance",
    ),
    (node("gate"), ": is a gate without weights_key, rules or path"),
    (node("gate", weights_key="w", temperature=10), ".temperature: is 10, but there is no path"),
    (node("gate", rules=[rule(weights={"a": 1}), rule(weights={"c": 1})]), ".rules.1.weights: names 'c', which is no"),
    (node("gate", rules=[rule(weights={})]), ".rules.0.weights: is {}, by which no part scores such prompts"),
    (node("gate", rules=[rule(weights={"a": 0, "b": 0})]), ".rules.0.weights: is {'a': 0.0, 'b': 0.0}, by which"),
    ({"kind": "sum", "parts": [{"name": "a", "weight": 0, "reward": A}]}, ".parts: have weight 0 throughout"),
    (
        {"kind": "gate", "weights_key": "w", "parts": [{"name": n, "weight": 0, "reward": A} for n in "ab"]},
        ".parts: have weight 0 throughout",
    ),
    (node("gate", rules=[{"pattern": "*", "weights": {"a": 1}}]), ".rules.0.pattern: is '*', which is no regular"),
    (node("route"), ": is a route without key or rules"),
    (node("route", key="k", default="c"), ".default: names 'c', which is no part; the parts are a, b"),
    (node("route", rules=[rule(part="c")]), ".rules.0.part: names 'c'"),
    (node("route", rules=[{"pattern": "(", "part": "a"}]), ".rules.0.pattern: is '(', which is no regular"),
    (
        {"kind": "veto", "reward": {"kind": "whiten", "reward": node("sum", {"rule": A})}, "rule": B},
        ".reward: has a part named 'rule'",
    ),
    ({"kind": "calibrate", "source": "given", "reward": A}, ".source: is given, but mean 0 and std 1 change nothing"),
    ({"kind": "calibrate", "mean": 2.0, "reward": MODEL}, ".mean: is 2, but source is model; set source: given"),
    (
        {"kind": "calibrate", "source": "given", "mean": 2.0, "clip_to_quantiles": True, "reward": MODEL},
        ".clip_to_quantiles: is true, but source is given",
    ),
    ({"kind": "calibrate", "reward": A}, ".source: is model, but the format reward below has no calibration file"),
    ({"kind": "calibrate", "reward": {"kind": "whiten", "reward": MODEL}}, "but the whiten reward below"),
    ({"kind": "clip", "low": 1, "high": 1, "reward": A}, ".low: is 1, not below high = 1"),
    (node("sum", {"a": {"kind": "regex", "pattern": "("}}), ".parts.0.reward.pattern: is '('"),
    ({"kind": "veto", "reward": A, "rule": {"kind": "regex", "pattern": "("}}, ".rule.pattern: is '('"),
    ({"kind": "sum", "parts": [{"name": "a", "reward": A}] * 2}, ".parts.1.name: 'a' names two parts"),
    ({"kind": "route", "key": "k", "parts": [{"name": "a", "reward": A}] * 2}, ".parts.1.name: 'a' names two parts"),
]


@pytest.mark.parametrize(("graph", "expected"), REFUSED, ids=[expected[:50] for _, expected in REFUSED])
def test_a_graph_that_cannot_work_is_refused_with_key_and_reason(graph, expected):
    (problem,) = problems(graph)
    assert problem.startswith("reward.graph")
    assert expected in problem


def test_a_reference_needs_held_out_prompts():
    (problem,) = problems({"kind": "calibrate", "source": "reference", "reward": A}, held_out=0)
    assert "reward.graph.source: is reference, but no prompts are held out" in problem


def test_every_problem_of_a_graph_is_found():
    below = {"a": {"kind": "regex", "pattern": "("}, "b": {"kind": "function", "path": "f"}}
    keys = [problem.split(": ")[0] for problem in problems(node("route", below, default="c"))]
    assert keys == [
        "reward.graph",
        "reward.graph.default",
        "reward.graph.parts.0.reward.pattern",
        "reward.graph.parts.1.reward.path",
    ]


def test_the_graphs_problems_are_among_those_of_a_run(build):
    from raylhf.config.checks import check_config

    graph = node("sum", {"a": {"kind": "calibrate", "source": "reference", "reward": A}})
    run = {"reward.graph": graph, "data.held_out": 0, "evaluation.every_steps": 0}
    (problem,) = check_config(build(run))
    assert problem.startswith("reward.graph.parts.0.reward.source: is reference")


def drawn(graph):
    config = RewardPlaneConfig.model_validate({"graph": graph}).graph
    tree = Tree("Reward")
    grow(tree, config, "")
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(tree)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_graph_is_drawn_as_a_tree_with_weights_rules_and_settings():
    math = {"kind": "regex", "pattern": "[bold]", "on_failure": "raise"}
    routed = node(
        "route",
        {"math": math, "chat": {"kind": "characters", "characters": "ab"}},
        rules=[{"pattern": "[0-9]", "part": "math"}],
    )
    gated = node("gate", {"x": A, "y": B}, rules=[rule(weights={"x": 0.5, "y": 2})])
    graph = {"kind": "veto", "rule": A, "reward": node("sum", {"routed": routed, "gated": gated})}
    assert drawn(graph) == [
        "Reward",
        "\u2514\u2500\u2500 veto (below=0.5, cap=0)",
        "    \u251c\u2500\u2500 sum",
        "    \u2502   \u251c\u2500\u2500 1 x routed: route",
        "    \u2502   \u2502   \u251c\u2500\u2500 where the prompt matches '[0-9]': math",
        "    \u2502   \u2502   \u251c\u2500\u2500 math: regex (on_failure='raise', pattern='[bold]', whole=False)",
        "    \u2502   \u2502   \u2514\u2500\u2500 chat: characters (characters='ab')",
        "    \u2502   \u2514\u2500\u2500 1 x gated: gate",
        "    \u2502       \u251c\u2500\u2500 where the prompt matches 'x': 0.5 x x, 2 x y",
        "    \u2502       \u251c\u2500\u2500 1 x x: format",
        "    \u2502       \u2514\u2500\u2500 1 x y: sentiment",
        "    \u2514\u2500\u2500 rule: format",
    ]


@pytest.mark.parametrize(("temperature", "shown"), [(0.1, False), (1.0, True)])
def test_a_setting_of_many_kinds_is_drawn_where_it_is_not_the_default_of_its_kind(temperature, shown):
    line = drawn({"kind": "process", "path": "rm", "temperature": temperature})[1]
    assert (f"temperature={temperature:g}" in line) == shown


@pytest.mark.parametrize("graph", LEGAL, ids=lambda graph: graph["kind"])
def test_every_node_is_drawn_once(graph):
    nodes = list(walk(RewardPlaneConfig.model_validate({"graph": graph}).graph, "reward.graph"))
    rules = len(graph.get("rules", ()))
    assert len(drawn(graph)) == 1 + len(nodes) + rules
