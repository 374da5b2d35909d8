"""What a server has answered comes back as history: every template kind takes it, cut or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeEngine, say
from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import Running, StartServer

from megatron_medha.server.bodies.openai_types import CalledFunction, ChatMessage, ToolCall
from megatron_medha.server.openai.chat_prompt import _plain_message
from megatron_medha.server.tools.json_text import read_cut_object
from megatron_medha.text.chat.chat_template import ChatTemplate
from megatron_medha.text.chat.whole_chat import render_whole
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
END = 257
NAMES_ROLES = (  # as Qwen 2.5: roles that it does not name vanish
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}"
    "{% if m.role in ('user', 'system') or (m.role == 'assistant' and not m.tool_calls) %}"
    "<{{ m.role }}>{{ m.content }}</>"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content or '' }}{% for t in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments | tojson }}}\n</tool_call>{% endfor %}</>'
    "{% elif m.role == 'tool' %}<user><tool_response>{{ m.content }}</tool_response></>{% endif %}{% endfor %}"
)
AS_TAGS = (  # as Qwen3-Coder: goes through the arguments
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for t in m.tool_calls or [] %}<tool_call>\n<function={{ t.function.name }}>\n"
    "{% for name, value in t.function.arguments | items %}"
    "<parameter={{ name }}>\n"
    "{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}"
    "{% endfor %}"
)
ONE_CALL = (  # as Llama 3.1: one call a message, if there is the field at all
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call a message') }}{% endif %}<assistant>{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}</>'
    "{% else %}<{{ m.role }}>{{ m.content }}</>{% endif %}{% endfor %}{% if tools %}ipython{% endif %}"
)
NINE = (  # as Mistral: ids of nine letters and digits, the same for a call and its result
    "{% for m in messages %}{% for t in m.tool_calls or [] %}{% if t.id | length != 9 %}{{ raise_exception('nine') }}"
    "{% endif %}[TOOL_CALLS]{{ t.function.name }}[CALL_ID]{{ t.id }}[ARGS]{{ t.function.arguments | tojson }}"
    "{% endfor %}{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.tool_call_id }}{% endif %}[{{ m.role }}]{{ m.content or '' }}{% endfor %}"
    "{% if tools %}[AVAILABLE_TOOLS]{% endif %}"
)
PARTS = (  # as vision models: contents are lists of parts; calls have no place
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}</>{% endfor %}"
)
IN_TURN = (  # as Gemma: no system, user and assistant in turn, no tools
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}"
    "{% endif %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
)
KINDS = {"names roles": NAMES_ROLES, "tags": AS_TAGS, "one call": ONE_CALL, "nine": NINE, "parts": PARTS,
         "in turn": IN_TURN, "none": None}  # fmt: skip
WORD = st.text("abc é\n\"'<\\", min_size=1, max_size=8).map(str.strip).filter(bool)
CALLS = st.lists(
    st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab"), WORD | st.integers(0, 99), max_size=2)),
    min_size=1, max_size=3,
)  # fmt: skip


def history_of(calls: list[tuple[str, str]], text: str | None) -> list[ChatMessage]:
    made = [ToolCall(id=f"call_{place:024}", function=CalledFunction(name=name, arguments=arguments))
            for place, (name, arguments) in enumerate(calls)]  # fmt: skip
    results = [
        ChatMessage(role="tool", content=f"result {place}", tool_call_id=call.id) for place, call in enumerate(made)
    ]
    first, last = ChatMessage(role="user", content="What is it?"), ChatMessage(role="user", content="And?")
    return [first, ChatMessage(role="assistant", content=text, tool_calls=made), *results, last]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(calls=CALLS, text=st.sampled_from([None, "Let me see."]), num_cut=st.integers(0, 12))
def test_calls_and_results_come_back_in_every_template_kind(
    kind: str, calls: list[tuple[str, dict]], text: str | None, num_cut: int
) -> None:
    written = [(name, json.dumps(arguments)) for name, arguments in calls]
    last, arguments = written[-1]
    written[-1] = (last, arguments[: max(0, len(arguments) - num_cut)])
    messages = [_plain_message(place, message) for place, message in enumerate(history_of(written, text))]
    prompt = render_whole(ChatTemplate(KINDS[kind], {}), messages).text
    places = [prompt.index(f"result {place}") for place in range(len(calls))]
    assert places == sorted(places) and prompt.index("What is it?") < places[0] < prompt.index("And?")
    for _, given_arguments in written:
        for value in read_cut_object(given_arguments).values():
            texts = [str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)]
            assert any(one in prompt for one in texts)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ('{"city": "Par', {"city": "Par"}), ('{"a": "line1\nline2"}', {"a": "line1\nline2"}), ('{"a": 1,}', {"a": 1}),
        ("null", {}), ("[1]", {}), ("ls -l", {}), ("", {}), ('{"a": 1, "ci', {"a": 1}), ('{"a": tru', {}),
        ("{" * 9999, {}),
        ('{"a": [1, {"b": "c', {"a": [1, {"b": "c"}]}), ('{"n": 123456789012345678901}', {"n": 123456789012345678901}),
    ],
)  # fmt: skip
def test_arguments_that_are_no_json_are_read_as_far_as_they_go(arguments: str, right: dict) -> None:
    assert read_cut_object(arguments) == right


SayIt = Callable[[str, str | None], Running]


@pytest.fixture
def says(start_server: StartServer, tokenizer: Tokenizer) -> SayIt:
    def start(text: str, template: str | None) -> Running:
        told = Tokenizer(tokenizer._backend, TokenizerConfig(eos_token="</s>", chat_template=template))
        return start_server(FakeEngine(rule=say([*text.encode(), END])), told)

    return start


TOOL: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_was_cut_in_a_call_can_be_sent_back_on_every_route(says: SayIt, kind: str) -> None:
    begin = {"one call": "", "nine": "[TOOL_CALLS]["}.get(kind, "<tool_call>\n")
    text = begin + '{"name": "f", "arguments": {"city": "Par'
    server = says(text, KINDS[kind])
    question, size = {"role": "user", "content": "hi"}, len(text)

    body = {"messages": [question], "tools": [{"type": "function", "function": TOOL}], "max_tokens": size}
    answer = server.post(CHAT, body).json()["choices"][0]
    assert answer["finish_reason"] == "length"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Par'
    result = {"role": "tool", "tool_call_id": call["id"], "content": "none"}
    again = server.post(CHAT, {**body, "messages": [question, answer["message"], result]})
    assert again.status_code == 200, again.text

    body = {"input": [question], "tools": [{"type": "function", **TOOL}], "max_output_tokens": size}
    output = server.post(RESPONSES, body).json()["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "none"}
    again = server.post(RESPONSES, {**body, "input": [question, *output, result]})
    assert again.status_code == 200, again.text

    tool = {"name": "f", "input_schema": {"type": "object"}}
    body = {"model": "fake-model", "messages": [question], "tools": [tool], "max_tokens": size}
    content = server.post(MESSAGES, body).json()["content"]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": content[-1]["id"], "content": "none"}]}
    again = server.post(MESSAGES, {**body, "messages": [question, {"role": "assistant", "content": content}, result]})
    assert again.status_code == 200, again.text


def test_calls_and_reasoning_in_the_words_of_other_servers_are_taken_back(says: SayIt) -> None:
    server = says("ok", "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
                        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}")  # fmt: skip
    function = {"name": "f", "arguments": {"city": "Oslo"}}
    thought = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "I look."}]
    messages = [
        {"role": "assistant", "content": thought, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": None},
        {"role": "assistant", "reasoning_content": "Well.", "content": None, "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": None}}]},
    ]  # fmt: skip
    answer = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False})
    prompt = bytes(answer.json()["tokens"]).decode()
    calls = [f'[{{"id": "{call_id}", "type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}]'
             for call_id, arguments in (("call_f", '{"city": "Oslo"}'), ("1", "{}"))]  # fmt: skip
    assert prompt == f"<assistant>I look.{calls[0]}<tool><assistant>Well.None{calls[1]}"
    too_deep = '{"a":' * 900 + "1" + "}" * 900
    body = json.dumps({"messages": messages}).replace('{"city": "Oslo"}', too_deep)
    assert server.client.post(CHAT, content=body.encode()).status_code in (200, 400)


@pytest.mark.parametrize("name", ["f", r"\ud83d"])
def test_half_a_surrogate_pair_in_a_call_is_answered_and_taken_back_on_every_route(says: SayIt, name: str) -> None:
    call = r'<tool_call>{"name": "NAME", "arguments": {"city": "a\ud83d"}}</tool_call>'.replace("NAME", name)
    server = says(call, NAMES_ROLES)
    question = {"role": "user", "content": "hi"}

    chat = {"messages": [question], "tools": [{"type": "function", "function": TOOL}]}
    message = server.post(CHAT, chat).json()["choices"][0]["message"]
    assert [call["function"]["arguments"] for call in message.get("tool_calls", ())] in ([], [r'{"city": "a\ufffd"}'])
    assert server.post(CHAT, {**chat, "messages": [question, message]}).status_code == 200
    server.events(CHAT, chat)
    response = {"input": [question], "tools": [{"type": "function", **TOOL}]}
    output = server.post(RESPONSES, response).json()["output"]
    assert server.post(RESPONSES, {**response, "input": [question, *output]}).status_code == 200
    server.events(RESPONSES, response)
    body = {"model": "fake-model", "messages": [question], "max_tokens": 200,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}]}  # fmt: skip
    (block,) = server.post(MESSAGES, body).json()["content"]
    assert block.get("input", {}) in ({}, {"city": "a\ufffd"})
    assert json.loads(server.events(MESSAGES, body)[-1]) == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("stop", "arguments", "is_whole"),
    [("\n", '{"city": "Oslo"', False), ("slo", '{"city": "O', False), ("}", '{"city": "Oslo",\n"n": 1', False),
     ("</tool_call>", '{"city": "Oslo",\n"n": 1}', True)],
)  # fmt: skip
def test_a_call_that_a_stop_string_cuts_is_not_completed(
    says: SayIt, stop: str, arguments: str, is_whole: bool
) -> None:
    server = says('<tool_call>{"name": "f", "arguments": {"city": "Oslo",\n"n": 1}}\n</tool_call>', NAMES_ROLES)
    question = {"role": "user", "content": "hi"}

    body = {"messages": [question], "tools": [{"type": "function", "function": TOOL}], "stop": stop}
    choice = server.post(CHAT, body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    assert choice["finish_reason"] == ("tool_calls" if is_whole else "stop")
    events = [json.loads(event) for event in server.events(CHAT, body)[:-1]]
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    body = {"input": [question], "tools": [{"type": "function", **TOOL}], "stop": stop}
    (item,) = server.post(RESPONSES, body).json()["output"]
    assert item["status"] == ("completed" if is_whole else "incomplete")


AROUND = 'I look.\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n\nNow:\n\n    x = 1\n\n- a\n- b'


def test_text_around_a_call_is_the_same_whole_and_in_streams_of_every_route(says: SayIt) -> None:
    server = says(AROUND, NAMES_ROLES)
    first, after = "I look.\n\n", "\n\nNow:\n\n    x = 1\n\n- a\n- b"
    question = {"role": "user", "content": "hi"}

    body = {"messages": [question], "tools": [{"type": "function", "function": TOOL}]}
    assert server.post(CHAT, body).json()["choices"][0]["message"]["content"] == first + after
    deltas = [json.loads(event)["choices"][0]["delta"] for event in server.events(CHAT, body)[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == first + after

    body = {"input": [question], "tools": [{"type": "function", **TOOL}]}
    output = server.post(RESPONSES, body).json()["output"]
    assert [item["content"][0]["text"] for item in output if item["type"] == "message"] == [first, after]
    events = [json.loads(event) for event in server.events(RESPONSES, body)]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == first + after

    body = {"model": "fake-model", "messages": [question], "max_tokens": 200,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}]}  # fmt: skip
    content = server.post(MESSAGES, body).json()["content"]
    assert [block["text"] for block in content if block["type"] == "text"] == [first, after]
    events = [json.loads(event) for event in server.events(MESSAGES, body)]
    texts = [event["delta"]["text"] for event in events if event.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == first + after


def test_log_probabilities_of_a_response_are_those_of_its_texts_not_of_calls(says: SayIt) -> None:
    server = says(AROUND, NAMES_ROLES)
    body = {"input": "hi", "tools": [{"type": "function", **TOOL}], "include": ["message.output_text.logprobs"]}
    output = server.post(RESPONSES, body).json()["output"]
    parts = [item["content"][0] for item in output if item["type"] == "message"]
    assert len(parts) == 2
    for part in parts:
        assert "".join(token["token"] for token in part["logprobs"]) == part["text"]


def test_a_call_that_is_thought_about_is_text_also_where_the_template_opens_the_thought(says: SayIt) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    server = says(f"Perhaps {call}?\n</think>\n\nNo.", NAMES_ROLES + "<think>\n")
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": TOOL}]}
    choice = server.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == f"Perhaps {call}?\n</think>\n\nNo."
    assert not any("tool_calls" in json.loads(event)["choices"][0]["delta"] for event in server.events(CHAT, body)[:-1])
    output = server.post(RESPONSES, {"input": "hi", "tools": [{"type": "function", **TOOL}]}).json()["output"]
    assert [item["type"] for item in output] == ["message"]
    begun = {"role": "assistant", "content": "<think>\nWell,"}
    continued = says(f"perhaps {call}?\n</think>\n\nNo.", NAMES_ROLES)
    body |= {"messages": [*body["messages"], begun], "continue_final_message": True, "add_generation_prompt": False}
    assert continued.post(CHAT, body).json()["choices"][0]["finish_reason"] == "stop"
