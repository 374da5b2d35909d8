"""What a request may ask for in vain: fields that change no answer are left out, and the answer's header says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, say
from running_server import Running, StartServer

from megatron_medha.server.bodies.responses_types import OutputMessage, OutputText
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.openai.recent_items import RecentItems
from megatron_medha.server.routes.generate import IGNORED_HEADER
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
END = 257
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<tool_call>\n{% endif %}{{ reasoning_effort }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
)
HI = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
RUN = {"type": "function", "name": "run", "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}}
PATCH = {
    "type": "custom", "name": "patch", "description": "edits",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}  # fmt: skip
SPACE = {"type": "namespace", "name": "mcp", "tools": [RUN, {"type": "computer"}]}


@pytest.fixture
def says(start_server: StartServer, tokenizer: Tokenizer) -> Callable[[str], Running]:
    with_tools = Tokenizer(tokenizer._backend, TokenizerConfig(eos_token="</s>", chat_template=TEMPLATE))
    return lambda text: start_server(
        FakeEngine(rule=say([*text.encode(), END]), max_request_tokens=4000), with_tools
    )


@pytest.fixture
def server(says: Callable[[str], Running]) -> Running:
    return says("Good day.")


def prompt_of(server: Running) -> str:
    return bytes(server.engine.submitted[-1].prompt.tolist()).decode()


def answered(response: httpx.Response) -> dict:
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]}, None),
        ({"reasoning": {"summary": "auto"}}, None), ({"reasoning": {"effort": None, "summary": None}}, None),
        ({"truncation": "auto"}, None), ({"store": True}, None), ({"max_tool_calls": 3}, None),
        ({"text": {"verbosity": "low"}}, None), ({"service_tier": "auto"}, None), ({"top_logprobs": 0}, None),
        ({"service_tier": "of tomorrow"}, "service_tier"), ({"metadata": {"a": "b"}, "user": "u"}, None),
        ({"safety_identifier": "s", "prompt_cache_key": "k", "client_metadata": {"a": "b"}}, None),
        ({"stream_options": {"include_obfuscation": False}}, None), ({"parallel_tool_calls": False}, None),
        ({"tools": [RUN, {"type": "web_search", "filters": {"a": [1]}}]}, "tools[1]"),
        ({"tools": [{"type": "local_shell"}], "tool_choice": "auto"}, "tools[0]"),
        ({"tools": [RUN, SPACE]}, "tools[1].tools[1]"), ({"tools": [RUN, PATCH]}, None),
        ({"tools": [{**RUN, "strict": None, "description": None}]}, None),
        ({"tools": [RUN], "tool_choice": {"type": "allowed_tools", "mode": "auto",
                                          "tools": [{"type": "function", "name": "run"}]}}, None),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}, HI]}, None),
        ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}, HI]}, None),
        ({"input": [HI, {"type": "item_reference", "id": "msg_1"}, HI]}, "input[1]"),
        ({"input": [HI, {"type": "compaction", "encrypted_content": "x"}, HI]}, "input[1]"),
    ],
)  # fmt: skip
def test_a_response_is_made_whatever_else_was_asked_for(server: Running, fields: dict, ignored: str | None) -> None:
    response = server.post(RESPONSES, {"input": [HI], **fields})
    assert answered(response)["output"][0]["content"][0]["text"] == "Good day."
    assert response.headers.get(IGNORED_HEADER) == ignored
    assert prompt_of(server).rstrip().endswith("<|user|>hi")


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        (COMPLETIONS, {"prompt": "a", "service_tier": "gold"}, "service_tier"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, None),
        (COMPLETIONS, {"prompt": "a", "length_penalty": 0.5}, None),
        (CHAT, {"top_logprobs": 0}, None), (CHAT, {"metadata": {"a": 1}, "store": True, "verbosity": "low"}, None),
        (CHAT, {"tools": [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}]}, "tools[0], tools[1]"),
        (CHAT, {"messages": [{"role": "assistant", "content": None, "refusal": "no"}, HI]}, None),
        (CHAT, {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, HI]}, None),
        (CHAT, {"messages": [{"role": "assistant", "content": None}, HI]}, None),
    ],
)  # fmt: skip
def test_completions_and_chats_leave_out_what_changes_nothing(
    server: Running, path: str, body: dict, ignored: str | None
) -> None:
    hi = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {}
    messages = [{**message, "content": "hi"} if message is HI else message for message in body.get("messages", ())]
    response = server.post(path, {**hi, **body, **({"messages": messages} if messages else {})})
    answered(response)
    assert response.headers.get(IGNORED_HEADER) == ignored


def test_allowed_tools_are_the_ones_that_the_model_is_offered(server: Running) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("read", "write")]
    allowed = {"mode": "auto", "tools": tools[:1]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "tool_choice": choice}
    answered(server.post(CHAT, body))
    assert '"read"' in prompt_of(server) and '"write"' not in prompt_of(server)
    named = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "write"}]}
    flat = [{"type": "function", "name": name} for name in ("read", "write")]
    answered(server.post(RESPONSES, {"input": "hi", "tools": flat, "tool_choice": named}))
    assert '"write"' in prompt_of(server) and '"read"' not in prompt_of(server)


def test_reasoning_effort_reaches_the_template(server: Running) -> None:
    answered(server.post(RESPONSES, {"input": "hi", "reasoning": {"effort": "low"}}))
    assert prompt_of(server).startswith("low<|user|>")


def test_the_calls_of_other_tools_stay_in_the_history(server: Running) -> None:
    items = [
        HI,
        {"type": "local_shell_call", "call_id": "a", "action": {"command": ["ls"]}, "status": "completed"},
        {"type": "local_shell_call_output", "call_id": "a", "output": "file"},
        {"type": "custom_tool_call", "call_id": "b", "name": "patch", "input": "+x"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "done"},
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["pwd"]}},
        {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "/x", "stderr": ""}]},
        {"type": "function_call", "call_id": "d", "name": "run", "namespace": "mcp", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "ran"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no more"}]},
        HI,
    ]
    answered(server.post(RESPONSES, {"input": items}))
    text = prompt_of(server)
    for there in ('"local_shell"', '["ls"]', "file", '"patch"', "+x", "done", '["pwd"]', '"/x"', '"mcp.run"', "ran",
                  "no more"):  # fmt: skip
        assert there in text, text


def test_calls_written_in_other_ways_stay_in_a_chats_history(server: Running) -> None:
    hi = {"role": "user", "content": "hi"}
    custom = {"id": "a", "type": "custom", "custom": {"name": "patch", "input": "+x"}}
    messages = [
        hi, {"role": "assistant", "content": None, "function_call": {"name": "old", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "old", "content": "result"}, {"role": "assistant", "tool_calls": [custom]},
        {"role": "tool", "tool_call_id": "a", "content": "patched"}, hi,
    ]  # fmt: skip
    answered(server.post(CHAT, {"messages": messages}))
    text = prompt_of(server)
    assert all(one in text for one in ('"old"', '"a": 1', "result", '"patch"', "+x", "patched")), text
    bad = [hi, {"role": "assistant", "tool_calls": [{"id": "a"}]}]
    assert server.post(CHAT, {"messages": bad}).json()["error"]["param"].startswith("messages[")


@pytest.mark.parametrize("part", [{"type": "input_image", "image_url": "data:,"}, {"type": "input_file"}])
def test_what_is_not_text_is_refused_by_its_place(server: Running, part: dict) -> None:
    for items, param in (
        ([{**HI, "content": [part]}], "input[0].content"),
        ([HI, {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": ""}, part]}],
         "input[1].output"),
    ):  # fmt: skip
        response = server.post(RESPONSES, {"input": items})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_fault_in_a_message_is_named_by_the_items_place(server: Running) -> None:
    bad = {"type": "message", "role": "nobody", "content": "x"}
    error = server.post(RESPONSES, {"input": [HI, bad], "instructions": "be kind"}).json()["error"]
    assert error["param"] == "input[1].role" and error["message"].startswith("input[1].role: ")
    tools = [{"type": "web_search"}, {"type": "function", "name": "not a name"}]
    assert server.post(RESPONSES, {"input": "hi", "tools": tools}).json()["error"]["param"] == "tools[1].name"


def test_hundreds_of_tools_can_be_offered_and_no_more(server: Running) -> None:
    tools = [{"type": "function", "name": f"f{place}"} for place in range(513)]
    answered(server.post(RESPONSES, {"input": "hi", "tools": tools[:30]}))
    error = server.post(RESPONSES, {"input": "hi", "tools": tools}).json()["error"]
    assert (error["param"], error["message"]) == ("tools", "tools: at most 512")


def call_text(name: str, arguments: dict) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


def test_a_tool_for_free_text_is_called_with_text(says: Callable[[str], Running]) -> None:
    server = says(call_text("patch", {"input": "+a\n-b"}))
    body: dict[str, Any] = {"input": "hi", "tools": [PATCH]}
    item = answered(server.post(RESPONSES, body))["output"][0]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", "+a\n-b")
    assert "start: /.+/" in prompt_of(server)
    events = [json.loads(event) for event in server.events(RESPONSES, body)]
    done = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert [event["input"] for event in done] == ["+a\n-b"]
    back = [HI, item, {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "ok"}]
    answered(server.post(RESPONSES, {**body, "input": back}))


def test_a_tool_of_a_namespace_is_called_by_both_names(says: Callable[[str], Running]) -> None:
    server = says(call_text("mcp.run", {"cmd": "ls"}))
    response = server.post(RESPONSES, {"input": "hi", "tools": [SPACE]})
    item = answered(response)["output"][0]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", "mcp", "run")
    assert json.loads(item["arguments"]) == {"cmd": "ls"}
    assert [tool["name"] for tool in response.json()["tools"]] == ["mcp"]


def test_an_item_reference_stands_for_the_item_of_the_last_answer(says: Callable[[str], Running]) -> None:
    server = says("Let me look." + call_text("run", {"cmd": "ls"}))
    body: dict[str, Any] = {"input": [HI], "tools": [RUN]}
    said, call = answered(server.post(RESPONSES, body))["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (said, call)]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "file"}
    response = server.post(RESPONSES, {**body, "input": [HI, *references, output]})
    answered(response)
    assert IGNORED_HEADER not in response.headers
    assert "<|assistant|>Let me look.<call>" in prompt_of(server) and '"cmd": "ls"' in prompt_of(server)
    unkept = answered(server.post(RESPONSES, {**body, "store": False}))["output"][0]["id"]
    reference = [{"type": "item_reference", "id": unkept}]
    assert server.post(RESPONSES, {"input": [HI, *reference]}).headers[IGNORED_HEADER] == "input[1]"


def test_items_are_kept_for_their_client_and_the_oldest_are_dropped() -> None:
    recent = RecentItems(max_bytes=3_800)

    def add(name: str, text: str) -> None:
        recent.add("one", name, encode_json(OutputMessage(id=name, content=[OutputText(text=text)])))

    for name in "abc":
        add(name, "x")
    assert recent.find("one", "c") is not None and recent.find("other", "c") is None
    add("d", "x" * 1000)
    assert [recent.find("one", name) is None for name in "abcd"] == [True, True, False, False]


def test_logprobs_of_a_response_are_those_of_its_text(server: Running) -> None:
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = answered(server.post(RESPONSES, body))["output"][0]["content"][0]
    assert "".join(one["token"] for one in part["logprobs"]).startswith("Good")
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    events = [json.loads(event) for event in server.events(RESPONSES, body)]
    streamed = [one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert streamed == part["logprobs"]
    without = answered(server.post(RESPONSES, {"input": "hi"}))["output"][0]["content"][0]
    assert without["logprobs"] == []


def test_a_long_list_of_ignored_fields_is_cut(server: Running) -> None:
    items = [HI, *({"type": "item_reference", "id": str(place)} for place in range(100))]
    ignored = server.post(RESPONSES, {"input": items}).headers[IGNORED_HEADER]
    assert ignored.startswith("input[1], input[2],") and ignored.endswith("input[20] and 80 more")
