"""The reward graph as a tree."""

from typing import Any

from rich.text import Text
from rich.tree import Tree

from raylhf.config.reward import GateRule, RewardConfig

LEFT_OUT = ("kind", "parts", "reward", "rule", "rules")
"""Settings that are drawn as lines of their own, or as the line's first word."""
UNUSUAL_ONLY = ("on_failure", "trust_remote_code", "temperature")
"""Settings of many leaves and nodes that are drawn only where they differ from their default."""


def grow(tree: Tree, node: RewardConfig, label: str) -> None:
    """Add a leaf, or a node with everything below it, to `tree`; `label` says what it is to the node above."""
    branch = tree.add(_line(label + node.kind + _settings(node)))
    for rule in getattr(node, "rules", ()):
        chosen = _mapping(rule.weights) if isinstance(rule, GateRule) else rule.part
        branch.add(_line(f"where the prompt matches {rule.pattern!r}: {chosen}"))
    for part in getattr(node, "parts", ()):
        weight = f"{part.weight:g} x " if hasattr(part, "weight") else ""
        grow(branch, part.reward, f"{weight}{part.name}: ")
    for name, label_below in (("reward", ""), ("rule", "rule: ")):
        if hasattr(node, name):
            grow(branch, getattr(node, name), label_below)


def _settings(node: RewardConfig) -> str:
    """The node's own settings in brackets; those that say nothing are left out."""
    shown = [
        f"{name}={_value(value)}"
        for name in type(node).model_fields
        if name not in LEFT_OUT and not _is_silent(node, name, value := getattr(node, name))
    ]
    return f" ({', '.join(shown)})" if shown else ""


def _is_silent(node: RewardConfig, name: str, value: Any) -> bool:
    return value is None or (name in UNUSUAL_ONLY and value == type(node).model_fields[name].default)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _mapping(weights: dict[str, float]) -> str:
    return ", ".join(f"{weight:g} x {name}" for name, weight in weights.items())


def _line(text: str) -> Text:
    """A line that is printed as it is: brackets in a pattern are no markup."""
    return Text(text, style="not bold")
