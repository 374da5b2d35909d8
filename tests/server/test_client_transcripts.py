"""What real clients sent, sent again: every answer has the form that its client reads, and the call or text due.

Recorded with tools/clients_check.py and tools/clients/shorten_transcript.py; docs/clients.md lists the clients.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import Running, StartServer
from scripted_model import CALLS, FINAL, FIRST, MODEL, scripted_engine, scripted_tokenizer

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.json"))
OUR_ID = re.compile(r"\b(?:msg|fc|ctc|call)_[0-9a-f]{24,32}\b")
Output = tuple[str, list[tuple[str, Any]]]  # text, and calls by name with their arguments


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Running:
    return start_server(scripted_engine(), scripted_tokenizer(tmp_path), served_model_names=(MODEL,))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_recorded_client_gets_what_it_reads(server: Running, path: Path) -> None:
    ids: dict[str, str] = {}
    outputs = []
    for request in json.loads(path.read_text())["requests"]:
        number, body = request["number"], json.dumps(request["body"])
        for name, ours in ids.items():
            body = body.replace(name, ours)
        assert not re.search(r"\{\d+\.\d+\}", body), "an id of an answer that was not kept"
        headers = {name: "x" for name in request["headers"] if name != "accept"}
        response = server.client.request(
            request["method"], request["path"], params=request["query"], headers=headers,
            content=b"" if request["body"] is None else body.encode(),
        )  # fmt: skip
        assert response.status_code == request["status"], (number, response.text)
        found = list(dict.fromkeys(OUR_ID.findall(response.text)))
        ids |= {f"{{{number}.{place}}}": one for place, one in enumerate(found)}
        if response.status_code == 200 and (read := READERS.get(request["path"])) is not None:
            outputs.append(read(response, json.loads(body)))
    calls = [(name, arguments) for _, of_one in outputs for name, arguments in of_one]
    assert calls and all(arguments == CALLS[name] for name, arguments in calls), calls
    assert {text.strip() for text, _ in outputs} == {FIRST, FINAL}
    server.assert_nothing_is_left()


def test_there_is_a_transcript_of_every_agent() -> None:
    names = {path.stem for path in TRANSCRIPTS}
    assert names == {
        "ai-sdk", "anthropic", "anthropic-npm", "claude-agent-sdk", "claude-agent-sdk-npm", "claude-code", "codex",
        "inspect-ai", "langchain", "litellm-agent", "openai-agents", "pydantic-ai",
    }  # fmt: skip


def read_chat(response: httpx.Response, body: dict) -> Output:
    if not body.get("stream"):
        answer = response.json()
        (choice,) = answer["choices"]
        message, calls = choice["message"], choice["message"].get("tool_calls") or []
        assert message["role"] == "assistant" and answer["usage"]["total_tokens"] > 0
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        return message["content"], [called(call["function"]) for call in calls]
    *events, end = events_of(response)
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    if (body.get("stream_options") or {}).get("include_usage"):
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
        chunks.pop()
    text, calls = "", []
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        text += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function" and call["function"]["name"]
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == ("tool_calls" if calls else "stop")
    return text, [called(call) for call in calls]


def read_response(response: httpx.Response, body: dict) -> Output:
    if not body.get("stream"):
        return output_of(response.json())
    events = [json.loads(event) for event in events_of(response)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [events[0]["type"], events[1]["type"]] == ["response.created", "response.in_progress"]
    done: list[dict] = []
    open_item: dict = {}
    written = ""
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(done)
        if kind == "output_item.added":
            assert not open_item and event["item"]["status"] == "in_progress"
            open_item, written = event["item"], ""
        elif kind == "output_item.done":
            assert (event["item"]["id"], event["item"]["type"]) == (open_item["id"], open_item["type"])
            assert written == (event["item"].get("arguments") or event["item"]["content"][0]["text"])
            done.append(event["item"])
            open_item = {}
        else:
            assert event["item_id"] == open_item["id"]
            written += event.get("delta", "")
            is_text = open_item["type"] == "message"
            assert (event.get("content_index") == 0) is is_text
            assert kind in (TEXT_EVENTS if is_text else CALL_EVENTS)
    assert events[-1]["type"] == "response.completed" and events[-1]["response"]["output"] == done
    return output_of(events[-1]["response"])


TEXT_EVENTS = {"content_part.added", "output_text.delta", "output_text.done", "content_part.done"}
CALL_EVENTS = {"function_call_arguments.delta", "function_call_arguments.done"}


def output_of(answer: dict) -> Output:
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert {"cached_tokens", "reasoning_tokens"} == {
        *usage["input_tokens_details"], *usage["output_tokens_details"]
    }  # fmt: skip
    assert all(item["status"] == "completed" and item["id"] for item in answer["output"])
    texts = [part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    assert all(item["call_id"] for item in answer["output"] if item["type"] == "function_call")
    return "".join(texts), [called(item) for item in answer["output"] if item["type"] == "function_call"]


def read_message(response: httpx.Response, body: dict) -> Output:
    if not body.get("stream"):
        return content_of(response.json())
    events = [json.loads(event) for event in events_of(response)]
    message = events[0]["message"]
    assert (events[0]["type"], message["content"], events[-1]["type"]) == ("message_start", [], "message_stop")
    is_open, partial = False, ""
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(message["content"])
                is_open, partial = True, ""
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert is_open and event["index"] == len(message["content"]) - 1
                block, delta = message["content"][-1], event["delta"]
                if block["type"] == "text":
                    block["text"] += delta["text"]
                partial += delta.get("partial_json", "")
            case "content_block_stop":
                assert is_open and event["index"] == len(message["content"]) - 1
                is_open = False
                if partial:
                    message["content"][-1]["input"] = json.loads(partial)
            case "message_delta":
                assert not is_open
                message |= event["delta"]
                message["usage"] |= event["usage"]
            case other:
                assert other == "ping"
    return content_of(message)


def content_of(message: dict) -> Output:
    texts = [block["text"] for block in message["content"] if block["type"] == "text"]
    calls = [(block["name"], block["input"]) for block in message["content"] if block["type"] == "tool_use"]
    assert message["stop_reason"] == ("tool_use" if calls else "end_turn")
    assert message["usage"]["input_tokens"] > 0 and message["usage"]["output_tokens"] > 0
    return "".join(texts), calls


def called(function: dict) -> tuple[str, Any]:
    return function["name"], json.loads(function["arguments"])


def events_of(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


READERS = {"/v1/chat/completions": read_chat, "/v1/responses": read_response, "/v1/messages": read_message}
