"""Whether the settings of a reward graph make sense together. Keys are dotted; texts give value, reason and remedy."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import regex

from raylhf.config import reward as graph
from raylhf.config import reward_leaves as leaves
from raylhf.config.reward import RewardConfig, RewardPlaneConfig, walk

Found = Iterator[tuple[str, str]]
"""Keys and what is wrong with them."""

WITH_MEMBERS = ("ensemble", "multi_value")
"""Leaves that count by their members in a node that compares members."""
WITH_CALIBRATION = ("explicit", "token_level")
"""Leaves whose folder may hold a calibration file."""


def find_reward_problems(plane: RewardPlaneConfig, key: str = "reward.graph", *, held_out: int) -> Found:
    """Every problem of the graph, from the top down.

    Args:
        plane: whose graph is checked.
        key: of the graph in the file.
        held_out: prompts whose responses can serve as a reference before the first step; 0 means none.
    """
    for place, node in walk(plane.graph, key):
        if isinstance(node, graph.CalibrateReward):
            yield from _check_calibrate(node, place, held_out)
        yield from _check_parts(node, place)
        yield from CHECKS.get(type(node), _nothing)(node, place)


def _nothing(node: Any, key: str) -> Found:
    yield from ()


def _check_parts(node: RewardConfig, key: str) -> Found:
    names = [part.name for part in getattr(node, "parts", ())]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"{key}.parts.{i}.name", f"{name!r} names two parts, which are logged by name"
    weights = [getattr(part, "weight", 1.0) for part in getattr(node, "parts", ())]
    if weights and not any(weights):
        yield f"{key}.parts", "have weight 0 throughout, by which every score is 0; weigh at least one part"


def _check_pattern(pattern: str, key: str) -> Found:
    try:
        regex.compile(pattern)
    except regex.error as error:
        yield key, f"is {pattern!r}, which is no regular expression: {error}"


def _check_length(node: leaves.LengthReward, key: str) -> Found:
    if node.min_words > node.max_words:
        yield f"{key}.min_words", f"is {node.min_words}, more than max_words = {node.max_words}; no length would fit"


def _check_overlong(node: leaves.OverlongReward, key: str) -> Found:
    if node.buffer >= node.max_tokens:
        yield (
            f"{key}.buffer",
            f"is {node.buffer}, not less than max_tokens = {node.max_tokens}: the shortest response would be punished; "
            "lower it (a fifth of max_tokens is usual)",
        )


def _check_regex(node: leaves.RegexReward, key: str) -> Found:
    yield from _check_pattern(node.pattern, f"{key}.pattern")


def _check_answer(node: leaves.AnswerReward, key: str) -> Found:
    if node.pattern is None:
        return
    problems = list(_check_pattern(node.pattern, f"{key}.pattern"))
    yield from problems
    if not problems and regex.compile(node.pattern).groups == 0:
        yield f"{key}.pattern", f"is {node.pattern!r}, which has no group; put the answer's part in parentheses"


def _check_json(node: leaves.JsonReward, key: str) -> Found:
    if node.json_schema is None:
        return
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(node.json_schema)
    except SchemaError as error:
        yield f"{key}.json_schema", f"is no JSON Schema (draft 2020-12): {error.message}"


def _check_function(node: leaves.FunctionReward, key: str) -> Found:
    if not all(node.path.partition(":")):
        yield f"{key}.path", f"is {node.path!r}; write package.module:function"


def _check_remote(node: leaves.RemoteReward, key: str) -> Found:
    if node.token_env is not None and node.token_file is not None:
        yield (
            f"{key}.token_file",
            f"is {node.token_file!r}, but token_env is {node.token_env!r}; give the bearer token by one of them",
        )


def _check_multi_value(node: leaves.MultiValueReward, key: str) -> Found:
    if node.weights is not None and not any(node.weights.values()):
        yield (
            f"{key}.weights",
            f"is {node.weights}, by which every score is 0; weigh an attribute, or leave it null for the mean",
        )


def _check_members(node: Any, key: str) -> Found:
    if len(node.parts) == 1 and node.parts[0].reward.kind not in WITH_MEMBERS:
        yield (
            f"{key}.parts",
            f"holds one {node.parts[0].reward.kind} reward, but kind: {node.kind} compares several; add parts, or use "
            f"a reward with members ({' or '.join(WITH_MEMBERS)})",
        )


def _check_tchebycheff(node: graph.TchebycheffReward, key: str) -> Found:
    if len(node.ideal) != len(node.parts):
        yield (
            f"{key}.ideal",
            f"has {len(node.ideal)} values for {len(node.parts)} parts; give one for each, in their order",
        )
    for i, part in enumerate(node.parts):
        if part.weight < 0:
            yield f"{key}.parts.{i}.weight", f"is {part.weight:g}, but a distance from the ideal has no negative weight"


def _check_gate(node: graph.GateReward, key: str) -> Found:
    names = [part.name for part in node.parts]
    if node.weights_key is None and not node.rules and node.path is None:
        yield key, "is a gate without weights_key, rules or path: its weights are constant; add one, or use kind: sum"
    if node.path is None and node.temperature != 1.0:
        yield (
            f"{key}.temperature",
            f"is {node.temperature:g}, but there is no path of a classifier whose outputs it divides",
        )
    for i, rule in enumerate(node.rules):
        yield from _check_pattern(rule.pattern, f"{key}.rules.{i}.pattern")
        for name in rule.weights.keys() - set(names):
            yield f"{key}.rules.{i}.weights", _no_such_part(name, names)
        if not any(rule.weights.values()):
            yield (
                f"{key}.rules.{i}.weights",
                f"is {rule.weights}, by which no part scores such prompts; weigh at least one part",
            )


def _check_route(node: graph.RouteReward, key: str) -> Found:
    names = [part.name for part in node.parts]
    if node.key is None and not node.rules:
        yield key, "is a route without key or rules: nothing chooses a part; add one of them"
    if node.default is not None and node.default not in names:
        yield f"{key}.default", _no_such_part(node.default, names)
    for i, rule in enumerate(node.rules):
        yield from _check_pattern(rule.pattern, f"{key}.rules.{i}.pattern")
        if rule.part not in names:
            yield f"{key}.rules.{i}.part", _no_such_part(rule.part, names)


def _no_such_part(name: str, names: Sequence[str]) -> str:
    return f"names {name!r}, which is no part; the parts are {', '.join(names)}"


def _check_veto(node: graph.VetoReward, key: str) -> Found:
    below: Any = node.reward
    while hasattr(below, "reward"):  # nodes over one reward have no name in logs
        below = below.reward
    for part in getattr(below, "parts", ()):
        if re.fullmatch(r"rule(_\d+)?", part.name):
            yield f"{key}.reward", f"has a part named {part.name!r}, as a veto's rule is named in logs; rename the part"


def _check_calibrate(node: graph.CalibrateReward, key: str, held_out: int) -> Found:
    if node.source == "given" and node.mean == 0 and node.std == 1:
        yield f"{key}.source", "is given, but mean 0 and std 1 change nothing; set them, or remove the node"
    if node.source != "given":
        for name, default in (("mean", 0.0), ("std", 1.0)):
            if getattr(node, name) != default:
                yield f"{key}.{name}", f"is {getattr(node, name):g}, but source is {node.source}; set source: given"
    if node.clip_to_quantiles and node.source != "model":
        yield (
            f"{key}.clip_to_quantiles",
            f"is true, but source is {node.source}, which has no quantiles; use kind: clip",
        )
    if node.source == "reference" and held_out == 0:
        yield (
            f"{key}.source",
            "is reference, but no prompts are held out whose responses could be scored before the first step; set "
            "data.held_out, or another source",
        )
    if node.source == "model" and node.reward.kind not in WITH_CALIBRATION:
        yield (
            f"{key}.source",
            f"is model, but the {node.reward.kind} reward below has no calibration file; put the node right above a "
            f"model ({', '.join(WITH_CALIBRATION)}), or set source: reference or given",
        )


def _check_clip(node: graph.ClipReward, key: str) -> Found:
    if node.low >= node.high:
        yield f"{key}.low", f"is {node.low:g}, not below high = {node.high:g}: every score would be one number"


CHECKS: dict[type, Callable[[Any, str], Found]] = {
    leaves.LengthReward: _check_length,
    leaves.OverlongReward: _check_overlong,
    leaves.RegexReward: _check_regex,
    leaves.AnswerReward: _check_answer,
    leaves.JsonReward: _check_json,
    leaves.FunctionReward: _check_function,
    leaves.RemoteReward: _check_remote,
    leaves.MultiValueReward: _check_multi_value,
    graph.MinReward: _check_members,
    graph.LowerConfidenceReward: _check_members,
    graph.UncertaintyWeightedReward: _check_members,
    graph.KLDROReward: _check_members,
    graph.TchebycheffReward: _check_tchebycheff,
    graph.GateReward: _check_gate,
    graph.RouteReward: _check_route,
    graph.VetoReward: _check_veto,
    graph.ClipReward: _check_clip,
}
