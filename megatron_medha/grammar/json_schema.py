"""From the JSON schemas that clients send to those that llguidance compiles, with the same meaning or a narrower one.

Keywords that forbid nothing go (annotations, unknown formats, uniqueItems: false), others are written in keywords that
the library has. What can be neither is refused, all of it at once, each with its place. Numbers are in
schema_numbers.py, patterns and formats in schema_strings.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import combinations, permutations
from typing import Any
from urllib.parse import unquote

from megatron_medha.grammar.guidance import GrammarError
from megatron_medha.grammar.schema_disjoint import TYPES, are_disjoint, literals_of, types_of
from megatron_medha.grammar.schema_numbers import common_multiple_fault, count_of, literal_of, number_of, with_numbers
from megatron_medha.grammar.schema_strings import key_pattern, with_strings

_MAX_REASONS = 8
_MAX_PERMUTED = 4         # values of a set of which any order may come: 64 arrays
_MAX_SET = 8              # of which the schema's order comes: 255 arrays
_MAX_SET_CHARS = 2_000    # of those values, as each is written out many times

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRINGS = ("pattern", "format")
_KEPT = ("type", "required")
# Of these it depends on the rest of the schema whether they can be kept; see _Translation._rewrite.
_REWRITTEN = (
    "unevaluatedProperties", "unevaluatedItems", "uniqueItems", "propertyNames", "not", "if", "dependentRequired",
    "dependentSchemas", "dependencies", "contains", "nullable", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_COMBINING = {"anyOf", "allOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "$dynamicRef", "$recursiveRef"}
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies")

_NAMES_PATTERN = re.compile(r"\^(?:([\w -]+)|\((?:\?:)?([\w -]+(?:\|[\w -]+)*)\))\$")
_RELATIVE = re.compile(r"([0-9]{1,3})((?:/[^/]*)*)")  # a pointer from where it stands, some levels up and down again

Schema = dict[str, Any] | bool


def translated(text: str) -> str:
    """The schema for llguidance; GrammarError with the reasons why there is none."""
    try:
        root = json.loads(text, parse_float=number_of, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"not valid JSON: {error or 'nested too deeply'}") from None
    try:
        return json.dumps(_Translation(root).run(), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise GrammarError("nested too deeply") from None


class _Translation:
    """Of one schema, with what is found on the way."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._reasons: list[str] = []
        self._definitions: dict[str, Any] = {}  # what references lead to, by the name it gets
        self._name_of: dict[str, str] = {}      # by the pointer
        self._multiples: set[float | int] = set()

    def run(self) -> dict[str, Any]:
        """The translated schema; GrammarError with all that cannot be kept."""
        schema = self._schema(self._root, "#")
        if fault := common_multiple_fault(self._multiples):
            self._refuse("#", fault)
        if self._reasons:
            shown, rest = self._reasons[:_MAX_REASONS], len(self._reasons) - _MAX_REASONS
            raise GrammarError("; ".join(shown) + (f"; and {rest} more" if rest > 0 else ""))
        if schema is False:
            raise GrammarError("#: nothing matches this schema")
        if schema is True:
            return {}
        if not self._definitions:
            return schema
        return {**schema, "$defs": self._definitions}

    def _refuse(self, path: str, why: str) -> None:
        self._reasons.append(f"{path}: {why}")

    # ---- one schema ----

    def _schema(self, given: Any, path: str) -> Schema:
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            self._refuse(path, "a schema is an object, true or false")
            return True
        given = _without_nulls(given)
        made: dict[str, Any] = {}
        for key, value in given.items():
            self._keyword(made, key, value, f"{path}/{key}")
        refuse = lambda key, why: self._refuse(f"{path}/{key}", why)  # noqa: E731
        with_numbers(made, given, refuse)
        with_strings(made, given, refuse)
        if isinstance(multiple := made.get("multipleOf"), int | float) and not isinstance(multiple, bool):
            self._multiples.add(multiple)
        rewritten = self._rewrite(made, given, path)
        return _with_names_of_patterns(rewritten) if isinstance(rewritten, dict) else rewritten

    def _keyword(self, made: dict[str, Any], key: str, value: Any, path: str) -> None:
        match key:
            case "$ref":
                made[key] = self._reference(value, path)
            case "allOf" | "anyOf" | "prefixItems":
                _and_more(made, key, self._list(value, path))
            case "oneOf":
                self._one_of(made, value, path)
            case "items" if isinstance(value, list):
                made[key] = self._list(value, path)
            case "items" | "additionalItems" | "additionalProperties":
                made[key] = self._schema(value, path)
            case "properties" | "patternProperties":
                made[key] = self._map(value, path)
            case "const":
                made[key] = literal_of(value, lambda why: self._refuse(path, why))
            case "enum":
                if not isinstance(value, list) or not value:
                    self._refuse(path, "expected a list with at least one value")
                    return
                made[key] = literal_of(value, lambda why: self._refuse(path, why))
            case _ if key in _COUNTS:
                count_of(made, key, value, lambda why: self._refuse(path, why))
            case _ if key in _NUMBERS or key in _STRINGS or key in _KEPT:
                made[key] = value
            case _:
                pass  # annotations, and what _rewrite looks at

    def _list(self, given: Any, path: str) -> list[Schema]:
        if not isinstance(given, list) or not given:
            self._refuse(path, "expected a list of schemas")
            return [True]
        return [self._schema(one, f"{path}/{place}") for place, one in enumerate(given)]

    def _map(self, given: Any, path: str) -> dict[str, Schema]:
        if not isinstance(given, dict):
            self._refuse(path, "expected an object of schemas")
            return {}
        return {name: self._schema(one, f"{path}/{_escaped(name)}") for name, one in given.items()}

    # ---- references ----

    def _reference(self, pointer: Any, path: str) -> str:
        if not isinstance(pointer, str):
            self._refuse(path, "expected text")
            return "#"
        if found := _RELATIVE.fullmatch(pointer):
            steps = path.split("/")[: -1 - int(found[1])]
            pointer = "/".join(steps) + found[2] if steps else "#"
        own = self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(own, str) and own and pointer.startswith(own):
            pointer = "#" + pointer[len(own) :].removeprefix("#")
        if pointer == "#":
            return "#"
        if pointer not in self._name_of:
            target = self._target(pointer)
            if target is None:
                self._refuse(path, f"{pointer[:100]} is not in this schema; put it under $defs and refer to that")
                return "#"
            name = self._name_of[pointer] = _name_for(pointer, self._definitions)
            self._definitions[name] = True  # until it is known; it may refer to itself
            self._definitions[name] = self._schema(target, pointer)
        return f"#/$defs/{self._name_of[pointer]}"

    def _target(self, pointer: str) -> Any:
        if pointer.startswith("#") and not pointer.startswith("#/"):
            return _anchored(self._root, unquote(pointer[1:]))
        found = self._root
        for step in pointer[2:].split("/"):
            key = unquote(step).replace("~1", "/").replace("~0", "~")  # of a JSON pointer
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                return None
        return found if isinstance(found, dict | bool) else None

    def _resolved(self, given: Any) -> Any:
        """What a reference leads to, in the client's words."""
        for _ in range(16):
            if not (isinstance(given, dict) and isinstance(given.get("$ref"), str) and given["$ref"].startswith("#")):
                break
            found = self._root if given["$ref"] == "#" else self._target(given["$ref"])
            if found is None:
                break
            given = found
        return _without_nulls(given) if isinstance(given, dict) else given

    # ---- keywords in other words ----

    def _one_of(self, made: dict[str, Any], given: Any, path: str) -> None:
        """As anyOf, where no value can match two of them."""
        options = self._list(given, path)
        raw = given if isinstance(given, list) else []
        if all(are_disjoint(one, other, self._resolved) for one, other in combinations(raw, 2)):
            _and_more(made, "anyOf", options)
            return
        self._refuse(path, "more than one of these may match; use anyOf, or give each a required "
                           "property with a const of its own")  # fmt: skip

    def _rewrite(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:
        for key in _REWRITTEN:
            if key in given:
                rewrite: Callable[[Schema, dict[str, Any], str], Schema] = getattr(self, "_do_" + key.lstrip("$"))
                rewritten = rewrite(made, given, f"{path}/{key}")
                if not isinstance(rewritten, dict):
                    return rewritten
                made = rewritten
        return made

    def _do_uniqueItems(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        if not given["uniqueItems"] or made.get("maxItems", 2) <= 1:
            return made
        values = literals_of(given.get("items"), self._resolved)
        size = len(json.dumps(values)) if values is not None else 0
        if values is None or len(values) > _MAX_SET or size > _MAX_SET_CHARS or "prefixItems" in given:
            self._refuse(path, f"is kept for items that are one of up to {_MAX_SET} values (enum, const); leave it out "
                               "and drop what comes twice")  # fmt: skip
            return made
        choose = permutations if len(values) <= _MAX_PERMUTED else combinations
        most = min(made.get("maxItems", len(values)), len(values))
        values = literal_of(values, lambda why: self._refuse(path, why))
        arrays = [list(some) for count in range(made.get("minItems", 0), most + 1) for some in choose(values, count)]
        if not arrays:
            self._refuse(path, "there are too few values for minItems")
            return made
        types = made.get("type", list(TYPES))
        rest = [one for one in types if one != "array"] if isinstance(types, list) else []
        array: dict[str, Any] = {"enum": arrays}
        return _both(made, {"anyOf": [array, {"type": rest}]} if rest else array)  # what is no array stays as it is

    def _do_propertyNames(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        names = self._resolved(given["propertyNames"])
        if names is False:
            return {**made, "maxProperties": 0}
        if not isinstance(names, dict):
            return made
        others = made.get("additionalProperties", True)
        if "string" not in types_of(names):
            return {**made, "maxProperties": 0}
        values, pattern = literals_of(names, self._resolved), key_pattern(names)
        is_more = bool(set(names) & _COMBINING - ({"anyOf"} if values is not None else set()))
        if values is None and pattern == "" and not is_more:
            return made  # every name matches
        is_mixed = (pattern if values is None else pattern != "") and bool(made.get("properties") or values)
        if is_more or (values is None and not pattern) or "patternProperties" in made or is_mixed:
            self._refuse(path, "is kept as enum, const, pattern or lengths, one of them, without properties or "
                               "patternProperties beside it; say patternProperties and additionalProperties: false")
            return made
        if pattern:
            return {**made, "patternProperties": {pattern: others}, "additionalProperties": False}
        allowed = [one for one in values or () if isinstance(one, str)]
        properties = {name: one for name, one in made.get("properties", {}).items() if name in allowed}
        if others is not False:
            properties |= {name: others for name in allowed if name not in properties}
        return {**made, "properties": properties, "additionalProperties": False}

    def _do_not(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:
        match given["not"]:
            case True | {} as forbidden if forbidden is True or not forbidden:
                return False
            case False:
                return made
            case {"type": str() | list() as types, **rest} if not rest:
                forbidden = {types} if isinstance(types, str) else set(types)
                if forbidden <= set(TYPES):
                    return _both(made, {"type": [one for one in TYPES if one not in forbidden]})
            case {"required": [], **rest} if not rest:
                return _both(made, {"type": [one for one in TYPES if one != "object"]})
            case _:
                pass
        self._refuse(path, "cannot be kept; say what may come instead of what may not")
        return made

    def _do_if(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:
        if given.get("then", True) in (True, {}) and given.get("else", True) in (True, {}):
            return made
        condition = given["if"]
        if isinstance(condition, bool):
            key = "then" if condition else "else"
            return _both(made, self._schema(given.get(key, True), path[: -len("if")] + key))
        self._refuse(path, "cannot be kept; say the cases as anyOf, each whole")
        return made

    def _do_dependentRequired(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        wanted = given[path.rsplit("/", 1)[1]]
        if not isinstance(wanted, dict):
            self._refuse(path, "expected an object")
            return made
        for name, needed in wanted.items():
            if isinstance(needed, list):
                there: Schema = {"type": "object", "required": [name, *needed]}
            else:
                there = _both({"type": "object", "required": [name]}, self._schema(needed, f"{path}/{name}"))
            absent = {"properties": {name: False}}
            made = _both(made, {"anyOf": [absent, there]})
        return made

    _do_dependentSchemas = _do_dependencies = _do_dependentRequired

    def _do_unevaluatedProperties(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        if given["unevaluatedProperties"] in (True, {}) or "additionalProperties" in made:
            return made
        names = self._evaluated(given)
        if given["unevaluatedProperties"] is not False or names is None:
            self._refuse(path, "cannot be kept here; say additionalProperties")
            return made
        properties = made.get("properties", {})
        known = {**properties, **{name: True for name in names if name not in properties}}
        return {**made, "properties": known, "additionalProperties": False}

    def _evaluated(self, given: Any) -> list[str] | None:
        """Names that a schema looks at; None where that depends on the output."""
        given = self._resolved(given)
        if not isinstance(given, dict):
            return []
        if any(key in given for key in _APPLICATORS if key != "allOf") or "patternProperties" in given:
            return None
        properties, parts = given.get("properties"), given.get("allOf")
        names = list(properties) if isinstance(properties, dict) else []
        for one in parts if isinstance(parts, list) else ():
            more = None if isinstance(one, dict) and "additionalProperties" in one else self._evaluated(one)
            if more is None:
                return None
            names += more
        return names

    def _do_unevaluatedItems(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        if given["unevaluatedItems"] in (True, {}) or "items" in made:
            return made
        if any(key in given for key in _APPLICATORS):
            self._refuse(path, "cannot be kept here; say items beside prefixItems")
            return made
        return {**made, "items": self._schema(given["unevaluatedItems"], path)}

    def _do_contains(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:
        if given.get("minContains") == 0 and "maxContains" not in given:
            return made
        self._refuse(path, "cannot be kept; say prefixItems, or what each of the items is")
        return made

    def _do_nullable(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:
        # OpenAPI 3.0's. An output that is not null matches in either reading, so it matters only where null must come.
        needs_null = None in made.get("enum", ()) or "$ref" in made or "allOf" in made
        if given["nullable"] is not True or not needs_null:
            return made
        return {"anyOf": [made, {"type": "null"}]}

    def _do_dynamicRef(self, made: dict[str, Any], given: dict[str, Any], path: str) -> Schema:  # noqa: N802
        self._refuse(path, "is not followed; say $ref")
        return made

    _do_recursiveRef = _do_dynamicRef


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """Without keywords of no value, which serializers write for what is not set."""
    return {key: value for key, value in given.items() if value is not None or key == "const"}


def _and_more(made: dict[str, Any], key: str, schemas: list[Schema]) -> None:
    """Put a list of schemas under a key that may be taken."""
    if key not in made:
        made[key] = schemas
    elif key == "allOf":
        made[key] = [*made[key], *schemas]
    else:
        made["allOf"] = [*made.get("allOf", ()), {key: schemas}]


def _both(one: dict[str, Any], other: Schema) -> dict[str, Any]:
    """What matches both."""
    return {**one, "allOf": [*one.get("allOf", ()), other]}


def _with_names_of_patterns(made: dict[str, Any]) -> dict[str, Any]:
    """Patterns all of whose names the schema lists, as these names: the library would end the object after a comma."""
    properties, patterns = dict(made.get("properties", {})), dict(made.get("patternProperties", {}))
    required = made["required"] if isinstance(made.get("required"), list) else []
    listed = {*properties, *(name for name in required if isinstance(name, str))}
    for pattern, schema in tuple(patterns.items()):
        found = _NAMES_PATTERN.fullmatch(pattern)
        names = [] if found is None else (found[1] or found[2]).split("|")
        if names and listed.issuperset(names):
            del patterns[pattern]
            for name in names:
                properties[name] = {"allOf": [properties[name], schema]} if name in properties else schema
    changed = {"properties": properties, "patternProperties": patterns}
    return {**made, **changed} if "patternProperties" in made else made


def _name_for(pointer: str, taken: Iterable[str]) -> str:
    # A name that says where it comes from, as the library's messages show it, without marks that pointers escape.
    plain = "".join(one if one.isalnum() and one.isascii() else "_" for one in unquote(pointer[2:]))
    plain = plain.removeprefix("_defs_").removeprefix("definitions_")[-60:]
    name, number = plain, 2
    while name in set(taken):
        name, number = f"{plain}_{number}", number + 1
    return name


def _anchored(root: Any, anchor: str) -> Any:
    """The schema of this name; None if there is none."""
    rest = [root]
    while rest:
        match rest.pop():
            case {"$anchor": name} as found if name == anchor:
                return found
            case dict() as found:
                rest.extend(found.values())
            case list() as found:
                rest.extend(found)
            case _:
                pass
    return None


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
