"""Whether two JSON schemas have no value in common; what is not seen to be so counts as not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_MAX_DEPTH = 6
TYPES = ("null", "boolean", "number", "string", "array", "object")

Resolve = Callable[[Any], Any]  # follows references


def are_disjoint(one: Any, other: Any, resolve: Resolve, depth: int = 0) -> bool:
    """Whether no value matches both."""
    one, other = resolve(one), resolve(other)
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or depth > _MAX_DEPTH:
        return False
    for first, second in ((one, other), (other, one)):
        for key in ("anyOf", "oneOf"):
            options = first.get(key)
            if isinstance(options, list) and all(are_disjoint(each, second, resolve, depth + 1) for each in options):
                return True
        parts = first.get("allOf")
        if isinstance(parts, list) and any(are_disjoint(each, second, resolve, depth + 1) for each in parts):
            return True
    types = types_of(one) & types_of(other)
    if not types:
        return True
    values, others = literals_of(one, resolve), literals_of(other, resolve)
    if values is not None and others is not None:
        return not {_key(value) for value in values} & {_key(value) for value in others}
    return types == {"object"} and _cannot_be_one_object(one, other, resolve, depth)


def literals_of(schema: Any, resolve: Resolve, depth: int = 0) -> list[Any] | None:
    """All values that a schema allows, each once; None where they are not few."""
    schema = resolve(schema)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = schema["enum"]
    elif schema.get("type") == "boolean":
        values = [False, True]
    elif schema.get("type") == "null":
        values = [None]
    elif isinstance(options := schema.get("anyOf"), list):
        found = [literals_of(option, resolve, depth + 1) for option in options]
        if any(some is None for some in found):
            return None
        values = [value for some in found for value in some or ()]
    else:
        return None
    kept = [value for value in values if type_of(value) in types_of(schema)]
    return list({_key(value): value for value in kept}.values())


def _cannot_be_one_object(one: dict[str, Any], other: dict[str, Any], resolve: Resolve, depth: int) -> bool:
    for first, second in ((one, other), (other, one)):
        required = first.get("required")
        properties, others = first.get("properties"), second.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        others = others if isinstance(others, dict) else {}
        is_closed = second.get("additionalProperties") is False and not second.get("patternProperties")
        for name in required if isinstance(required, list) else ():
            if not isinstance(name, str):
                continue
            if name not in others:
                if is_closed:
                    return True
            elif are_disjoint(properties.get(name, True), others[name], resolve, depth + 1):
                return True
    return False


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """The types of values that a schema allows, by its own keywords; integers are numbers."""
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list):
        return frozenset("number" if name == "integer" else str(name) for name in names)
    if "const" in schema:
        return frozenset({type_of(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(type_of(value) for value in schema["enum"])
    return frozenset(TYPES)


def type_of(value: Any) -> str:
    """The type of a JSON value; integers are numbers."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _key(value: Any) -> str:
    # 1 and 1.0 are the same number; True is another value than 1.
    same = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(same, sort_keys=True)
