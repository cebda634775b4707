"""The verdict of an API server on a custom resource: its definition's schema, taken strictly, and its CEL rules."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import yaml
from jsonschema import Draft202012Validator

Node = dict[str, Any]


class Definition:
    """One version of one kind."""

    def __init__(self, file: Path, version: str) -> None:
        with file.open() as text:
            document = yaml.load(text, yaml.CSafeLoader)
        found = next(v for v in document["spec"]["versions"] if v["name"] == version)
        self._schema: Node = found["schema"]["openAPIV3Schema"]
        strict = _strict(self._schema)
        strict["properties"]["metadata"] = {"type": "object"}
        self._validator = Draft202012Validator(strict)

    def problems(self, resource: Node) -> list[str]:
        """What the server would refuse it for."""
        filled = _with_defaults(copy.deepcopy(resource), self._schema)
        found = [f"{error.json_path}: {error.message}" for error in self._validator.iter_errors(filled)]
        return found or list(_broken_rules(filled, self._schema, "$"))


def _strict(schema: Node) -> Node:
    """JSON Schema that refuses unknown fields."""
    kept = {
        "type",
        "enum",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "required",
    }
    result: Node = {key: value for key, value in schema.items() if key in kept}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if "properties" in schema:
        result["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        result["items"] = _strict(schema["items"])
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema and not schema.get("x-kubernetes-int-or-string"):
            result[word] = [_strict(part) for part in schema[word]]
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _with_defaults(value: Any, schema: Node) -> Any:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                _with_defaults(value[name], part)
        if isinstance(schema.get("additionalProperties"), dict):
            for part in value.values():
                _with_defaults(part, schema["additionalProperties"])
    elif isinstance(value, list):
        for part in value:
            _with_defaults(part, schema.get("items", {}))
    return value


def _broken_rules(value: Any, schema: Node, where: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:  # speaks of updates
            continue
        environment = celpy.Environment()
        program = environment.program(environment.compile(rule["rule"]))
        if not program.evaluate({"self": celpy.json_to_cel(value)}):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from _broken_rules(part, inner, f"{where}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, part in enumerate(value):
            yield from _broken_rules(part, schema["items"], f"{where}[{number}]")
