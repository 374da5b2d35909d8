"""Bad requests: each gets its 4xx in OpenAI's shape, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable

import httpx
import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import Running, StartServer, eventually

from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
RESPONSES = "/v1/responses"
HI = [{"role": "user", "content": "hi"}]


def prompt(**fields: object) -> dict:
    return {"prompt": "abc", **fields}


def chat(**fields: object) -> dict:
    return {"messages": HI, **fields}


def tool(name: str = "f", **fields: object) -> dict:
    return {"type": "function", "function": {"name": name, **fields}}


def called(arguments: str) -> dict:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# path, body (an object, or raw bytes), status, param
BAD_BODIES = [
    (COMPLETIONS, b"", 400, None),
    (COMPLETIONS, b"   ", 400, None),
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b'{"prompt": "a"} x', 400, None),
    (COMPLETIONS, b"prompt=a&max_tokens=3", 400, None),
    (COMPLETIONS, b"[]", 400, None),
    (COMPLETIONS, b"null", 400, None),
    (COMPLETIONS, b"12", 400, None),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, None),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None),
    (COMPLETIONS, b'\xef\xbb\xbf{"prompt": "a"}', 400, None),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, None),
    (COMPLETIONS, b'{"prompt": "a", "temperature": Infinity}', 400, None),
    (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1e999}', 400, "max_tokens"),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "max_tokens"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "prompt[0][0]"),
    (COMPLETIONS, b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
    (COMPLETIONS, b'{"prompt": "a", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", 400, None),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, [2]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt[0]"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt[0]"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [300]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [2**31]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [10**40]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 2049}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 1000}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 100_000}, 400, "prompt"),
    (COMPLETIONS, prompt(max_tokens=998), 400, "max_tokens"),
    (COMPLETIONS, prompt(max_tokens=10**30), 400, "max_tokens"),
    (COMPLETIONS, prompt(max_tokens=-1), 400, "max_tokens"),
    (COMPLETIONS, prompt(max_tokens="5"), 400, "max_tokens"),
    (COMPLETIONS, prompt(max_tokens=5.5), 400, "max_tokens"),
    (COMPLETIONS, prompt(max_tokens=True), 400, "max_tokens"),
    (COMPLETIONS, prompt(min_tokens=5, max_tokens=4), 400, "min_tokens"),
    (COMPLETIONS, prompt(min_tokens=10**9), 400, "min_tokens"),
    (COMPLETIONS, prompt(temperature=-0.1), 400, "temperature"),
    (COMPLETIONS, prompt(temperature="hot"), 400, "temperature"),
    (COMPLETIONS, prompt(temperature=[1]), 400, "temperature"),
    (COMPLETIONS, prompt(top_p=0), 400, "top_p"),
    (COMPLETIONS, prompt(top_p=1.1), 400, "top_p"),
    (COMPLETIONS, prompt(top_k=-2), 400, "top_k"),
    (COMPLETIONS, prompt(top_k=1.5), 400, "top_k"),
    (COMPLETIONS, prompt(min_p=2), 400, "min_p"),
    (COMPLETIONS, prompt(repetition_penalty=0), 400, "repetition_penalty"),
    (COMPLETIONS, prompt(repetition_penalty=1e-38), 400, "repetition_penalty"),
    (COMPLETIONS, prompt(repetition_penalty=5e-324), 400, "repetition_penalty"),
    (COMPLETIONS, prompt(repetition_penalty=1e39), 400, "repetition_penalty"),
    (COMPLETIONS, b'{"prompt":"a","repetition_penalty":1e999}', 400, "repetition_penalty"),
    (COMPLETIONS, prompt(presence_penalty=2.5), 400, "presence_penalty"),
    (COMPLETIONS, prompt(frequency_penalty=-3), 400, "frequency_penalty"),
    (COMPLETIONS, prompt(n=0), 400, "n"),
    (COMPLETIONS, prompt(n=129), 400, "n"),
    (COMPLETIONS, prompt(n=10**50), 400, "n"),
    (COMPLETIONS, prompt(best_of=2, n=3), 400, "best_of"),
    (COMPLETIONS, prompt(best_of=129), 400, "best_of"),
    (COMPLETIONS, prompt(best_of=2, stream=True), 400, "best_of"),
    (COMPLETIONS, prompt(seed="x"), 400, "seed"),
    (COMPLETIONS, prompt(seed=2**63), 400, "seed"),
    (COMPLETIONS, prompt(stop=""), 400, "stop"),
    (COMPLETIONS, prompt(stop=["a", ""]), 400, "stop[1]"),
    (COMPLETIONS, prompt(stop=[1]), 400, "stop[0]"),
    (COMPLETIONS, prompt(stop=["a"] * 17), 400, "stop"),
    (COMPLETIONS, prompt(stop="a" * 1025), 400, "stop"),
    (COMPLETIONS, prompt(stop_token_ids=[-1]), 400, "stop_token_ids"),
    (COMPLETIONS, prompt(stop_token_ids=[300]), 400, "stop_token_ids"),
    (COMPLETIONS, prompt(stop_token_ids=[1] * 129), 400, "stop_token_ids"),
    (COMPLETIONS, prompt(logprobs=21), 400, "logprobs"),
    (COMPLETIONS, prompt(logprobs=-1), 400, "logprobs"),
    (COMPLETIONS, prompt(logprobs=True), 400, "logprobs"),
    (COMPLETIONS, prompt(logit_bias={"x": 1}), 400, "logit_bias"),
    (COMPLETIONS, prompt(logit_bias={"300": 1}), 400, "logit_bias"),
    (COMPLETIONS, prompt(logit_bias={"-1": 1}), 400, "logit_bias"),
    (COMPLETIONS, prompt(logit_bias={"٣": 1}), 400, "logit_bias"),
    (COMPLETIONS, prompt(logit_bias={"9" * 5000: 1}), 400, "logit_bias"),
    (COMPLETIONS, prompt(logit_bias={"1": 101}), 400, "logit_bias[...]"),
    (COMPLETIONS, prompt(logit_bias=[1]), 400, "logit_bias"),
    (COMPLETIONS, prompt(priority=2**40), 400, "priority"),
    (COMPLETIONS, prompt(stream="yes"), 400, "stream"),
    (COMPLETIONS, prompt(stream=True, stream_options=7), 400, "stream_options"),
    (COMPLETIONS, prompt(suffix="end"), 400, "suffix"),
    (COMPLETIONS, prompt(response_format={"type": "xml"}), 400, "response_format.type"),
    (COMPLETIONS, prompt(response_format={}), 400, "response_format.type"),
    (COMPLETIONS, prompt(response_format="json"), 400, "response_format"),
    (COMPLETIONS, prompt(response_format={"type": "json_schema"}), 400, "response_format.json_schema.schema"),
    (COMPLETIONS, prompt(guided_json={"type": 5}), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json="{"), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json="[1]"), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json=False), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json={"minimum": 3, "maximum": 1, "type": "integer"}), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json={"$ref": "http://127.0.0.1/schema"}), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json={"enum": ["x" * 70_000]}), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json={"type": "string", "pattern": "a?" * 5000}), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_json=nested(300)), 400, "guided_json"),
    (COMPLETIONS, prompt(guided_regex="(a"), 400, "guided_regex"),
    (COMPLETIONS, prompt(guided_regex="(?=a)b"), 400, "guided_regex"),
    (COMPLETIONS, prompt(guided_regex="a" * 9000), 400, "guided_regex"),
    (COMPLETIONS, prompt(guided_choice=[]), 400, "guided_choice"),
    (COMPLETIONS, prompt(guided_choice=["a", ""]), 400, "guided_choice"),
    (COMPLETIONS, prompt(guided_choice="a"), 400, "guided_choice"),
    (COMPLETIONS, prompt(guided_grammar="start: x"), 400, "guided_grammar"),
    (COMPLETIONS, prompt(guided_grammar="start: start"), 400, "guided_grammar"),
    (COMPLETIONS, prompt(guided_grammar="no grammar"), 400, "guided_grammar"),
    (COMPLETIONS, prompt(structured_outputs={"structural_tag": {}}), 400, "structured_outputs"),
    (COMPLETIONS, prompt(structured_outputs={"regex": 5}), 400, "structured_outputs.regex"),
    (COMPLETIONS, prompt(guided_regex="a", guided_choice=["a"]), 400, "guided_choice"),
    (COMPLETIONS, prompt(guided_regex="a", ignore_eos=True), 400, "ignore_eos"),
    (COMPLETIONS, prompt(guided_regex="a", min_tokens=2), 400, "min_tokens"),
    (COMPLETIONS, prompt(model="gpt-9"), 404, "model"),
    (COMPLETIONS, prompt(model=3), 400, "model"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": None}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 1000}]}, 400, "messages"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_completion_tokens=999), 400, "max_completion_tokens"),
    (CHAT, chat(logprobs=5), 400, "logprobs"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    (CHAT, chat(tools=[{"type": "web_search"}], tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0].function.name"),
    (CHAT, chat(tools=[tool(), tool()]), 400, "tools[1].function.name"),
    (CHAT, chat(tools=[tool(str(place)) for place in range(513)]), 400, "tools"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(functions=[{"name": "f"}]), 400, "functions"),
    (CHAT, {"messages": [{"role": "user", "content": ""}] * 1001}, 400, "messages"),
    (CHAT, chat(echo=True), 400, "echo"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities"),
    (CHAT, chat(use_beam_search=True), 400, "use_beam_search"),
    (COMPLETIONS, prompt(bad_words=["x"]), 400, "bad_words"),
    (COMPLETIONS, prompt(allowed_token_ids=[5]), 400, "allowed_token_ids"),
    (COMPLETIONS, prompt(prompt_logprobs=2), 400, "prompt_logprobs"),
    (COMPLETIONS, prompt(truncate_prompt_tokens=10), 400, "truncate_prompt_tokens"),
    (CHAT, chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    (CHAT, chat(chat_template_kwargs=[1]), 400, "chat_template_kwargs"),
    (CHAT, chat(continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(model=""), 404, "model"),
    (TOKENIZE, {}, 400, "prompt"),
    (TOKENIZE, {"prompt": 5}, 400, "prompt"),
    (TOKENIZE, {"prompt": "a", "messages": HI}, 400, "prompt"),
    (TOKENIZE, {"messages": []}, 400, "messages"),
    (TOKENIZE, {"prompt": "a", "model": "gpt-9"}, 404, "model"),
    (DETOKENIZE, {}, 400, "tokens"),
    (DETOKENIZE, {"tokens": ["a"]}, 400, "tokens[0]"),
    (DETOKENIZE, {"tokens": [-1]}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [300]}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [2**70]}, 400, "tokens"),
]


def assert_openai_error(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 500
    assert error["param"] == param, error


def test_every_bad_body_gets_its_error_and_never_reaches_the_engine(server: Running) -> None:
    for path, body, status, param in BAD_BODIES:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = server.client.post(path, content=raw, headers={"content-type": "application/json"})
        try:
            assert_openai_error(response, status, param)
        except AssertionError as error:
            raise AssertionError(f"{path} {raw[:100]!r}: {error}") from error
    assert server.engine.submitted == []
    server.assert_nothing_is_left()
    assert server.post(COMPLETIONS, {"prompt": "abc"}).status_code == 200


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["", "soon", "0", "-5", "nan", "inf", "1e999"])
def test_a_latency_target_that_is_no_positive_number_is_refused(server: Running, name: str, value: str) -> None:
    assert_openai_error(server.post(COMPLETIONS, {"prompt": "a"}, headers={name: value}), 400, name)


@pytest.mark.parametrize("value", ["0.001", "1e-30", "0.999"])
def test_a_time_per_token_below_the_servers_least_is_refused_with_that(server: Running, value: str) -> None:
    response = server.post(COMPLETIONS, {"prompt": "a"}, headers={"x-slo-tpot-ms": value})
    assert_openai_error(response, 400, "x-slo-tpot-ms")
    message = response.json()["error"]["message"]
    assert value in message and "server.min_tpot_slo_ms" in message and " 1 " in message
    assert server.post(COMPLETIONS, {"prompt": "a"}, headers={"x-slo-tpot-ms": "1"}).status_code == 200


def test_the_error_of_a_long_prompt_has_the_numbers(server: Running) -> None:
    message = server.post(COMPLETIONS, {"prompt": "a" * 990, "max_tokens": 20}).json()["error"]["message"]
    assert "990" in message and "20" in message and "1000" in message and "max_tokens=10" in message


def test_unknown_paths_and_wrong_methods_have_the_same_shape(server: Running) -> None:
    assert_openai_error(server.get("/v2/nothing"), 404, None)
    assert_openai_error(server.get(COMPLETIONS), 405, None)
    assert_openai_error(server.client.delete("/health"), 405, None)


@pytest.mark.parametrize(
    ("path", "body_of"),
    [
        (COMPLETIONS, lambda inner: prompt(guided_json=inner)),
        (CHAT, lambda inner: chat(response_format={"type": "json_schema", "json_schema": {"schema": inner}})),
        (CHAT, lambda inner: chat(tools=[tool(parameters=inner)], tool_choice="required")),
        (CHAT, lambda inner: chat(chat_template_kwargs=inner)),
        (RESPONSES, lambda inner: {"input": "a", "tools": [{"type": "function", "name": "f", "parameters": inner}]}),
        (RESPONSES, lambda inner: {"input": "a", "text": {"format": {"type": "json_schema", "schema": inner}}}),
    ],
)
def test_json_of_no_depth_breaks_the_server(
    start_server: StartServer, tokenizer: Tokenizer, path: str, body_of: Callable[[object], dict]
) -> None:
    source = "{{ tools | tojson }}{{ messages[0].content }}"
    server = start_server(FakeEngine(max_request_tokens=10**6), Tokenizer(tokenizer._backend, TokenizerConfig(
        chat_template=source)))  # fmt: skip
    limit = sys.getrecursionlimit()
    for depth in (*range(20, limit - 220, 37), *range(limit - 220, limit, 4)):
        # json's own encoder would not go so deep.
        inner = '{"properties":' * depth + "{}" + "}" * depth
        body = json.dumps({**body_of("INNER"), "max_tokens": 1, "max_output_tokens": 1})
        answer = server.client.post(path, content=body.replace('"INNER"', inner).encode())
        assert answer.status_code in (200, 400), (depth, answer.text)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(start_server: StartServer, is_chunked: bool) -> None:
    server = start_server(max_body_bytes=1000)
    body = json.dumps({"prompt": "a" * 1200}).encode()
    response = server.client.post(COMPLETIONS, content=iter([body]) if is_chunked else body)
    assert_openai_error(response, 413, None)
    assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200


def test_bodies_that_crawl_cannot_fill_memory(start_server: StartServer) -> None:
    server = start_server(max_body_bytes=300_000, max_total_body_bytes=300_000)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: 250000\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as crawling:
        crawling.sendall(head + b" " * 200_000)
        while server.service.bodies.num_bytes < 200_000:
            time.sleep(0.001)  # it is on its way
        refused = server.client.post(COMPLETIONS, content=json.dumps({"prompt": "a" * 150_000}).encode())
        assert_openai_error(refused, 503, None)
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        crawling.sendall(b" " * 50_000)
        assert crawling.recv(1000).startswith(b"HTTP/1.1 400")
    eventually(lambda: server.service.bodies.num_bytes == 0)


def test_a_body_that_never_ends_is_given_up(start_server: StartServer) -> None:
    server = start_server(body_timeout_s=0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -4\r\n\r\n",
    ],
)
def test_what_is_no_http_harms_nobody(server: Running, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)
    assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200


def test_more_requests_than_the_limit_are_told_to_come_back(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True), max_live_requests=3)
    with server.connect(COMPLETIONS, json.dumps({"prompt": "a", "n": 2}).encode()):
        server.engine.wait_for_submitted(2)
        response = server.post(COMPLETIONS, {"prompt": ["a", "b"]})
        assert_openai_error(response, 429, None)
        assert int(response.headers["retry-after"]) >= 1
    server.assert_nothing_is_left()


def test_what_the_engine_rejects_is_the_clients_fault_or_ours(start_server: StartServer) -> None:
    for is_client_fault, status in ((True, 400), (False, 500)):
        server = start_server(FakeEngine(reject_with=("no room for this", is_client_fault)))
        for extra in ({}, {"stream": True}, {"n": 3}):
            response = server.post(COMPLETIONS, {"prompt": "a", **extra})
            assert_openai_error(response, status, None)
            assert "no room for this" in response.text
        server.assert_nothing_is_left()
