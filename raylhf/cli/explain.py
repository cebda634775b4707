"""`raylhf config`: every setting with its type, default and meaning."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylhf.config.base import Settings
from raylhf.config.load import load_any_config
from raylhf.config.run import CommonConfig, RewardModelRunConfig, RunConfig
from raylhf.config.schema import Path, describe, dotted, item_of, kind_of, models_of

WIDE = 400


@dataclass(frozen=True)
class Setting:
    """One key that a file may hold."""

    key: str
    """Dotted; a list's entry is `N`, and `[kind=...]` follows a key whose settings depend on the kind."""
    type: str
    default: str
    """`required`, a value, or empty where the settings inside have their own."""
    meaning: str
    path: Path | None
    """The key in the settings; None inside a union, whose member depends on the file."""


def run_explain(path: str | None, overrides: Sequence[str]) -> int:
    """Print all settings by section, and the file's value where a file is given."""
    config = load_any_config(path, overrides) if path is not None else None
    # Into a pipe or a file, lines are as long as they are: grep must find a key in one piece.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    tables = list(sections(type(config) if config else RunConfig))
    if config is None:
        tables += [
            (f"{name} (objective.kind: reward_model)", meaning, settings)
            for name, meaning, settings in sections(RewardModelRunConfig)
            if name in ("data", "objective", "evaluation")
        ]
    for title, meaning, settings in tables:
        table = Table(title=f"{title}: {meaning}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        columns = ("key", "type", "default", *(["value"] if config else []), "meaning")
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column == "key")
        for setting in settings:
            value = [_value(config, setting)] if config else []
            cells = (setting.key, setting.type, setting.default, *value, setting.meaning)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        console.print()
    return 0


def sections(root: type[CommonConfig]) -> Iterator[tuple[str, str, list[Setting]]]:
    """(name, meaning, settings) of each section; the first one holds the keys outside of sections."""
    top = {name: field for name, field in root.model_fields.items() if not models_of(field.annotation)}
    yield "run", "The whole run", [_setting((name,), field, root) for name, field in top.items()]
    for name, field in root.model_fields.items():
        for model in models_of(field.annotation):
            yield name, (field.description or "").rstrip("."), list(_settings((name,), model, frozenset()))


def _settings(path: Path, model: type[Settings], above: frozenset[type]) -> Iterator[Setting]:
    """The settings of a model and, below them, of the models inside it; one that contains itself is told once."""
    for name, field in model.model_fields.items():
        here = (*path, name)
        inside = models_of(field.annotation) or models_of(item_of(field.annotation))
        yield _setting(here, field, model)
        is_list = not models_of(field.annotation)
        for option in inside:
            if option in above | {model}:
                continue
            kind = f"[kind={kind_of(option)}]" if len(inside) > 1 else ""
            below = (*path, name + kind, "N") if is_list else (*path, name + kind)
            yield from _settings(below, option, above | {model, *inside})


def _setting(path: Path, field: FieldInfo, model: type[Settings]) -> Setting:
    is_plain = not any("[" in str(part) or part == "N" for part in path)
    return Setting(
        key=dotted(path),
        type=describe(field.annotation),
        default=_default(field),
        meaning=field.description or _first_line(model),
        path=path if is_plain else None,
    )


def _first_line(model: type[Settings]) -> str:
    """The meaning of a `kind`, which has none of its own: its model's."""
    return (model.__doc__ or "").strip().split("\n")[0]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Settings):
        is_union = len(models_of(field.annotation)) > 1
        return f"kind: {kind_of(type(field.default))}" if is_union else ""
    return _show(field.default)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(config: CommonConfig, setting: Setting) -> str:
    """The value of a plain key; empty where settings lie below it or where the key's model is not in use."""
    if setting.path is None:
        return ""
    node: Any = config
    for part in setting.path:
        node = getattr(node, str(part), "")
    return "" if isinstance(node, Settings) else _show(node)
