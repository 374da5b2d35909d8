"""Tools together with a form that answers must match, and with chat templates that have no place for tools."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from fake_engine import FakeEngine, say
from running_server import StartServer
from test_structured_output import END, HI, TEMPLATE, TOOLS, WEATHER, obey

from megatron_medha.grammar.grammar_process import CompileRequest, _written_out
from megatron_medha.grammar.guidance import GrammarCompiler
from megatron_medha.server.tools.call_grammar import calls_or_text
from megatron_medha.server.tools.call_readers import TextDelta, ToolArgumentsDelta, ToolCallStart
from megatron_medha.server.tools.structured_output import json_constraint
from megatron_medha.server.tools.tool_calls import ToolCallParser
from megatron_medha.server.tools.tool_fields import ToolUse
from megatron_medha.text.chat.call_syntax import MARKS, ToolSyntax
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

pytest.importorskip("llguidance")
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ANSWER = {
    "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}
NO_TOOLS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def with_template(tokenizer: Tokenizer, template: str | None, special: tuple[str, ...] = ()) -> Tokenizer:
    backend = type(tokenizer._backend).from_str(tokenizer._backend.to_str())
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, TokenizerConfig(eos_token="</s>", chat_template=template))


def read(use: ToolUse, text: str) -> tuple[str, list[list[str]]]:
    finder = ToolCallParser(use)
    said, calls = "", []
    for one in [*finder.push(text), *finder.finish()]:
        match one:
            case TextDelta():
                said += one.text
            case ToolCallStart():
                calls.append([one.name, ""])
            case ToolArgumentsDelta():
                calls[-1][1] += one.arguments
    return said, calls


@pytest.mark.parametrize("syntax", [one for one in ToolSyntax if one not in (ToolSyntax.LIST, ToolSyntax.ARGUMENTS)])
@pytest.mark.parametrize(("is_special", "is_parallel"), [(False, True), (True, False)])
def test_in_every_syntax_an_answer_is_a_call_or_text_of_the_form(
    tokenizer: Tokenizer, syntax: ToolSyntax, is_special: bool, is_parallel: bool
) -> None:
    told = with_template(tokenizer, TEMPLATE, MARKS[syntax].openings[:1] if is_special else ())
    names = frozenset({"weather", "now"})
    use = ToolUse(syntax=syntax, names=names, definitions=tuple(TOOLS), is_parallel=is_parallel)
    use = calls_or_text(use, json_constraint(ANSWER, "response_format"), told.token_id)
    assert use.guide is not None
    compiler = GrammarCompiler(told.as_json(), 300, (END,))
    matcher = compiler.matcher(_written_out(CompileRequest(use.guide.kind, use.guide.text)))
    kinds = set()
    for seed in range(20):
        walk, text, chance = matcher.deep_copy(), b"", random.Random(seed)
        while not (walk.is_accepting() and (walk.is_stopped() or chance.random() < 0.5)):
            bits = int.from_bytes(walk.compute_bitmask(), "little")
            allowed = [one for one in range(300) if bits >> one & 1 and one != END]
            token = chance.choice(allowed if text else allowed[-2:])  # begins with a call as often as with text
            assert walk.consume_token(token)
            text += told.token_bytes(token)
        said, calls = read(use, text.decode())
        kinds.add(bool(calls))
        assert not (said and calls) and len(calls) <= (16 if is_parallel else 1), text
        if not calls:
            assert set(json.loads(said)) == {"ok"}
        for name, arguments in calls:
            assert set(json.loads(arguments)) == ({"city", "days"} if name == "weather" else set())
    assert kinds == {False, True}


def test_a_chat_with_tools_and_a_form_gets_a_call_or_text_that_matches(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    told = with_template(tokenizer, TEMPLATE)
    server = start_server(FakeEngine(rule=obey(told)), told)
    functions = [{"type": "function", **tool["function"]} for tool in TOOLS]
    seen = set()
    for seed in range(12):
        body = {"messages": HI, "tools": TOOLS, "response_format": FORMAT, "seed": seed, "max_tokens": 400}
        choice = server.post(CHAT, body).json()["choices"][0]
        seen.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"ok"}
        else:
            assert choice["message"]["tool_calls"] and choice["message"]["content"] is None
    assert seen == {"stop", "tool_calls"}
    form = {"format": {"type": "json_schema", "name": "a", "schema": ANSWER}}
    body = {"input": "hi", "tools": functions, "text": form, "parallel_tool_calls": False, "max_output_tokens": 400}
    answer = server.post(RESPONSES, body).json()
    assert answer["status"] == "completed" and answer["output"]
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "response_format": FORMAT}
        assert server.post(CHAT, body).json()["choices"][0]["message"]["tool_calls"]
    guides = {"guided_regex": "[a-c]+d", "guided_choice": ["yes", "no"], "guided_grammar": 'start: "a" b\nb: "b"'}
    for fields in ({name: guide} for name, guide in guides.items()):
        assert server.post(CHAT, {"messages": HI, "tools": TOOLS, "max_tokens": 300, **fields}).status_code == 200


@pytest.mark.parametrize("given", [
    {"type": "json_object", "schema": ANSWER}, {"type": "json_schema", "schema": ANSWER},
    {"type": "json_object", "json_schema": {"schema": ANSWER}},
])  # fmt: skip
def test_a_schema_is_honoured_where_other_servers_have_it(
    start_server: StartServer, tokenizer: Tokenizer, given: dict[str, Any]
) -> None:
    server = start_server(FakeEngine(rule=obey(tokenizer)))
    body = {"messages": HI, "response_format": given, "max_tokens": 100}
    assert set(json.loads(server.post(CHAT, body).json()["choices"][0]["message"]["content"])) == {"ok"}


@pytest.mark.parametrize("template", [NO_TOOLS, None, NO_TOOLS + "{{ tools }}"])
def test_any_chat_model_can_call_tools(start_server: StartServer, tokenizer: Tokenizer, template: str | None) -> None:
    told = with_template(tokenizer, template)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    server = start_server(FakeEngine(rule=say([*call.encode(), END]), max_request_tokens=3000), told)
    choice = server.post(CHAT, {"messages": HI, "tools": TOOLS}).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [one["function"]["name"] for one in choice["message"]["tool_calls"]] == ["now"]
    prompt = bytes(server.engine.submitted[-1].prompt.tolist()).decode()
    assert prompt.startswith(("<|system|>", "system: ")) and json.dumps(WEATHER) in prompt and "<tool_call>" in prompt
    counted = server.post("/tokenize", {"messages": HI, "tools": TOOLS}).json()["count"]
    assert counted == len(prompt)
    told_first = [{"role": "system", "content": "Be kind."}, *HI]
    server.post(CHAT, {"messages": told_first, "tools": TOOLS, "max_tokens": 1})
    prompt = bytes(server.engine.submitted[-1].prompt.tolist()).decode()
    assert prompt.count("system") == 1 and "Be kind.\n\n" in prompt

    obedient = start_server(FakeEngine(rule=obey(told), max_request_tokens=3000), told)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        body = {"messages": HI, "tools": TOOLS, "tool_choice": choice}
        message = obedient.post(CHAT, body).json()["choices"][0]["message"]
        assert message["tool_calls"] and all(json.loads(one["function"]["arguments"]) is not None
                                             for one in message["tool_calls"])  # fmt: skip


def test_templates_may_go_through_the_parameters_of_every_tool(start_server: StartServer, tokenizer: Tokenizer) -> None:
    source = "{% for t in tools or [] %}{% for name in t.function.parameters.properties.keys() %}{{ name }}{% endfor %}"
    told = with_template(tokenizer, source + "<tool_call>{% endfor %}{{ messages[0].content }}")
    tools = [*TOOLS, {"type": "function", "function": {"name": "x", "parameters": {"type": "object"}}}]
    answer = start_server(tokenizer=told).post(CHAT, {"messages": HI, "tools": tools, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["byte_level", "other"])
def test_marks_of_calls_are_seen_also_where_they_are_special_tokens(
    start_server: StartServer, tokenizer: Tokenizer, kind: str
) -> None:
    told = with_template(tokenizer, "[TOOL_CALLS]{{ tools }}{{ messages[0].content }}", ("[TOOL_CALLS]", "[ARGS]"))
    if kind == "other":
        told.kind = type(told.kind).OTHER
    ids = [told.token_id("[TOOL_CALLS]"), *b"now", told.token_id("[ARGS]"), *b"{}", END]
    server = start_server(FakeEngine(rule=say(ids)), told)
    message = server.post(CHAT, {"messages": HI, "tools": TOOLS}).json()["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    plain = server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "none"}).json()["choices"][0]["message"]
    assert plain["content"] == "now{}"


@pytest.mark.parametrize(
    ("special", "text"),
    [
        (("｜DSML｜",), '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n'
                     '<｜DSML｜parameter name="zone" string="true">UTC</｜DSML｜parameter>\n'
                     "</｜DSML｜invoke>\n</｜DSML｜function_calls>"),
        (("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
         "<tool_call>now\n<arg_key>zone</arg_key>\n<arg_value>UTC</arg_value>\n</tool_call>"),
    ],
)  # fmt: skip
def test_tokens_inside_of_calls_are_seen_also_where_they_are_special_ones(
    start_server: StartServer, tokenizer: Tokenizer, special: tuple[str, ...], text: str
) -> None:
    told = with_template(tokenizer, text + "{{ tools }}{{ messages[0].content }}", special)
    server = start_server(FakeEngine(rule=say([*told.encode(text, add_special_tokens=False), END])), told)
    (call,) = server.post(CHAT, {"messages": HI, "tools": TOOLS}).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}
