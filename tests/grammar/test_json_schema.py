"""Schemas that clients send: those of pydantic and zod for all their types, numbers, and keywords one by one.

schemas/*.json hold what these libraries write, and their versions.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies as st

from megatron_medha.grammar.grammar_process import CompileRequest, ConstraintKind, _written_out
from megatron_medha.grammar.guidance import GrammarError
from megatron_medha.grammar.json_schema import translated
from megatron_medha.grammar.schema_strings import without_look_around

llguidance = pytest.importorskip("llguidance")
RECORDED = {
    f"{path.stem}: {name}": schema
    for path in sorted((Path(__file__).parent / "schemas").glob("*.json"))
    for name, schema in json.loads(path.read_text())["schemas"].items()
}
# What cannot be kept, and is not what it seems: sets of any value, and an address that is of both versions of IP.
REFUSED = re.compile(r"(set(int|str|String)|bareset|cidr)$")
# jsonschema reads neither flags of OpenAPI 3.0 nor classes of Unicode nor relative pointers.
UNCHECKED = re.compile(r"emoji|openapi/|openApi3/|2019/range$|zod3 none/", re.IGNORECASE)


def answer_to(schema: Any, seed: int = 0, most: int = 400) -> Any:
    """What a model of no sense says that is held to a schema; None if it is not done after that many bytes."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(
        tokenizer, _written_out(CompileRequest(ConstraintKind.JSON_SCHEMA, text)), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    chance, said = random.Random(seed), bytearray()
    while len(said) < most:
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(256) if bits >> token & 1]
        if not allowed or bits >> tokenizer.eos_token & 1:
            return json.loads(said)
        closing = [token for token in b'"]}' if token in allowed]
        token = chance.choice(closing if closing and chance.random() < 0.4 else allowed)
        assert matcher.consume_token(token)
        said.append(token)
    return None


def assert_matches(schema: Any, answer: Any) -> None:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(answer)


@pytest.mark.parametrize("name", [name for name in RECORDED if not REFUSED.search(name)])
def test_an_answer_matches_what_pydantic_and_zod_write(name: str) -> None:
    schema = RECORDED[name]
    wrapped = {"type": "object", "properties": {"a": schema}} if "$ref" not in json.dumps(schema) else schema
    for one in (schema, wrapped):
        answer = answer_to(one)
        if answer is not None and not UNCHECKED.search(name):
            assert_matches(one, answer)


@pytest.mark.parametrize("name", [name for name in RECORDED if REFUSED.search(name)])
def test_what_pydantic_and_zod_write_and_nothing_can_keep_is_refused(name: str) -> None:
    error = AssertionError if "cidr" in name else GrammarError
    with pytest.raises(error, match=r"uniqueItems: is kept for|unsat|Unsat"):
        answer_to(RECORDED[name])


BIG = [2**53 + 1, 1234567890123456789, 2**63, 2**64 - 1, 10**17 + 1, 10**20 + 1, 123456789012345678901234567890]


@pytest.mark.parametrize("number", [*BIG, *(-one for one in BIG), 2**53, 10**17, 10**20, -(10**18), 2**53 - 1])
@pytest.mark.parametrize("kind", [
    '{"const": N}', '{"enum": ["a", N]}', '{"type": "integer", "minimum": N, "maximum": N}',
    '{"type": "number", "minimum": N, "maximum": N}', '{"type": "integer", "minimum": N}',
    '{"type": "integer", "exclusiveMaximum": N}', '{"type": "integer", "multipleOf": N, "minimum": 1}',
    '{"allOf": [{"type": "integer"}, {"minimum": N, "maximum": N}]}', '{"enum": [{"a": [N]}]}', '{"const": N.0}',
    '{"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], "$defs": {"a": {"const": N}}}',
])  # fmt: skip
def test_a_number_comes_out_as_it_is_or_is_refused_by_name(kind: str, number: int) -> None:
    schema = kind.replace("N", str(number))
    try:
        answer = answer_to(schema)
    except (GrammarError, AssertionError) as error:
        assert str(number) in str(error)
    else:
        assert_matches(json.loads(schema), answer)


def test_the_limits_of_machine_numbers_forbid_nothing() -> None:
    for low, high in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (-(2**31), 2**31 - 1)):
        schema = {"type": "integer", "minimum": low, "maximum": high}
        assert_matches(schema, answer_to(schema))
    for most in (3.4028234663852886e38, 1.7976931348623157e308):
        schema = {"type": "number", "minimum": -most, "maximum": most}
        assert_matches(schema, answer_to(schema))


