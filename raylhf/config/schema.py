"""Reading the settings models: which keys stand where, of which type, under which union kind."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from raylhf.config.base import Settings

Path = tuple[str | int, ...]
"""A key's way from the top of the file: names of mappings, positions in lists."""

SCALAR_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def models_of(annotation: Any) -> tuple[type[Settings], ...]:
    """The settings models that may stand at a key: none for a plain value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return models_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(model for option in get_args(annotation) for model in models_of(option))
    return ()


def kind_of(model: type[Settings]) -> str | None:
    """The `kind` that selects the model in its union."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def item_of(annotation: Any) -> Any:
    """The annotation of a list's entries, or None where no list may stand."""
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return next((item for option in get_args(annotation) if (item := item_of(option)) is not None), None)
    return None


def describe(annotation: Any) -> str:
    """The type in words."""
    if get_origin(annotation) is Annotated:
        return describe(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        if items[-1] is Ellipsis:
            return f"a list of {describe(items[0]).removeprefix('a ')}" if not models_of(items[0]) else "a list"
        return f"a list of {len(items)} {describe(items[0]).removeprefix('a ')}s"
    if get_origin(annotation) is dict:
        return "a mapping"
    models = models_of(annotation)
    if len(models) > 1:
        return "a mapping with kind: " + " | ".join(str(kind_of(model)) for model in models)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    return "a mapping" if models else SCALAR_NAMES[annotation]


@dataclass(frozen=True)
class Location:
    """Where an error of pydantic lies in the file."""

    path: Path
    """The key."""
    annotation: Any
    """What may stand there; None at a key that no model has."""
    owner: type[Settings] | None
    """The model that the last name of the path was looked up in."""


def locate(loc: Iterable[str | int], root: type[Settings]) -> Location:
    """The place of a pydantic error location in settings of type `root`.

    Pydantic puts the tag of a tagged union, and the name of a plain union's member, into the location; neither is a
    key of the file.
    """
    path: Path = ()
    annotation: Any = root
    owner: type[Settings] | None = None
    models = models_of(annotation)
    for part in loc:
        if len(models) > 1:
            models = tuple(model for model in models if kind_of(model) == part)
            continue
        if models:
            owner = models[0]
            field = owner.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            annotation = item_of(annotation)
        else:  # the name of a plain union's member
            break
        path += (part,)
        models = models_of(annotation)
    return Location(path, annotation, owner)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, if any is."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def dotted(path: Path) -> str:
    """The key as it is written on the command line."""
    return ".".join(str(part) for part in path)
