"""Calls of tools in the text of an answer: found in every syntax, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_medha.server.tools.call_readers import TextDelta, ToolArgumentsDelta, ToolCallStart, ToolParserEvent
from megatron_medha.server.tools.tool_calls import ToolCallParser
from megatron_medha.server.tools.tool_fields import ToolUse
from megatron_medha.text.chat.call_syntax import MARKS, ToolSyntax, syntax_of_template

Call = tuple[str, dict[str, Any]]
PROPERTIES = {
    "text": {"type": "string"}, "count": {"type": "integer"}, "share": {"anyOf": [{"type": "number"},
    {"type": "null"}]},
    "is_on": {"type": "boolean"}, "rows": {"type": "array"}, "more": {"$ref": "#/$defs/more"},
    "mode": {"enum": ["1", "true", "{}"]},
}  # fmt: skip
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": {"more": {"type": "object"}}}
DEFINITIONS = tuple({"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in "fg")


def as_tags(head: str, parameter: str, between: str, end: str) -> Callable[[str, dict], str]:
    def write(name: str, arguments: dict) -> str:
        written = [
            parameter.replace("KEY", key).replace("VALUE", value if isinstance(value, str) else json.dumps(value))
            for key, value in arguments.items()
        ]
        return head.replace("NAME", name) + between.join(written) + end

    return write


def as_json(name: str, arguments: dict, name_key: str = "name", key: str = "arguments") -> str:
    return json.dumps({name_key: name, key: arguments}, ensure_ascii=len(name) % 2 == 0)


def as_python(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def around(before: str, after: str, write: Callable[[str, dict], str] = as_json) -> Callable[[list[Call]], str]:
    return lambda calls: "\n".join(before + write(*call) + after for call in calls)


def joined(
    before: str, after: str, write: Callable[[str, dict], str] = as_json, sep: str = ", "
) -> Callable[[list[Call]], str]:
    return lambda calls: before + sep.join(write(*call) for call in calls) + after


FUNCTION = as_tags("<function=NAME>\n", "<parameter=KEY>\nVALUE\n</parameter>\n", "", "</function>")
WRITERS: tuple[tuple[ToolSyntax, Callable[[list[Call]], str]], ...] = (
    (ToolSyntax.HERMES, around("<tool_call>\n", "\n</tool_call>")),
    (ToolSyntax.HERMES, joined("<tool_call>\n", "\n</tool_call>", sep="\n")),
    (ToolSyntax.HERMES, joined("<tool_call>[", "]</tool_call>")),
    (ToolSyntax.HERMES, around("<tool_call>\n", "\n</tool_call>", FUNCTION)),
    (ToolSyntax.QWEN_XML, around("<tool_call>\n", "\n</tool_call>", FUNCTION)),
    (ToolSyntax.QWEN_XML, around("", "", FUNCTION)),
    (ToolSyntax.SEED, around("<seed:tool_call>\n", "\n</seed:tool_call>", FUNCTION)),
    (ToolSyntax.LLAMA3_JSON, joined("<|python_tag|>", "", sep="; ")),
    (ToolSyntax.MISTRAL, joined("[TOOL_CALLS] [", "]")),
    (ToolSyntax.MISTRAL, around("[TOOL_CALLS]", "", lambda name, arguments: f"{name}[ARGS]{json.dumps(arguments)}")),
    (ToolSyntax.MISTRAL, around("[TOOL_CALLS]", "", lambda name, arguments: f"{name}{json.dumps(arguments)}")),
    (ToolSyntax.MISTRAL,
     around("[TOOL_CALLS]", "", lambda name, arguments: f"{name}[CALL_ID]a1B2c3D4e[ARGS]{json.dumps(arguments)}")),
    (ToolSyntax.DEEPSEEK, lambda calls: "<｜tool▁calls▁begin｜>" + around(
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        lambda name, arguments: f"{name}<｜tool▁sep｜>{json.dumps(arguments)}",
    )(calls) + "<｜tool▁calls▁end｜>"),
    (ToolSyntax.DEEPSEEK, lambda calls: "<｜tool▁calls▁begin｜>" + around(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```<｜tool▁call▁end｜>",
        lambda name, arguments: f"{name}\n```json\n{json.dumps(arguments)}",
    )(calls) + "<｜tool▁calls▁end｜>"),
    (ToolSyntax.DEEPSEEK_DSML, joined("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>", as_tags(
        '<｜DSML｜invoke name="NAME">\n', '<｜DSML｜parameter name="KEY">VALUE</｜DSML｜parameter>', "\n",
        "</｜DSML｜invoke>\n",
    ), "")),
    (ToolSyntax.GLM, around("<tool_call>", "</tool_call>", as_tags(
        "NAME\n", "<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n", "", ""))),
    (ToolSyntax.KIMI, lambda calls: "<|tool_calls_section_begin|>" + around(
        "<|tool_call_begin|>", "<|tool_call_end|>",
        lambda name, arguments: f"functions.{name}:0<|tool_call_argument_begin|>{json.dumps(arguments)}",
    )(calls) + "<|tool_calls_section_end|>"),
    (ToolSyntax.MINIMAX, joined("<minimax:tool_call>\n", "</minimax:tool_call>", as_tags(
        '<invoke name="NAME">\n', '<parameter name="KEY">VALUE</parameter>\n', "", "</invoke>\n"), "")),
    (ToolSyntax.GRANITE, joined("<|tool_call|>[", "]")),
    (ToolSyntax.COHERE, joined("<|START_ACTION|>[\n", "\n]<|END_ACTION|>",
                               lambda name, arguments: as_json(name, arguments, "tool_name", "parameters"))),
    (ToolSyntax.JAMBA, joined("<tool_calls>[\n", "\n]</tool_calls>")),
    (ToolSyntax.NEMOTRON, joined("<TOOLCALL>[", "]</TOOLCALL>")),
    (ToolSyntax.PYTHONIC, joined("<|tool_call_start|>[", "]<|tool_call_end|>", as_python)),
    (ToolSyntax.PYTHONIC, joined("<function_calls>\n", "\n</function_calls>", as_python, "\n")),
)  # fmt: skip
BARE_WRITERS: tuple[tuple[ToolSyntax, Callable[[list[Call]], str]], ...] = (
    (ToolSyntax.LLAMA3_JSON, joined("", "", sep="; ")),
    (ToolSyntax.LLAMA3_JSON, joined("[", "]", lambda name, arguments: as_json(name, arguments, "function",
    "parameters"))),
    (ToolSyntax.PYTHONIC, joined("[", "]", as_python)),
    (ToolSyntax.LIST, joined("[", "]")),
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<\r"), max_size=8)
ARGUMENTS = st.fixed_dictionaries({}, optional={
    "text": TEXT, "count": st.integers(), "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "is_on": st.booleans(), "rows": st.lists(TEXT | st.integers(), max_size=3), "mode": st.sampled_from(["1", "true",
    "{}"]),
    "more": st.dictionaries(TEXT, TEXT | st.none() | st.booleans(), max_size=2),
})  # fmt: skip
CALLS = st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), min_size=1, max_size=2)
WORDS = st.sampled_from(["", "", "So: ", "\n\nThen:\n", " x\n\n    return 1", "- a\n- b\n", " if a < b: ", "}", "\t"])


def use_of(syntax: ToolSyntax, **fields: Any) -> ToolUse:
    return ToolUse(syntax=syntax, names=frozenset("fg"), definitions=DEFINITIONS, **fields)


def read(use: ToolUse, pieces: list[str], *, is_cut: bool = False) -> list[str | tuple[str, str]]:
    """Text and calls in order."""
    finder = ToolCallParser(use)
    found: list[ToolParserEvent] = [one for piece in pieces for one in finder.push(piece)]
    told: list[Any] = []
    for one in [*found, *finder.finish(is_cut=is_cut)]:
        match one:
            case TextDelta(text):
                if told and isinstance(told[-1], str):
                    told[-1] += text
                else:
                    told.append(text)
            case ToolCallStart(name=name):
                told.append((name, ""))
            case ToolArgumentsDelta(index, arguments):
                assert index == sum(isinstance(entry, tuple) for entry in told) - 1
                told[-1] = (told[-1][0], told[-1][1] + arguments)
    return told


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    while text:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def calls_in(told: list[Any]) -> list[Call]:
    return [(one[0], json.loads(one[1])) for one in told if isinstance(one, tuple)]


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(writer=st.sampled_from(WRITERS), first=CALLS, second=CALLS, words=st.tuples(WORDS, WORDS, WORDS), sizes=SIZES)
def test_calls_and_the_words_around_them_do_not_depend_on_how_the_text_is_cut(
    writer: tuple, first: list[Call], second: list[Call], words: tuple[str, str, str], sizes: list[int]
) -> None:
    syntax, write = writer
    before, between, after = words
    if syntax in (ToolSyntax.LLAMA3_JSON, ToolSyntax.PYTHONIC):
        before, between = before or "So ", between.strip("} \n\t") or "and"
    if syntax not in (ToolSyntax.HERMES, ToolSyntax.GLM):
        between, after = between.replace("}", ""), after.replace("}", "")
    text = before + write(first) + between + write(second) + after
    told = read(use_of(syntax), cut(text, sizes))
    assert told == read(use_of(syntax), [text]), text
    assert calls_in(told) == [*first, *second]
    said = "".join(one for one in told if isinstance(one, str))
    assert said == "".join(one for one in (before, between, after) if one.strip()), text


@settings(max_examples=60, deadline=None)
@given(writer=st.sampled_from(BARE_WRITERS), calls=CALLS, sizes=SIZES)
def test_an_answer_that_begins_with_calls_needs_no_mark(writer: tuple, calls: list[Call], sizes: list[int]) -> None:
    syntax, write = writer
    told = read(use_of(syntax), cut(write(calls), sizes))
    assert all(isinstance(one, tuple) for one in told) and calls_in(told) == calls


@settings(max_examples=30, deadline=None)
@given(arguments=ARGUMENTS, sizes=SIZES)
def test_arguments_alone_are_the_call_that_must_be(arguments: dict, sizes: list[int]) -> None:
    told = read(use_of(ToolSyntax.ARGUMENTS, only="f"), cut(json.dumps(arguments), sizes))
    assert calls_in(told) == [("f", arguments)]


def parts_of(syntax: ToolSyntax) -> list[str]:
    marks = MARKS[syntax]
    parts = [*marks.openings, *marks.closings, *marks.between, "<think>", "</think>", '{"name": "f", ',
    '"arguments": {}']
    if marks.tags is not None:
        parts += [marks.tags.start, marks.tags.end, marks.tags.parameter_start, marks.tags.parameter_end, "f>", '"f">']
    return [*parts, "{", "}", "[", "]", " ", "\n", ",", '"', "f", "f(", ")", "a=1", ":", ">", "<", "`", "\\", "1",
            "'", "True", "-", "Infinity", "u12"]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=st.data(), syntax=st.sampled_from(ToolSyntax), sizes=SIZES)
def test_whatever_a_model_writes_is_read_alike_however_it_is_cut(
    data: st.DataObject, syntax: ToolSyntax, sizes: list[int]
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(parts_of(syntax)), max_size=14)))
    use = use_of(syntax, only="f" if syntax is ToolSyntax.ARGUMENTS else None)
    whole = read(use, [text])
    assert read(use, cut(text, sizes)) == whole
    if not any(isinstance(one, tuple) for one in whole):
        assert "".join(map(str, whole)) == text


@example(text="<tool_call>", size=1)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet='<tool_call>/{}[]":,f name', max_size=60), size=st.integers(1, 9))
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert "".join(map(str, read(use_of(ToolSyntax.HERMES), cut(text, [size])))) == text


def hermes(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


CALL, F = '{"name": "f", "arguments": {"text": "P"}}', ("f", '{"text": "P"}')


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (hermes(CALL + "}"), [F]), (hermes(CALL[:-1]), [F]), (CALL.join(["<tool_call>", ""]), [F]),
        (hermes(CALL) + "\n</tool_call>", [F]), ("<tool_call>" + hermes(CALL), [F]),
        (hermes(CALL + "\n" + CALL), [F, F]),
        (hermes(f"[{CALL}, {CALL}]"), [F, F]),
        (hermes(CALL.replace('"P"', '"a\nb\tc"')), [("f", '{"text": "a\\nb\\tc"}')]),
        (hermes(CALL.replace("P", "it\\'s \\d")), [("f", '{"text": "it\'s \\\\d"}')]),
        (hermes(CALL.replace('"P"', '"P",')), [F]), (hermes("{'name': 'f', 'arguments': {'text': 'P'}}"), [F]),
        (hermes('{"name": "now", "arguments": null}'), [("now", "{}")]), (hermes('{"name": "now"}'), [("now", "{}")]),
        (hermes('{"name": "now", "arguments": ""}'), [("now", "{}")]),
        (hermes('{"name": "now", "arguments": []}'), [("now", "{}")]),
        (hermes('{"arguments": {"text": "P"}, "name": "f"}'), [F]),
        (hermes('{"name": "f", "arguments": "{\\"text\\": \\"P\\"}"}'), [F]),
        (hermes('{"type": "function", "function": {"name": "f", "arguments": {"text": "P"}}}'), [F]),
        (hermes(CALL.replace('"f"', '"none"')), [("none", '{"text": "P"}')]),
        (hermes(r'{"name": "f", "arguments": "half \ud83d"}'), [("f", "half \ufffd")]),
        (hermes(CALL.replace('"f"', r'"\g"')), [(r"\g", '{"text": "P"}')]),
        (hermes('{"answer": 1}'), [hermes('{"answer": 1}')]), (hermes("I can."), [hermes("I can.")]),
        (hermes(CALL + " Done."), [F, " Done.\n"]), (f"<tool_call>{CALL}\nDone.", [F, "\nDone."]),
        (f"\n\n{hermes(CALL)}\n", [F]), (f"Well.\n{hermes(CALL)}\n\nDone.", ["Well.\n", F, "\n\nDone."]),
        (hermes("<function=f>\n<parameter=text>\nP\n</parameter>\n</function>"), [F]),
        (hermes(f"```json\n{CALL}\n```"), [F]), (hermes(CALL + "\n</function>"), [F]),
        ("<tool_call>" + CALL[:-2].replace('"P"', "'P'") + "</tool_call>", [F]),
        ("<tool_call>" + CALL[:-2].replace('"P"', "12"), [("f", '{"text": 12}')]),
        (hermes('{"name": "f", "arguments": "{\\"text\\": \\"a\nb\\"}"}'), [("f", '{"text": "a\\nb"}')]),
    ],
)  # fmt: skip
def test_calls_that_are_nearly_right_are_calls_and_leave_no_marks_behind(text: str, right: list) -> None:
    for pieces in ([text], list(text)):
        assert read(use_of(ToolSyntax.HERMES), pieces) == right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("{'a': 'b'}", {"a": "b"}), ("{'a': 'it's \"so\"', 'b': [1, 'c']}", {"a": 'it\'s "so"', "b": [1, "c"]}),
        ("{'a': 'it\\'s' , \"b\": \"it's\"}", {"a": "it's", "b": "it's"}),
        ('{"a": True, "b": [None, False], "c": "True"}', {"a": True, "b": [None, False], "c": "True"}),
        ('{"a": NaN, "b": -Infinity, "c": -1}', {"a": None, "b": None, "c": -1}),
        (r'{"a": "\ud83d\ude00 \ud83d \ude00\ud83d\n\ud83d"}', {"a": "\U0001f600 \ufffd \ufffd\ufffd\n\ufffd"}),
        (r'{"a": "C:\users\u00e9\u1"}', {"a": "C:\\users\u00e9\\u1"}),
    ],
)  # fmt: skip
def test_arguments_in_the_words_of_python_become_json(written: str, right: dict) -> None:
    for call in (f'{{"name": "f", "arguments": {written}}}', f'{{"arguments": {written}, "name": "f"}}'):
        for pieces in ([hermes(call)], list(hermes(call))):
            (found,) = read(use_of(ToolSyntax.HERMES), pieces)
            assert json.loads(found[1]) == right, call


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (ToolSyntax.PYTHONIC, "[f(share=1e999)]"),
        (ToolSyntax.HERMES, hermes('{"arguments": {"share": 1e999}, "name": "f"}')),
        (ToolSyntax.HERMES, hermes(r'{"name": "\ud83d", "arguments": {}}')),
        (ToolSyntax.HERMES, hermes(r'{"name": "f\n", "arguments": {}}')), (ToolSyntax.HERMES, hermes('{"name": ""}')),
    ],
)  # fmt: skip
def test_a_call_that_json_or_unicode_cannot_say_stays_text(syntax: ToolSyntax, text: str) -> None:
    assert "".join(map(str, read(use_of(syntax), list(text)))) == text


def function(text: str) -> str:
    return f"<function=f>\n<parameter=text>\n{text}\n</parameter>\n</function>"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (function("P").replace("=f", '="f"').replace("=text", "='text'"), [F]),
        (function("P"), [F]), (function("P").removesuffix("</function>"), [F]), (hermes(CALL), [F]),
        (hermes(function("P").removesuffix("</function>")), [F]),
        (hermes("<function=now>\n</function>"), [("now", "{}")]),
        (function("a\n</parameter>\nb </function> c"), [("f", '{"text": "a\\n</parameter>\\nb </function> c"}')]),
        (function("\n  12\n"), [("f", '{"text": "\\n  12\\n"}')]), (function("None"), [("f", '{"text": "None"}')]),
        (function("{}").replace("=text", "=more"), [("f", '{"more": {}}')]),
        (function("True").replace("=text", "=is_on"), [("f", '{"is_on": true}')]),
        (function("12345678901234567890123").replace("=text", "=count"), [("f", '{"count": 12345678901234567890123}')]),
        (function("2.0").replace("=text", "=count"), [("f", '{"count": 2}')]),
        (function("many").replace("=text", "=count"), [("f", '{"count": "many"}')]),
        (function("1e999").replace("=text", "=share"), [("f", '{"share": "1e999"}')]),
        (function("null").replace("=text", "=share"), [("f", '{"share": null}')]),
        (function("1").replace("=text", "=mode"), [("f", '{"mode": "1"}')]),
        (function("7").replace("=text", "=unknown"), [("f", '{"unknown": "7"}')]),
        ("Look:\n\n" + hermes(function("P")) + "\n\nDone.", ["Look:\n\n", F, "\n\nDone."]),
        ("<function= is not closed", ["<function= is not closed"]), ("a <parameter=x> b", ["a <parameter=x> b"]),
    ],
)  # fmt: skip
def test_calls_as_tags_have_values_of_the_types_that_the_schema_says(text: str, right: list) -> None:
    for pieces in ([text], list(text)):
        assert read(use_of(ToolSyntax.QWEN_XML), pieces) == right


@pytest.mark.parametrize("text", [
    '{"answer": "a long one', '{"name": "Bo", "age": 3}', '[{"a": 1}]', '{"answer": {}} x',
])  # fmt: skip
def test_a_json_answer_without_marks_is_text_and_comes_as_it_is_made(text: str) -> None:
    assert read(use_of(ToolSyntax.LLAMA3_JSON), list(text)) == read(use_of(ToolSyntax.LLAMA3_JSON), [text]) == [text]
    finder = ToolCallParser(use_of(ToolSyntax.LLAMA3_JSON))
    assert finder.push('{"answer": "a lo') == [TextDelta('{"answer"'), TextDelta(': "a lo')]


THOUGHT = "I could write " + hermes(CALL) + " but no.\n"


@pytest.mark.parametrize("syntax", [ToolSyntax.HERMES, ToolSyntax.QWEN_XML, ToolSyntax.LLAMA3_JSON])
@pytest.mark.parametrize(("opening", "closing"), [("<think>\n", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_call_that_is_only_thought_about_is_none(syntax: ToolSyntax, opening: str, closing: str) -> None:
    thought = opening + THOUGHT + closing
    call = CALL if syntax is ToolSyntax.LLAMA3_JSON else hermes(CALL)
    for text, right in (
        (thought + "\n\nSunny.", [thought + "\n\nSunny."]), (thought + "\n\n" + call, [thought, F]),
        (opening + THOUGHT, [opening + THOUGHT]),
    ):  # fmt: skip
        assert read(use_of(syntax), [text]) == read(use_of(syntax), list(text)) == right
    assert read(use_of(ToolSyntax.HERMES), list(f"Say `<think>`: {hermes(CALL)}")) == ["Say `<think>`: ", F]


@pytest.mark.parametrize("syntax", [ToolSyntax.HERMES, ToolSyntax.LLAMA3_JSON])
def test_reasoning_that_the_prompt_has_opened_ends_where_it_says(syntax: ToolSyntax) -> None:
    call = CALL if syntax is ToolSyntax.LLAMA3_JSON else hermes(CALL)
    text = f"{CALL} {THOUGHT}</think>\n\n{call}"
    assert read(use_of(syntax, reasoning_end="</think>"), list(text)) == [f"{CALL} {THOUGHT}</think>", F]


@pytest.mark.parametrize(("syntax", "text"), [
    (ToolSyntax.HERMES, hermes(CALL)), (ToolSyntax.QWEN_XML, hermes(function("P"))), (ToolSyntax.LLAMA3_JSON, CALL),
    (ToolSyntax.GLM, "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>P</arg_value>\n</tool_call>"),
])  # fmt: skip
def test_a_call_that_was_cut_is_not_completed(syntax: ToolSyntax, text: str) -> None:
    end = text.index("P") + 1
    assert read(use_of(syntax), [text[:end]], is_cut=True) == [("f", '{"text": "P')]


@pytest.mark.parametrize(("syntax", "text", "right"), [
    (ToolSyntax.HERMES, f"So: {hermes(CALL)}\n<tool_call>\n{{\"name\": \"", ["So: ", F]),
    (ToolSyntax.HERMES, "So: <tool_call>\n", ["So: "]), (ToolSyntax.QWEN_XML, "So: <tool_call>\n<function=g", ["So: "]),
    (ToolSyntax.HERMES, "1 <", ["1 <"]), (ToolSyntax.LLAMA3_JSON, '{"name', ['{"name']),
    (ToolSyntax.HERMES, hermes(CALL) + "\nSo", [F, "\nSo"]), (ToolSyntax.HERMES, f"<tool_call>{CALL}</tool", [F]),
])  # fmt: skip
def test_a_call_that_was_cut_before_its_name_leaves_no_marks(syntax: ToolSyntax, text: str, right: list) -> None:
    assert read(use_of(syntax), [text], is_cut=True) == read(use_of(syntax), list(text), is_cut=True) == right


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        ("<tool_call>{{ tools }}", ToolSyntax.HERMES),
        ("<tool_call>\n<function={{ n }}>\n<parameter=", ToolSyntax.QWEN_XML),
        ("[TOOL_CALLS]", ToolSyntax.MISTRAL), ("<tool_call>{{ n }}<arg_key>", ToolSyntax.GLM), ("{{ messages }}", None),
        ('{"name": x, "parameters": y} <|python_tag|>', ToolSyntax.LLAMA3_JSON), (None, None),
    ],
)  # fmt: skip
def test_the_template_shows_how_its_model_calls(template: str | None, syntax: ToolSyntax | None) -> None:
    assert syntax_of_template(template) is syntax