@hypothesis.given(st.floats(min_value=1e-6, max_value=1e15) | st.floats(min_value=-1e15, max_value=-1e-6))
def test_a_decimal_comes_out_as_it_is_or_is_refused_by_name(number: float) -> None:
    try:
        answer = answer_to({"const": number}, most=600)
    except GrammarError as error:
        assert str(number) in str(error) or str(int(number)) in str(error)
    else:
        assert answer == number


def test_multiples_that_the_library_would_multiply_past_its_integers_are_refused() -> None:
    with pytest.raises(GrammarError, match="99999, 100000 together"):
        translated('{"type": "integer", "allOf": [{"multipleOf": 99999}, {"multipleOf": 100000}]}')


KIND = {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]}


@pytest.mark.parametrize("schema", [
    {"type": "string", "format": "nobody-knows-it"},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": False},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2},
    {"type": "array", "items": {"enum": ["mo", "tu", "we", "th", "fr", "sa"]}, "uniqueItems": True, "minItems": 5},
    {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
    {"items": {"enum": [1, 2]}, "uniqueItems": True},
    {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {}, "required": ["b"]},
    {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "additionalProperties": {}, "minProperties": 1},
    {"type": "object", "propertyNames": {"format": "uuid"}, "minProperties": 1, "additionalProperties": {}},
    {"not": {}, "type": "string"} | {"not": {"type": ["object", "array"]}}, {"not": {"type": "null"}, "maxLength": 3},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["a"], "properties": {"a": {}, "b": {}}},
    {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}, "required": ["a"], "additionalProperties": False,
     "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
    {"if": True, "then": {"type": "null"}}, {"if": {"type": "null"}}, {"then": False, "type": "null"},
    {"allOf": [KIND, {"properties": {"b": {"type": "null"}}}], "type": "object", "unevaluatedProperties": False},
    {"type": "array", "prefixItems": [{"type": "null"}], "unevaluatedItems": False, "minItems": 1},
    {"oneOf": [{"const": 1}, {"const": True}, {"const": "1"}]}, {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "kind"},
     "$defs": {"a": KIND, "b": {**KIND, "properties": {"kind": {"enum": ["b", "c"]}}}}},
    {"oneOf": [{"type": "object", "required": [name], "properties": {name: {"type": "null"}},
                "additionalProperties": False} for name in "ab"]},
    {"$ref": "#/components/schemas/T~1x", "components": {"schemas": {"T/x": {"const": "found"}}}},
    {"$id": "https://example.com/s", "$ref": "https://example.com/s#/$defs/a", "$defs": {"a": {"type": "null"}}},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
    {"type": "array", "items": {"oneOf": [{"type": "null"}, {"$ref": "#"}]}, "maxItems": 2},
    {"type": "string", "minLength": 2.0, "maxLength": 1e30}, {"minimum": 1, "exclusiveMaximum": 9.5, "type": "integer"},
    {"x-anything": {"type": "nothing"}, "deprecated": True, "readOnly": True, "examples": [2**70], "default": 2**70,
     "title": 1, "description": None, "$comment": [], "contentMediaType": "text/html", "contentSchema": {"not": {}},
     "type": "null"},
    {"type": "object", "properties": {"title": {"type": "null"}, "not": {"type": "null"}, "$ref": {"type": "null"}},
     "required": ["title", "not", "$ref"]},
    {"const": {"not": {}, "$ref": "nowhere", "uniqueItems": True}}, {"const": None},
    {"type": "object", "properties": {"a": {"multipleOf": 5}}, "patternProperties": {"^a$": {"type": "integer"}},
     "required": ["a"], "additionalProperties": False},
    {"type": "object", "patternProperties": {"^(?:a|b c)$": {"type": "null"}}, "required": ["a", "b c"],
     "additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^a$"}, "required": ["a"],
     "additionalProperties": {"type": "null"}},
    {"$ref": "#a b", "$defs": {"x": {"$anchor": "a b", "const": 3}}},
], ids=json.dumps)  # fmt: skip
def test_a_keyword_that_forbids_nothing_or_has_other_words_is_kept(schema: dict[str, Any]) -> None:
    for seed in range(9):
        answer = answer_to(schema, seed)
        if "$id" in schema:
            assert answer is None  # the value, null
        elif answer is not None:
            assert_matches(schema, answer)


