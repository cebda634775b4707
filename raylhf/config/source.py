"""Reading YAML 1.2 into plain data that remembers the file and line, or the override, of every key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from raylhf.config.errors import ConfigError
from raylhf.config.schema import Path, dotted
from raylhf.config.secrets import refuse_secrets


@dataclass
class Source:
    """Settings before validation."""

    data: dict[str, Any]
    """Mappings, lists and scalars as JSON knows them."""
    origins: dict[Path, str]
    """`file:line` or `override '...'` of keys."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""
    unreadable: set[Path] = field(default_factory=set)
    """Keys whose value is among `problems`, and stands as null in `data`."""

    def origin(self, path: Path) -> str:
        """Where the key, or else its nearest parent, was written."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def value(self, path: Path) -> Any:
        """The value at a path, or None."""
        node: Any = self.data
        for part in path:
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return None
        return node


def read_source(path: str | FilePath, overrides: Sequence[str]) -> Source:
    """The file with the overrides put in, each `a.b.c=value` with the value read as YAML.

    Raises:
        ConfigError: the file cannot be read, is not one mapping of sections, or a setting holds a secret.
    """
    source = _read_file(FilePath(path))
    for override in overrides:
        _apply(source, override)
    refuse_secrets(source)
    return source


def _read_file(file: FilePath) -> Source:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{file}: there is no such file; give the path of a YAML file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{file}: is a folder; give the path of a YAML file"]) from None
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    try:
        tree = YAML(typ="rt").load(text)
    except YAMLError as error:
        raise ConfigError([_syntax_problem(error, file, text)]) from None
    if tree is None:
        raise ConfigError([f"{file}:1: the file is empty; it must hold a mapping of sections (model:, data:, ...)"])
    if not isinstance(tree, CommentedMap):
        raise ConfigError(
            [f"{file}:1: the file must hold a mapping of sections (model:, data:, ...), not {_show(tree)}"]
        )
    source = Source(data={}, origins={(): f"{file}:{tree.lc.line + 1}"})
    source.data = _plain(tree, (), source, str(file))
    return source


def _syntax_problem(error: YAMLError, file: FilePath, text: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if not isinstance(error, MarkedYAMLError) or mark is None:
        return f"{file}: is not YAML: {str(error).splitlines()[0]}"
    where = f"{file}:{mark.line + 1}"
    what = str(error.problem)
    if duplicate := re.match(r'found duplicate key "([^"]*)"', what):
        first = error.context_mark.line + 1 if error.context_mark else 1
        return f"{where}: {duplicate[1]}: the key stands twice in the mapping that begins at line {first}; keep one"
    lines = text.splitlines()
    if "'\\t'" in what or (mark.line < len(lines) and lines[mark.line][: mark.column + 1].lstrip(" ").startswith("\t")):
        return f"{where}: a tab stands where YAML wants spaces; indent with spaces"
    context = f" ({error.context})" if error.context else ""
    return f"{where}: is not YAML: {what}{context}; look at this line and the one before it"


def _plain(node: Any, path: Path, source: Source, file: str | None) -> Any:
    """Plain data; with a file, the lines of keys go to `source.origins`."""
    if isinstance(node, CommentedMap):
        return _plain_mapping(node, path, source, file)
    if isinstance(node, CommentedSeq):
        for i in range(len(node)):
            if file is not None:
                source.origins[(*path, i)] = f"{file}:{node.lc.item(i)[0] + 1}"
        return [_plain(item, (*path, i), source, file) for i, item in enumerate(node)]
    if isinstance(node, ScalarBoolean):
        return bool(node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is not None:
        source.unreadable.add(path)
        source.problems.append(
            f"{source.origin(path)}: {dotted(path)}: is {_show(node)}, which no setting takes; "
            "put it in quotes if text is meant"
        )
    return None


def _plain_mapping(node: CommentedMap, path: Path, source: Source, file: str | None) -> dict[str, Any]:
    plain = {}
    for key, value in node.items():
        if not isinstance(key, str):
            source.problems.append(
                f"{source.origin(path)}: {dotted((*path, str(key)))}: the key {key!r} is not text; no setting has it"
            )
            continue
        here = (*path, str(key))
        if file is not None and key in (node.lc.data or ()):  # a key merged from an anchor has no line of its own
            source.origins[here] = f"{file}:{node.lc.key(key)[0] + 1}"
        plain[str(key)] = _plain(value, here, source, file)
    return plain


def _show(node: Any) -> str:
    if isinstance(node, CommentedSeq):
        return "a list"
    tag = getattr(getattr(node, "tag", None), "value", None)
    return f"a value with the tag {tag}" if tag else f"the {type(node).__name__} {node!s:.60}"


def _apply(source: Source, override: str) -> None:
    """Put one override in, or add a problem."""
    origin = f"override {override!r}"
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        source.problems.append(f"{origin}: is not of the form key=value; write for instance rollout.group_size=4")
        return
    try:
        tree = YAML(typ="rt").load(text)
    except YAMLError as error:
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        source.problems.append(f"{origin}: {key}: the value is not YAML: {what}; put text in quotes")
        return
    path: Path = tuple(int(name) if name.isdigit() else name for name in names)
    place = _place(source, path, origin)
    if place is None:
        return
    container, last = place
    for stale in [known for known in source.origins if known[: len(path)] == path]:
        del source.origins[stale]
    source.origins[path] = origin
    value = _plain(tree, path, source, None)
    if isinstance(container, list) and last == len(container):
        container.append(value)
    else:
        container[last] = value


def _place(source: Source, path: Path, origin: str) -> tuple[Any, Any] | None:
    """The mapping or list that holds the last name of the path, with what is missing on the way made."""
    node: Any = source.data
    for depth, part in enumerate(path):
        if isinstance(node, list):
            if not isinstance(part, int) or part > len(node):
                allowed = f"0 to {len(node)} ({len(node)} adds one)"
                source.problems.append(
                    f"{origin}: {dotted(path[:depth])}: is a list, {part!r} is no position in it; use {allowed}"
                )
                return None
        elif isinstance(node, dict):
            part = str(part)
        else:
            source.problems.append(
                f"{origin}: {dotted(path[:depth])}: is {node!r}, not a mapping, so nothing can be set inside it"
            )
            return None
        if depth == len(path) - 1:
            return node, part
        node = _child(source, node, part, path[: depth + 2], origin)
    return None


def _child(source: Source, node: Any, part: Any, below: Path, origin: str) -> Any:
    """The entry `part` of a mapping or list; a missing or null one is made, as a list where a number follows."""
    is_missing = part >= len(node) if isinstance(node, list) else node.get(part) is None
    if is_missing or node[part] is None:
        child: Any = [] if isinstance(below[-1], int) else {}
        source.origins[below[:-1]] = origin
        if isinstance(node, list) and part == len(node):
            node.append(child)
        else:
            node[part] = child
    return node[part]
