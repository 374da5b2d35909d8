"""/v1/messages: Anthropic's shape of a chat, over the same requests as every other route."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, say
from running_server import Running, StartServer

from megatron_medha.server.routes.generate import IGNORED_HEADER
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
END = 257
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<tool_call>\n{% endif %}"
    "{{ enable_thinking }}{{ thinking }}{{ reasoning_effort }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HI: dict[str, Any] = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": {
    "type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"], "additionalProperties": False,
}}  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture
def says(start_server: StartServer, tokenizer: Tokenizer) -> Callable[..., Running]:
    with_tools = Tokenizer(tokenizer._backend, TokenizerConfig(eos_token="</s>", chat_template=TEMPLATE))

    def start(text: str, **settings: object) -> Running:
        engine = FakeEngine(rule=say([*text.encode(), END]), max_request_tokens=4000)
        return start_server(engine, with_tools, **settings)

    return start


def ask(server: Running, messages: list | None = None, **fields: object) -> dict:
    body = {"model": "fake-model", "max_tokens": 100, "messages": messages or [HI], **fields}
    response = server.post(MESSAGES, body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(server: Running) -> str:
    return bytes(server.engine.submitted[-1].prompt.tolist()).decode()


def stream(server: Running, **fields: object) -> list[dict]:
    body = {"model": "fake-model", "max_tokens": 100, "messages": [HI], "stream": True, **fields}
    with server.client.stream("POST", MESSAGES + "?beta=true", json=body) as response:
        assert response.status_code == 200, response.read()
        blocks = response.read().decode().strip().split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def assert_anthropic_error(response: httpx.Response, status: int, kind: str, part: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert part in body["error"]["message"]


def test_a_message_has_anthropics_shape(says: Callable[..., Running]) -> None:
    server = says("Good day.")
    message = ask(server, system="Be kind.")
    assert message.pop("id").startswith("msg")
    assert message == {
        "type": "message", "role": "assistant", "model": "fake-model", "stop_reason": "end_turn",
        "stop_sequence": None, "content": [{"type": "text", "text": "Good day."}],
        "usage": {"input_tokens": len(prompt_of(server)), "output_tokens": 10, "cache_creation_input_tokens": 0,
                  "cache_read_input_tokens": 0},
    }  # fmt: skip
    assert prompt_of(server) == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"


def test_it_is_the_same_request_as_a_chat(says: Callable[..., Running]) -> None:
    server = says("x")
    fields: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3}
    ask(server, **fields, stop_sequences=["a"])
    chat = {"messages": [HI], "max_tokens": 100, "stop": ["a"], **fields}
    assert server.post("/v1/chat/completions", chat).status_code == 200
    ours, theirs = server.engine.submitted
    assert (ours.prompt, ours.sampling) == (theirs.prompt, theirs.sampling)
    assert ours.request.max_output_tokens == theirs.request.max_output_tokens


def test_a_stream_opens_and_closes_every_block(says: Callable[..., Running]) -> None:
    events = stream(says("Look: " + CALL), tools=[WEATHER])
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    around = [event for event in events if event["type"] != "content_block_delta"]
    assert [event["type"] for event in around] == [
        "message_start", "ping", "content_block_start", "content_block_stop", "content_block_start",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    start = around[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None) and start["usage"]["input_tokens"] > 0
    assert around[2]["content_block"] == {"type": "text", "text": ""}
    assert around[4]["content_block"].pop("id")
    assert around[4]["content_block"] == {"type": "tool_use", "name": "weather", "input": {}}
    texts = [event["delta"]["text"] for event in deltas if event["delta"]["type"] == "text_delta"]
    parts = [event["delta"]["partial_json"] for event in deltas if event["delta"]["type"] == "input_json_delta"]
    assert "".join(texts).strip() == "Look:" and json.loads("".join(parts)) == {"city": "Oslo"}
    assert around[6]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert around[6]["usage"]["output_tokens"] > 0


def test_a_call_and_its_result_go_there_and_back(says: Callable[..., Running]) -> None:
    server = says(CALL)
    first = ask(server, tools=[WEATHER])
    assert first["stop_reason"] == "tool_use"
    (call,) = first["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "rain"}],
              "cache_control": {"type": "ephemeral"}}  # fmt: skip
    failed = {**result, "is_error": True, "content": "no net"}
    more = {"type": "text", "text": "and now?"}
    messages = [HI, {"role": "assistant", "content": first["content"]},
                {"role": "user", "content": [result, failed, more]}]  # fmt: skip
    ask(server, messages, tools=[WEATHER])
    assert prompt_of(server).endswith(
        '<|assistant|><call>{"name": "weather", "arguments": {"city": "Oslo"}}<|end|><|tool|>rain<|end|>'
        "<|tool|>Error: no net<|end|><|user|>and now?<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("fields", "in_prompt", "ignored"),
    [
        ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                     {"type": "text", "text": "b"}]}, "<|system|>a\nb<|end|>", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "TrueTrue", None),
        ({"thinking": {"type": "disabled"}}, "FalseFalse", None),
        ({"output_config": {"effort": "low"}}, "low<|user|>", None),
        ({"metadata": {"user_id": "u"}, "service_tier": "standard_only", "container": None}, "hi", None),
        ({"context_management": {"edits": [{"type": "clear_thinking"}]}, "betas": ["a"]}, "hi", None),
        ({"tools": [WEATHER, {"type": "web_search_20250305", "name": "web_search"}]}, '"weather"', "tools[1]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "auto"}}, "hi",
         "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": {"type": "none"}}, "hi", None),
        ({"messages": [HI, {"role": "assistant", "content": "Well"}]}, "<|assistant|>Well", None),
        ({"messages": [HI, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Yes."}]}, HI]}, "<|assistant|>Yes.<|end|><|user|>hi", None),
        ({"messages": [{"role": "user", "content": [
            {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}},
            {"type": "search_result", "title": "S", "source": "where", "content": [{"type": "text", "text": "R"}]},
        ]}]}, "T\nD\nS\nwhere\nR", None),
        ({"messages": [HI, {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result"}]},
            {"type": "text", "text": "Found."}]}, HI]}, "Found.", "messages[1].content[0], messages[1].content[1]"),
    ],
)  # fmt: skip
def test_what_clients_send_reaches_the_prompt_or_is_left_out(
    says: Callable[..., Running], fields: dict, in_prompt: str, ignored: str | None
) -> None:
    server = says("x")
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    body = {"model": "fake-model", "max_tokens": 9, "messages": [HI], **fields}
    response = server.post(MESSAGES, body, headers=headers)
    assert response.status_code == 200, response.text
    assert in_prompt in prompt_of(server)
    assert response.headers.get(IGNORED_HEADER) == ignored


def test_why_a_message_ended_is_said_in_anthropics_words(says: Callable[..., Running]) -> None:
    server = says("one two three")
    assert ask(server, max_tokens=3)["stop_reason"] == "max_tokens"
    stopped = ask(server, stop_sequences=["three", "two"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "two")
    assert stopped["content"] == [{"type": "text", "text": "one "}]
    events = stream(server, stop_sequences=["two"])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "two"}
    assert ask(says(""))["content"] == []


def test_a_call_that_was_cut_has_the_arguments_so_far(says: Callable[..., Running]) -> None:
    server = says('<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 12}}</tool_call>')
    cut = ask(server, tools=[WEATHER], max_tokens=65)
    assert (cut["stop_reason"], cut["content"][0]["input"]) == ("max_tokens", {"city": "Oslo"})
    ask(server, [HI, {"role": "assistant", "content": cut["content"]}, HI], tools=[WEATHER], system=[])
    assert '"city": "Oslo"' in prompt_of(server) and "<|system|>" not in prompt_of(server)


def test_a_tool_can_be_demanded(says: Callable[..., Running]) -> None:
    pytest.importorskip("llguidance")
    server = says('{"city": "Oslo"}')
    message = ask(server, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    assert message["content"][0]["input"] == {"city": "Oslo"} and message["stop_reason"] == "tool_use"
    assert server.engine.submitted[-1].sampling.grammar is not None
    listed = says('[{"name": "weather", "arguments": {"city": "Oslo"}}]')
    choice = {"type": "any", "disable_parallel_tool_use": True}
    assert len(ask(listed, tools=[WEATHER], tool_choice=choice)["content"]) == 1


def test_the_form_of_a_text_can_be_demanded(says: Callable[..., Running]) -> None:
    pytest.importorskip("llguidance")
    server = says('{"city": "Oslo"}')
    wanted = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        ask(server, **fields)
        assert server.engine.submitted[-1].sampling.grammar is not None


def test_tokens_are_counted_as_the_message_would_have_them(says: Callable[..., Running]) -> None:
    server = says("x")
    fields: dict[str, Any] = {"model": "fake-model", "messages": [HI], "system": "s", "tools": [WEATHER]}
    counted = server.post(COUNT + "?beta=true", fields).json()
    assert counted == {"input_tokens": ask(server, system="s", tools=[WEATHER])["usage"]["input_tokens"]}
    begun = [HI, {"role": "assistant", "content": "Well"}]
    assert server.post(COUNT, {"messages": begun}).json() == {
        "input_tokens": ask(server, begun)["usage"]["input_tokens"]
    }
    assert_anthropic_error(server.post(COUNT, {"messages": []}), 400, "invalid_request_error", "messages")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
         "messages[0].content[0]: this server reads text alone"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
            {"type": "image", "source": {"type": "url"}}]}]}]}, "messages[0].content[0].content[0]: this server"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "x"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0]"),
        ({"system": "s", "messages": [HI, {"role": "nobody", "content": "x"}]}, "messages[1].role"),
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"), ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [{"name": "not a name", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": str(place), "input_schema": {}} for place in range(513)]}, "tools: at most 512"),
    ],
)  # fmt: skip
def test_a_bad_message_gets_anthropics_error(says: Callable[..., Running], fields: dict, part: str) -> None:
    body = {"model": "fake-model", "max_tokens": 9, "messages": [HI], **fields}
    assert_anthropic_error(says("x").post(MESSAGES, body), 400, "invalid_request_error", part)


def test_a_prompt_that_does_not_fit_is_said_in_the_words_that_claude_code_reads(says: Callable[..., Running]) -> None:
    server = says("x")
    body = {"messages": [HI], "max_tokens": 5000}
    length = server.post(COUNT, body).json()["input_tokens"]
    part = f"input length and `max_tokens` exceed context limit: {length} + 5000 > 4000"
    assert_anthropic_error(server.post(MESSAGES, body), 400, "invalid_request_error", part)
    long = {"messages": [{"role": "user", "content": "a" * 4100}], "max_tokens": 9}
    assert_anthropic_error(server.post(MESSAGES, long), 400, "invalid_request_error", "prompt is too long: ")


def test_every_error_of_the_route_has_anthropics_shape(says: Callable[..., Running]) -> None:
    server = says("x", api_key="k" * 32, max_body_bytes=4000)
    key = {"x-api-key": "k" * 32}
    body = {"model": "other", "messages": [HI], "max_tokens": 9}
    assert_anthropic_error(server.post(MESSAGES, body), 401, "authentication_error", "x-api-key")
    assert_anthropic_error(server.post(MESSAGES, body, headers=key), 404, "not_found_error", "other")
    assert_anthropic_error(server.get(MESSAGES, headers=key), 405, "invalid_request_error", "")
    large = {**body, "system": "x" * 5000}
    assert_anthropic_error(server.post(MESSAGES, large, headers=key), 413, "request_too_large", "limit")
    assert_anthropic_error(
        server.client.post(MESSAGES, content=b"{", headers=key), 400, "invalid_request_error", "JSON"
    )


def test_a_failure_inside_a_stream_is_an_event(start_server: StartServer, tokenizer: Tokenizer) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    body = {"model": "fake-model", "max_tokens": 9, "messages": [HI], "stream": True}
    server.engine.step(1)
    with server.client.stream("POST", MESSAGES, json=body) as response:
        lines = response.iter_lines()
        for line in lines:
            if "content_block_delta" in line:
                break
        server.engine.fail("rank 0 died")
        rest = [line for line in lines if line]
    assert rest[-2] == "event: error"
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "api_error"
    server.assert_nothing_is_left()


def test_a_key_may_come_in_either_header(says: Callable[..., Running]) -> None:
    server = says("x", api_key="k" * 32)
    right, wrong = "k" * 32, "w" * 32
    body = {"max_tokens": 9, "messages": [HI]}
    for headers, status in (
        ({"x-api-key": right}, 200), ({"authorization": f"Bearer {right}"}, 200),
        ({"x-api-key": right, "authorization": f"Bearer {wrong}"}, 200),
        ({"x-api-key": wrong, "authorization": f"Bearer {right}"}, 200),
        ({"x-api-key": wrong}, 401), ({"x-api-key": ""}, 401), ({}, 401),
    ):  # fmt: skip
        assert server.post(MESSAGES, body, headers=headers).status_code == status, headers