def test_a_keyword_without_a_value_forbids_nothing() -> None:
    names = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "items", "prefixItems", "contains", "properties",
             "patternProperties", "additionalProperties", "propertyNames", "required", "dependentRequired", "type",
             "enum", "minimum", "exclusiveMaximum", "multipleOf", "minLength", "maxItems", "minProperties", "pattern",
             "format", "uniqueItems", "unevaluatedProperties", "unevaluatedItems", "nullable")  # fmt: skip
    schema = {"type": "object", "required": ["a"], "properties": {"a": {**dict.fromkeys(names), "type": "integer"}}}
    assert translated(json.dumps(schema)) == translated(
        json.dumps({**schema, "properties": {"a": {"type": "integer"}}})
    )


@pytest.mark.parametrize(("schema", "place"), [
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "#/uniqueItems"),
    ({"not": {"const": 3}}, "#/not"), ({"if": {"type": "null"}, "then": False}, "#/if"),
    ({"properties": {"a": {"contains": {"const": 1}}}}, "#/properties/a/contains"),
    ({"properties": {"a/b": {"pattern": "(?<!x)y"}}}, "#/properties/a~1b/pattern"),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"a": {}}}, "#/propertyNames"),
    ({"anyOf": [{"type": "null"}, {"oneOf": [{"type": "integer"}, {"type": "number"}]}]}, "#/anyOf/1/oneOf"),
    ({"unevaluatedProperties": False, "anyOf": [{"properties": {"a": {}}}, {}]}, "#/unevaluatedProperties"),
    ({"$ref": "https://example.com/other"}, "#/$ref"), ({"$ref": "#/$defs/none"}, "#/$ref"),
    ({"minimum": 5, "maximum": 3}, "minimum 5, maximum 3"), ({"items": 3}, "#/items"), ({"enum": []}, "#/enum"),
    ({"minLength": -1}, "#/minLength"), ({"multipleOf": 0}, "#/multipleOf"),
    ({"multipleOf": True, "items": {"multipleOf": 2}}, "#/multipleOf"), ({"multipleOf": 0.07}, "#/multipleOf: 0.07"),
    ({"$dynamicRef": "#a"}, "#/$dynamicRef"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused_with_its_place(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(place)):
        translated(json.dumps(schema))


def test_all_that_cannot_be_kept_is_named_at_once() -> None:
    with pytest.raises(GrammarError) as raised:
        translated(json.dumps({"properties": {name: {"not": {"const": 1}} for name in "abcdefghijkl"}}))
    assert all(f"#/properties/{name}/not" in str(raised.value) for name in "abcdefgh") and "4 more" in str(raised.value)


@pytest.mark.parametrize("text", [
    "", "{", "[1]", '{"a": NaN}', "[" * 100_000, '{"const": ' + "9" * 5000 + "}", '"a"', "{'a': 1}",
    '{"a": ' * 50_000, '{"not": ' * 900 + "{}" + "}" * 900,
], ids=lambda text: text[:12])  # fmt: skip
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(GrammarError):
        translated(text)


KEYWORDS = st.sampled_from([
    "$ref", "type", "required", "$defs", "allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalProperties",
    "properties", "patternProperties", "const", "enum", "maxLength", "minItems", "minimum", "maximum", "multipleOf",
    "pattern", "format", "uniqueItems", "propertyNames", "not", "if", "then", "dependentRequired", "dependencies",
    "unevaluatedProperties", "unevaluatedItems", "contains", "nullable", "$dynamicRef", "a",
])  # fmt: skip
SCALARS = st.sampled_from([
    None, True, False, 0, -1, 1.5, 2**53 + 1, 1e300, "", "#", "#/", "#/$defs/a", "1/a", "^(?!", "object", ["a"], [{}],
])  # fmt: skip


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=4), max_leaves=12,
))  # fmt: skip
def test_whatever_is_sent_is_translated_or_refused(schema: Any) -> None:
    try:
        translated(json.dumps(schema))
    except GrammarError as error:
        assert str(error)


@hypothesis.given(text=st.from_regex(r"[.@a-c]{0,6}", fullmatch=True), pattern=st.sampled_from([
    r"^(?!\.)[.@a-c]*$", r"^(?!.*\.\.)[.@a-c]*$", r"^(?=.{2,4}$)[a-c]*$", r"^(?!.*[.@])[.@a-c]*$",
    r"^(?!a)(?!.*c)[.@a-c]*$", r"^(?!$)[a-c]*$", r"^(?=[a-c])(?!\.).*$",
]))  # fmt: skip
def test_a_pattern_without_look_around_matches_as_the_one_with_it(text: str, pattern: str) -> None:
    patterns = without_look_around(pattern)
    assert patterns is not None and not any("(?=" in one or "(?!" in one for one in patterns)
    assert all(re.search(one, text) for one in patterns) == bool(re.search(pattern, text))
