"""From a YAML file and command-line overrides to checked settings, and back."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML

from raylhf.config.base import Settings
from raylhf.config.checks import find_problems
from raylhf.config.errors import ConfigError
from raylhf.config.offline_checks import find_preference_problems
from raylhf.config.problems import Problem
from raylhf.config.reward_model_checks import find_reward_model_problems
from raylhf.config.run import AnyRunConfig, CommonConfig, PreferenceRunConfig, RewardModelRunConfig, RunConfig
from raylhf.config.schema import Location, Path, describe, dotted, item_of, kind_of, locate, models_of, nearest
from raylhf.config.source import Source, read_source

Root = TypeVar("Root", bound=Settings)

PATH_KEYS: tuple[Path, ...] = (
    ("data", "path"),
    ("data", "held_out_path"),
    ("model", "path"),
    ("objective", "critic", "path"),
    ("objective", "loss", "guide"),
    ("serve", "token_file"),
)
"""Settings that may name something on disk beside the config file; the models of a reward graph come to them."""

GRAPH_KEYS = ("path", "paths", "policy", "reference", "token_file")
"""Such settings of the reward graph's leaves and nodes."""


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a policy run: read, overridden, validated, checked.

    A relative path of data or a model that exists beside the config file (else in the current folder) becomes
    absolute; anything else is left as it is, a Hugging Face name for instance.

    Raises:
        ConfigError: one line for each problem: where it is written, the key, what is wrong, the remedy.
    """
    return validated(read_source(path, overrides), FilePath(path), RunConfig, find_problems)


def load_any_config(path: str | FilePath, overrides: Sequence[str] = ()) -> AnyRunConfig:
    """The settings of whichever kind of run the file's `objective.kind` names; as `load_config`."""
    source = read_source(path, overrides)
    match source.value(("objective", "kind")):
        case "reward_model":
            return validated(source, FilePath(path), RewardModelRunConfig, find_reward_model_problems)
        case "preference" | "sft":
            return validated(source, FilePath(path), PreferenceRunConfig, find_preference_problems)
    return validated(source, FilePath(path), RunConfig, find_problems)


def validated(source: Source, file: FilePath, root: type[Root], find: Callable[[Root], Sequence[Problem]]) -> Root:
    """`source` as settings of type `root`, with paths resolved and what `find` says about combinations.

    Raises:
        ConfigError: as of `load_config`.
    """
    _resolve_paths(source, file.resolve().parent)
    config = None
    try:
        # As JSON: a list may stand for a tuple and 1 for 1.0, and nothing else is converted.
        config = root.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        source.problems.extend(_explain(error, source, root))
    else:
        for problem in find(config):
            source.problems.append(f"{source.origin(problem.path)}: {problem}")
    if source.problems or config is None:
        raise ConfigError(source.problems)
    return config


def dump_config(config: CommonConfig) -> str:
    """The settings as YAML that reads back to an equal config."""
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.width = 10_000
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def _resolve_paths(source: Source, folder: FilePath) -> None:
    for path in (*PATH_KEYS, *_graph_paths(source.value(("reward", "graph")), ("reward", "graph"))):
        value = source.value(path)
        if not isinstance(value, str) or value == "tiny" or value.startswith("package:"):
            continue
        written = FilePath(value).expanduser()
        found = next((base / written for base in (folder, FilePath.cwd()) if (base / written).exists()), None)
        if found is not None:
            source.value(path[:-1])[path[-1]] = str(found.resolve())
        elif not written.is_absolute() and (written.suffix in (".jsonl", ".parquet") or value.startswith(".")):
            source.problems.append(
                f"{source.origin(path)}: {dotted(path)}: there is no {value!r} in {folder} (nor in the current "
                "folder); paths are relative to the config file"
            )


