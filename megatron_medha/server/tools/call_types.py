"""Values that calls carry as bare text, typed by the tool's schema."""

from __future__ import annotations

from typing import Any

from megatron_medha.grammar.schema_disjoint import type_of
from megatron_medha.server.tools.json_text import loads

_PYTHON = {"True": True, "False": False, "None": None}
_ALL = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})


def typed_value(text: str, schema: Any, key: str) -> Any:
    """What the text of the parameter `key` stands for in a call of a tool with this schema of its arguments."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or key not in properties:
        # Text, unless it can hardly be meant as such.
        types = frozenset({"string", "object", "array"})
    else:
        types = _types(properties[key], schema, {})
    try:
        value = _PYTHON[text.strip()] if text.strip() in _PYTHON else loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return int(value)
    is_fit = not isinstance(value, str) and bool(_types_of(value) & types)
    return value if is_fit else text


def _types(schema: Any, root: Any, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """Which types of JSON the schema may allow. known: what references stand for; schemas may refer to themselves."""
    if not isinstance(schema, dict):
        return _ALL
    types = _ALL
    match schema.get("type"):
        case str(one):
            types = frozenset({one})
        case list(several):
            types = frozenset(one for one in several if isinstance(one, str))
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in known:
            known[reference] = _ALL
            known[reference] = _types(_resolved(reference, root), root, known)
        types &= known[reference]
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" and isinstance(schema[key], list) else [schema[key]]
            types &= frozenset().union(*map(_types_of, values))
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list) and options:
            types &= frozenset().union(*(_types(option, root, known) for option in options))
    for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        types &= _types(part, root, known)
    return types


def _types_of(value: Any) -> frozenset[str]:
    match value:
        case int() | float() if not isinstance(value, bool) and value % 1 == 0:
            return frozenset({"integer", "number"})
        case _:
            return frozenset({type_of(value)})


def _resolved(reference: str, root: Any) -> Any:
    place = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if name:
            place = place.get(name) if isinstance(place, dict) else None
    return place
