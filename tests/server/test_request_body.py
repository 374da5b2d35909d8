"""Large bodies: what they hold is counted before it is built, and the event loop runs between their slices."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import tracemalloc
from array import array
from collections.abc import Generator
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import StartServer

from megatron_medha.server.anthropic import anthropic_messages
from megatron_medha.server.http import json_scan, request_body
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.json_scan import DENSE_SLICE_BYTES, SLICE_BYTES
from megatron_medha.server.http.request_body import MAX_VALUES, WHOLE_BYTES, BodyType, PromptLimits, decode_request
from megatron_medha.server.openai import chat_completions as chat
from megatron_medha.server.openai import completions as completion
from megatron_medha.server.openai import responses, tokenize
from megatron_medha.server.text_workers import LONG_TEXT_CHARS, MAX_INLINE_CHARS
from megatron_medha.text.tokenizer import Tokenizer

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MESSAGES, COUNT_TOKENS, TOKENIZE, DETOKENIZE = "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"
BODIES: dict[str, BodyType[Any]] = {
    COMPLETIONS: completion.BODY, CHAT: chat.BODY, RESPONSES: responses.BODY, MESSAGES: anthropic_messages.BODY,
    COUNT_TOKENS: anthropic_messages.BODY, TOKENIZE: tokenize.TOKENIZE_BODY, DETOKENIZE: tokenize.DETOKENIZE_BODY,
}  # fmt: skip
NEEDED = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1}, CHAT: {"messages": [{"role": "user", "content": "a"}]},
    RESPONSES: {"input": "a"}, TOKENIZE: {"prompt": "a"}, DETOKENIZE: {"tokens": [97]},
    MESSAGES: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    COUNT_TOKENS: {"messages": [{"role": "user", "content": "a"}]},
}  # fmt: skip
# Fields of each route (several for all of a kind), and what a list or object of very many elements repeats in them.
ELEMENTS = '{"a":1}', "[]", '"a"'
REST_BYTES, MANY_ELEMENTS = 2**16, 20_000  # the limits are lowered in the tests of what is refused, to save time
MANY = {
    COMPLETIONS: ("guided_choice", "stop", "stop_token_ids", "bad_words", "logits_processors", "no_such_field", "user"),
    CHAT: ("tools", "messages", "functions", "documents", "stop", "modalities", "no_such_field", "tool_choice"),
    RESPONSES: ("input", "tools", "include", "reasoning", "no_such_field", "metadata"),
    MESSAGES: ("messages", "system", "tools", "stop_sequences", "no_such_field"),
    COUNT_TOKENS: ("messages", "system", "tools"),
    TOKENIZE: ("messages", "tools", "documents", "no_such_field"),
    DETOKENIZE: ("no_such_field",),
}
HOSTILE = [
    *(
        (path, field, f"[{','.join([one] * MANY_ELEMENTS)}]")
        for path in MANY for field in MANY[path] for one in ELEMENTS
    ),
    (COMPLETIONS, "prompt", "[" + ",".join(["[1]"] * MANY_ELEMENTS) + "]"),
    (COMPLETIONS, "prompt", "[" + ",".join(['""'] * MANY_ELEMENTS) + "]"),
    (COMPLETIONS, "prompt", "[" + ",".join(["1.5"] * MANY_ELEMENTS) + "]"),
    (COMPLETIONS, "logit_bias", "{" + ",".join(f'"{place}":1' for place in range(MANY_ELEMENTS)) + "}"),
    (COMPLETIONS, "guided_json", '{"enum":[' + ",".join(["{}"] * MANY_ELEMENTS) + "]}"),
    (COMPLETIONS, "response_format", '{"type":"json_schema","json_schema":[' + ",".join(["{}"] * MANY_ELEMENTS) + "]}"),
    (CHAT, "chat_template_kwargs", '{"a":[' + ",".join(["[]"] * MANY_ELEMENTS) + "]}"),
    (CHAT, "messages", '[{"role":"user","content":[' + ",".join(['{"type":"text","text":""}'] * MANY_ELEMENTS) + "]}]"),
    (CHAT, "messages", "[" + ",".join(['{"role":"user","content":""}'] * MANY_ELEMENTS) + "]"),
    (RESPONSES, "input", "[" + ",".join(['{"role":"user","content":""}'] * MANY_ELEMENTS) + "]"),
    (MESSAGES, "messages", '[{"content":[' + ",".join(['{"type":"text","text":""}'] * MANY_ELEMENTS) + "]}]"),
    (TOKENIZE, "messages", "[" + ",".join(['{"role":"user","content":""}'] * MANY_ELEMENTS) + "]"),
    (CHAT, "user", "[" * MANY_ELEMENTS),
]  # fmt: skip
LONG = [
    (COMPLETIONS, "guided_json", f'"{" " * (REST_BYTES + 1)}"'),
    (COMPLETIONS, "user", f'"{"x" * (REST_BYTES + 1)}"'),
    (COMPLETIONS, "guided_regex", '"' + "\\\\" * (REST_BYTES // 2 + 1) + '"'),
    (COMPLETIONS, "seed", "1" * (REST_BYTES + 1)),
    (COMPLETIONS, "user", " " * (REST_BYTES + 1) + '"a"'),
    (COMPLETIONS, "no_such_field", "[" + "," * (REST_BYTES + 1) + "]"),
    (CHAT, "model", f'"{"x" * (REST_BYTES + 1)}"'),
    (CHAT, "chat_template_kwargs", '{"' + "k" * (REST_BYTES + 1) + '":1}'),
    (RESPONSES, "metadata", '{"a":"' + "x" * (REST_BYTES + 1) + '"}'),
    (MESSAGES, "tools", '[{"name":"' + "x" * (REST_BYTES + 1) + '"}]'),
    (TOKENIZE, "model", f'"{"x" * (REST_BYTES + 1)}"'),
    (DETOKENIZE, "model", f'"{"x" * (REST_BYTES + 1)}"'),
]
NO_LIMITS = PromptLimits(2**31, 2**31)
IDS = [place * 7919 % 100_000 for place in range(200_000)]


def body_with(path: str, field: str, value: str) -> bytes:
    fields = {name: json.dumps(given) for name, given in NEEDED[path].items()} | {field: value}
    return ("{" + ",".join(f'"{name}":{given}' for name, given in fields.items()) + "}").encode()


def steps_of(body: bytes, of: BodyType[Any]) -> Generator[None, None, Any]:
    return request_body._decode_large(bytearray(body), of, NO_LIMITS)


def decode(body: bytes, of: BodyType[Any] = completion.BODY) -> Any:
    return asyncio.run(decode_request(bytearray(body), of, NO_LIMITS))


def decode_by_slices(body: bytes, of: BodyType[Any]) -> Any:
    steps = steps_of(body, of)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def as_lists(value: object) -> object:
    if isinstance(value, array):
        return value.tolist()
    return [as_lists(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("path", "field", "value"), HOSTILE + LONG, ids=lambda value: str(value)[:24])
def test_too_much_in_any_field_of_any_route_is_refused_by_name_before_it_is_built(
    path: str, field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("WHOLE_BYTES", 1000), ("MAX_VALUES", 2_000), ("MAX_REST_BYTES", REST_BYTES)):
        monkeypatch.setattr(request_body, name, limit)
    body = bytearray(body_with(path, field, value))
    most = max(8 * len(body), 2**21)
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            asyncio.run(decode_request(body, BODIES[path], NO_LIMITS))
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert caught.value.status in (400, 413) and caught.value.param in (field, None)
    assert (caught.value.param, caught.value.code) in ((field, caught.value.code), (None, "invalid_json"))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("path", BODIES)
def test_a_route_refuses_too_many_values_over_http(start_server: StartServer, path: str) -> None:
    server = start_server()
    body = body_with(path, "no_such_field", "[" + ",".join(["[]"] * (2 * MAX_VALUES)) + "]")
    refused = server.client.post(path, content=body)
    assert refused.status_code == 400 and "no_such_field" in refused.json()["error"]["message"]
    assert server.service.bodies.num_bytes == 0


@pytest.mark.parametrize(("path", "field", "value", "slice_bytes"), [
    (COMPLETIONS, "prompt", '"' + "a " * 500_000 + '"', SLICE_BYTES),
    (COMPLETIONS, "prompt", "[" + ",".join(["12"] * 300_000) + "]", SLICE_BYTES),
    (CHAT, "messages", '[{"role":"user","content":"' + "a " * 600_000 + '"}]', SLICE_BYTES),
    (CHAT, "messages", "[" + ",".join(['{"role":"user","content":"%s"}' % ("a" * 200)] * 8_000) + "]",
     DENSE_SLICE_BYTES),
    (COMPLETIONS, "bad_words", '["' + '","'.join(["a"] * 60_000) + '"]', DENSE_SLICE_BYTES),
    (COMPLETIONS, "user", " " * 1_000_000 + '"a"', DENSE_SLICE_BYTES),
    (DETOKENIZE, "tokens", "[" + ",".join(["12"] * 300_000) + "]", SLICE_BYTES),
])  # fmt: skip
def test_others_run_after_each_slice_of_a_body(path: str, field: str, value: str, slice_bytes: int) -> None:
    body = body_with(path, field, value)
    assert sum(1 for _ in steps_of(body, BODIES[path])) >= len(body) // slice_bytes


def text_of(rng: random.Random) -> str:
    pieces = ("a", "\\", '"', "é", "漢", "🙂", "\n", "\u0000", "b" * 50, "😀" * 30, "", "{[", ",:")
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(0, 120)))


@pytest.mark.parametrize("seed", range(60))
def test_a_body_decoded_by_slices_is_what_the_decoder_makes_of_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(request_body, "_SHORT_TEXTS_BYTES", 0)
    monkeypatch.setattr(request_body, "_MIN_CUT_BYTES", rng.choice((1, 20, 128)))
    monkeypatch.setattr(request_body, "SLICE_BYTES", rng.choice((16, 64, 1000)))
    monkeypatch.setattr(json_scan, "SLICE_BYTES", rng.choice((16, 64, 1000)))
    monkeypatch.setattr(json_scan, "DENSE_SLICE_BYTES", rng.choice((8, 64, 1000)))
    parts = [{"type": "text", "text": text_of(rng)} for _ in range(3)]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text_of(rng)}}
    messages = [
        {"role": "user", "content": rng.choice((text_of(rng), parts))},
        {"role": "assistant", "content": text_of(rng), "tool_calls": [call] * 2, "unknown": text_of(rng)},
    ] * rng.randrange(1, 9)  # fmt: skip
    prompt = rng.choice((text_of(rng), [text_of(rng)] * 3, IDS[:300], [IDS[:50], [1]], [[1, -2], []], ["a", 1]))
    for of, fields in (
        (chat.BODY, {"messages": messages, "model": text_of(rng), "messages ": 1}),
        (completion.BODY, {"prompt": prompt, "stop": [text_of(rng)], "user": text_of(rng)}),
        (responses.BODY, {"input": rng.choice((text_of(rng), messages)), "instructions": text_of(rng)}),
    ):
        raw = json.dumps(fields, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1))).encode()
        raw = raw.replace(b'"messages":', b'"mess\\u0061ges":') if rng.random() < 0.2 else raw
        decoded = decode_by_slices(raw, of)
        if of is completion.BODY:
            decoded.prompt = as_lists(decoded.prompt)
        assert decoded == of.decoder.decode(raw)


def test_of_a_field_that_is_there_twice_the_last_one_counts() -> None:
    long, short = json.dumps("a" * 2**21), json.dumps("b" * 300)
    assert decode(f'{{"prompt":{long},"prompt":{short}}}'.encode()).prompt == "b" * 300
    assert decode(f'{{"prompt":{short},"prompt":{long}}}'.encode()).prompt == "a" * 2**21


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", ":\t")])
def test_a_long_list_of_ids_is_decoded_whole(separators: tuple[str, str]) -> None:
    raw = json.dumps({"prompt": IDS, "max_tokens": 1}, separators=separators).encode()
    assert decode(raw).prompt == array("i", IDS)


def test_a_thousand_prompts_of_a_thousand_ids_are_decoded() -> None:
    assert decode(json.dumps({"prompt": [IDS[:1000]] * 1000}).encode()).prompt == [array("i", IDS[:1000])] * 1000


@pytest.mark.parametrize("content", ["a" * 9 * 2**20, "é\n" * 2**21, "🙂" * 2**20])
def test_a_document_beyond_the_limit_of_everything_else_is_decoded(content: str) -> None:
    for ensure_ascii in (True, False):
        raw = json.dumps({"messages": [{"role": "user", "content": content}]}, ensure_ascii=ensure_ascii).encode()
        assert decode(raw, chat.BODY).messages[0].content == content


def test_ten_thousand_messages_of_a_long_chat_are_decoded() -> None:
    messages = [{"role": "user", "content": "a" * 1000}] * 10_000
    assert len(decode(json.dumps({"messages": messages}).encode(), chat.BODY).messages) == 10_000


@pytest.mark.parametrize("broken", [
    '"' + "a" * WHOLE_BYTES, '"' + "\\" * WHOLE_BYTES, "[" + "1," * WHOLE_BYTES, "[" + "1," * WHOLE_BYTES + "1.5]",
    "[" + "1," * WHOLE_BYTES + '"a"]', "[" + "1," * WHOLE_BYTES + "--1]", "[" + "1 " * WHOLE_BYTES + "]",
    "[" * 3000 + "}" * 3000 + " " * WHOLE_BYTES, '"' + "\\ud800" * WHOLE_BYTES + '"', '"' + "\\x" * WHOLE_BYTES + '"',
    '"a"' + " " * WHOLE_BYTES + "]", '"a"' + " " * WHOLE_BYTES + '"b"', "}" + " " * WHOLE_BYTES + ",",
])  # fmt: skip
def test_what_is_wrong_in_a_large_body_is_refused(broken: str) -> None:
    for raw in (f'{{"prompt":{broken}}}', f'{{"prompt":{broken}', broken):
        with pytest.raises(ApiError) as caught:
            decode(raw.encode("utf-8", "surrogatepass"))
        assert caught.value.status == 400


def test_bytes_that_are_no_text_are_refused() -> None:
    for wrong in (b"\x80", b"\xff", b"\xe2\x82", b"\xed\xa0\x80"):
        with pytest.raises(ApiError) as caught:
            decode(b'{"prompt":"' + wrong * 2**21 + b'"}')
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_text_that_cannot_fit_the_context_is_not_built() -> None:
    body = bytearray(json.dumps({"messages": [{"role": "user", "content": "a" * 2**23}]}).encode())
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            asyncio.run(decode_request(body, chat.BODY, PromptLimits(1000, 1000)))
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20  # half of the body, while it is emptied
    finally:
        tracemalloc.stop()
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert (caught.value.param, len(body)) == ("messages", 0)


def test_more_ids_than_the_context_holds_are_not_built() -> None:
    for of, field in ((completion.BODY, "prompt"), (tokenize.DETOKENIZE_BODY, "tokens")):
        body = bytearray(json.dumps({field: [1] * 2**21}).encode())
        with pytest.raises(ApiError) as caught:
            asyncio.run(decode_request(body, of, PromptLimits(1000, 1000)))
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
        assert (caught.value.param, len(body)) == (field, 0)


def test_large_prompts_go_through_the_server_and_wrong_ids_are_named(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=500_000, vocab_size=100_000))
    answer = server.post("/v1/completions", {"prompt": IDS, "max_tokens": 2, "return_token_ids": True}).json()
    assert answer["usage"]["prompt_tokens"] == len(IDS) and answer["choices"][0]["token_ids"] == IDS[:2]
    assert server.engine.submitted[0].prompt == array("i", IDS)
    for wrong in (100_000, -1, 2**31, 10**30):
        refused = server.post("/v1/completions", {"prompt": [*IDS, wrong]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_long_document_goes_through_the_server(start_server: StartServer, path: str) -> None:
    server = start_server(FakeEngine(max_request_tokens=3 * 2**20), max_prompt_tokens=None)
    text = "long " * 300_000
    fields = {"input": text} if path == RESPONSES else {"messages": [{"role": "user", "content": text}]}
    limit = {CHAT: "max_completion_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}[path]
    answer = server.post(path, {**fields, limit: 2}).json()
    usage = answer["usage"]
    assert usage.get("prompt_tokens", usage.get("input_tokens")) > len(text)


def test_a_body_is_counted_until_its_request_is_admitted(start_server: StartServer, tokenizer: Tokenizer) -> None:
    slow = _SlowTokenizer(tokenizer._backend, tokenizer.config)
    slow.may_go_on, slow.has_begun = threading.Event(), threading.Semaphore(0)
    server = start_server(FakeEngine(max_request_tokens=10**6), slow)
    body = json.dumps({"prompt": "a" * (LONG_TEXT_CHARS + 1), "user": "x" * 300_000, "max_tokens": 1}).encode()
    connection = server.connect("/v1/completions", body)
    assert slow.has_begun.acquire(timeout=WAIT_S)
    assert server.service.bodies.num_bytes == len(body)
    slow.may_go_on.set()
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.service.bodies.num_bytes == 0
    connection.close()


class _SlowTokenizer(Tokenizer):
    """Takes its time with long text."""

    may_go_on: threading.Event
    has_begun: threading.Semaphore

    def encode(self, text: str, **options: Any) -> array[int]:
        if len(text) > LONG_TEXT_CHARS:
            self.has_begun.release()
            assert self.may_go_on.wait(WAIT_S)
        return super().encode(text, **options)


def test_long_texts_keep_only_each_other_waiting(start_server: StartServer, tokenizer: Tokenizer) -> None:
    slow = _SlowTokenizer(tokenizer._backend, tokenizer.config)
    slow.may_go_on, slow.has_begun = threading.Event(), threading.Semaphore(0)
    room = 5 * LONG_TEXT_CHARS
    server = start_server(FakeEngine(max_request_tokens=10**6), slow, max_body_bytes=room, max_total_body_bytes=room)
    body = json.dumps({"prompt": "a" * (LONG_TEXT_CHARS + 1), "max_tokens": 1}).encode()
    long = [server.connect("/v1/completions", body) for _ in range(4)]
    while server.service.bodies.num_bytes < 4 * LONG_TEXT_CHARS:
        time.sleep(0.001)  # all four have arrived
    for _ in range(2):
        assert slow.has_begun.acquire(timeout=WAIT_S)
    answer = server.post("/v1/completions", {"prompt": "b" * (MAX_INLINE_CHARS + 1), "max_tokens": 1})
    assert answer.status_code == 200
    too_many = server.post("/v1/completions", {"prompt": "c" * (LONG_TEXT_CHARS + 1)})
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (503, "bodies_waiting")
    slow.may_go_on.set()
    for connection in long:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.close()