def _graph_paths(node: Any, path: Path) -> Iterator[Path]:
    """Keys below `path` that may name something on disk; the function leaf's `path` is a Python name."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _graph_paths(item, (*path, i))
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in GRAPH_KEYS and node.get("kind") != "function":
            yield from ((*path, key, i) for i in range(len(value))) if isinstance(value, list) else [(*path, key)]
        elif key != "json_schema":  # its keys are the user's
            yield from _graph_paths(value, (*path, key))


def _explain(error: ValidationError, source: Source, root: type[Settings]) -> list[str]:
    """One line for each place: the members of a plain union each complain about one value."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # pydantic counts only the entries without errors, which are told already
        place = locate(detail["loc"], root)
        is_kind = detail["type"].startswith("union_tag")
        path = (*place.path, "kind") if is_kind else place.path
        if path not in source.unreadable:
            text = _what_is_wrong(detail, place)
            problems.setdefault(dotted(path), f"{source.origin(path)}: {dotted(path)}: {text}")
    return list(problems.values())


def _what_is_wrong(detail: Mapping[str, Any], place: Location) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(str(place.path[-1]), place)
        case "missing":
            return _missing_key(place)
        case "union_tag_invalid" | "union_tag_not_found":
            return _unknown_kind(detail, place)
        case "literal_error":
            return _not_a_choice(detail["input"], place)
        case "string_pattern_mismatch":
            return f"is {_show(detail['input'])}, must match {detail['ctx']['pattern']}"
        case "too_short" | "string_too_short":
            return "is empty; give at least one entry"
        case name if name.endswith("_type"):
            return _wrong_type(detail["input"], place)
    text = str(detail["msg"]).removeprefix("Value error, ")
    if text.startswith("Input should"):
        return f"is {_show(detail['input'])}, must" + text.removeprefix("Input should")
    return f"is {_show(detail['input'])}; {text[0].lower()}{text[1:]}"


def _unknown_key(name: str, place: Location) -> str:
    keys = tuple(place.owner.model_fields) if place.owner else ()
    likely = nearest(name, keys)
    if likely:
        return f"unknown key; did you mean {likely!r}?"
    return f"unknown key; the keys here are {', '.join(keys)}"


def _missing_key(place: Location) -> str:
    name = str(place.path[-1])
    field = place.owner.model_fields.get(name) if place.owner else None
    if field is None:
        return "is missing; the list is too short"
    meaning = f" ({field.description.rstrip('.')})" if field.description else ""
    return f"required key is missing; add it: {describe(field.annotation)}{meaning}"


def _unknown_kind(detail: Mapping[str, Any], place: Location) -> str:
    kinds = [str(kind_of(model)) for model in models_of(place.annotation)]
    listed = ", ".join(kinds)
    if detail["type"] == "union_tag_not_found":
        return f"required key is missing; the kinds are {listed}"
    tag = str(detail["ctx"]["tag"])
    likely = nearest(tag, kinds)
    hint = f"; did you mean {likely!r}?" if likely else ";"
    return f"unknown kind {tag!r}{hint} The kinds are {listed}"


def _not_a_choice(value: Any, place: Location) -> str:
    text = f"is {_show(value)}, must be {describe(place.annotation)}"
    options = [option for option in get_args(place.annotation) if isinstance(option, str)]
    options += [option for member in get_args(place.annotation) for option in get_args(member)]
    likely = nearest(value, [str(option) for option in options]) if isinstance(value, str) else None
    return f"{text}; did you mean {likely!r}?" if likely else text


def _wrong_type(value: Any, place: Location) -> str:
    text = f"is {_show(value)}, must be {describe(place.annotation)}"
    wanted = {place.annotation, *get_args(place.annotation)}
    is_number_text = isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdigit()
    if is_number_text and wanted & {int, float}:
        return f"{text}; remove the quotes"
    if isinstance(value, str) and bool in wanted and value.lower() in ("yes", "no", "on", "off"):
        return f"{text}; YAML 1.2 reads {value} as text"
    if isinstance(value, str) and item_of(place.annotation) is str:
        return f"{text}; write [{value}]"
    if str in wanted and isinstance(value, int | float):
        return f"{text}; put it in quotes"
    return text


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a mapping" if isinstance(value, dict) else f"{value}"
