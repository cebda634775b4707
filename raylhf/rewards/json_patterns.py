"""JSON Schema keywords that search with regular expressions, each search with a time limit.

The library's own use `re`, which has none and keeps all other threads waiting.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import regex
from jsonschema import ValidationError

from raylhf.rewards import rules


def is_found(pattern: str, text: str) -> bool:
    """Whether the pattern matches somewhere in `text`. Raises TimeoutError after `rules.REGEX_LIMIT_S`."""
    return regex.search(pattern, text, timeout=rules.REGEX_LIMIT_S) is not None


def pattern(validator: Any, wanted: str, instance: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    """A text in which the pattern must be found."""
    if validator.is_type(instance, "string") and not is_found(wanted, instance):
        yield ValidationError(f"{instance!r} does not match {wanted!r}")


def pattern_properties(
    validator: Any, wanted: Mapping[str, Any], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Schemas of fields by pattern of their names."""
    if validator.is_type(instance, "object"):
        for name, value in instance.items():
            for expression, below in wanted.items():
                if is_found(expression, name):
                    yield from validator.descend(value, below, path=name, schema_path=expression)


def additional_properties(
    validator: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """The schema of fields that neither `properties` nor `patternProperties` knows."""
    if validator.is_type(instance, "object"):
        for name, value in instance.items():
            if name in schema.get("properties", {}):
                continue
            if not any(is_found(expression, name) for expression in schema.get("patternProperties", {})):
                yield from validator.descend(value, wanted, path=name)


TIMED_KEYWORDS = {
    "pattern": pattern,
    "patternProperties": pattern_properties,
    "additionalProperties": additional_properties,
}


def refuse_untimed(json_schema: Mapping[str, Any]) -> None:
    """Raises: ValueError: the schema would have the library search with `re` all the same."""
    keys = set(json_schema).union(*(keys_below(value) for value in json_schema.values()))
    if {"patternProperties", "unevaluatedProperties"} <= keys:
        raise ValueError(
            "the json reward's json_schema has patternProperties and unevaluatedProperties, whose searches together "
            "have no time limit; use additionalProperties in the latter's place"
        )
    if any("$schema" in keys_below(value) for value in json_schema.values()):
        raise ValueError("the json reward's json_schema names a $schema below its root; all of it is draft 2020-12")


def keys_below(value: Any) -> set[str]:
    """The keys of all mappings in `value`."""
    if isinstance(value, Mapping):
        return set(value).union(*map(keys_below, value.values()))
    return set().union(*map(keys_below, value)) if isinstance(value, list | tuple) else set()
