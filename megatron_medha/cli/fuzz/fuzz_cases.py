"""What `medha selftest` tries: bodies that are wrong, bytes that are no HTTP, clients that leave."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
PATHS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES, COUNT, TOKENIZE, DETOKENIZE)

# As JSON text, since not all of it is what json.dumps would write.
INVALID_VALUES = (
    "null", "true", "-1", "0", "1.5", "-0.0", "1e999", "-1e999", "NaN", "Infinity", "2147483648", "9223372036854775808",
    "1" + "0" * 400, '""', '"x"', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', "[]", "{}", "[[]]", '[""]', "[null]",
    "[-1]", "[2147483648]", '{"a":1}', '"' + "a" * 3000 + '"', "[" * 200 + "]" * 200, '"\\u202e\\ufeff"', "[1,\"a\"]",
)  # fmt: skip
# max_tokens is always there and small, or wrong: a chat without it may fill the whole context, and take as long.
FIELDS = (
    "model", "stream", "stream_options", "n", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "priority", "service_tier", "user", "return_token_ids", "response_format",
    "prompt", "best_of", "echo", "logprobs", "suffix", "add_special_tokens", "messages", "max_completion_tokens",
    "chat_template", "chat_template_kwargs", "top_logprobs", "tools", "tool_choice", "functions", "tokens",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "parallel_tool_calls",
    "input", "instructions", "max_output_tokens", "text", "store", "previous_response_id", "background", "metadata",
    "documents", "reasoning_effort", "modalities", "use_beam_search", "length_penalty", "bad_words",
    "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "include", "reasoning", "truncation", "system",
    "stop_sequences", "thinking", "output_config", "output_format",
)  # fmt: skip
LENGTH_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
VALID = {
    COMPLETIONS: {"prompt": '"abc"', "max_tokens": "2"},
    CHAT: {"messages": '[{"role":"user","content":"hi"}]', "max_tokens": "2"},
    RESPONSES: {"input": '"hi"', "max_output_tokens": "2"},
    MESSAGES: {"messages": '[{"role":"user","content":"hi"}]', "max_tokens": "2"},
    COUNT: {"messages": '[{"role":"user","content":"hi"}]'},
    TOKENIZE: {"prompt": '"abc"'},
    DETOKENIZE: {"tokens": "[1,2]"},
}
LONG_STREAM = {"prompt": '"abc"', "max_tokens": "100", "ignore_eos": "true", "stream": "true"}
_PROMPT_CHARS = 16_384  # of a tool, which is in the prompt too: a longer one is mostly a wait for its prefill
INVALID_HEADERS = (
    ("x-slo-ttft-ms", "nan"), ("x-slo-ttft-ms", "-1"), ("x-slo-tpot-ms", "1e400"), ("x-slo-class", "gold"),
    ("x-medha-progress", "perhaps"), ("x-request-id", "a" * 5000), ("x-request-id", "\xff\xfe"),
    ("content-type", "text/plain"), ("authorization", "Bearer " + "x" * 3000), ("authorization", "\xff"),
    ("traceparent", "00-zz"), ("expect", "100-continue"), ("accept", "nothing/atall"), ("content-encoding", "gzip"),
)  # fmt: skip


def broken_bodies() -> Iterator[tuple[str, bytes]]:
    """Path and body: JSON that is none, or none of ours."""
    for path in PATHS:
        good = as_json(VALID[path])
        yield from (
            (path, body)
            for body in (
                b"", b" ", b"{", b"[]", b"null", b"12", b"\xff", b"\x00", b"\xef\xbb\xbf" + good, good + b"x",
                good[:-1], good + good, b"prompt=a", good.replace(b'"', b"'"), b'{"prompt": "\xff\xfe"}',
                good.replace(b"{", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b",", 1),
                good.replace(b"{", b'{"x":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b",", 1),
                good.replace(b"{", b'{"n":' + b"9" * 100_000 + b",", 1),
                good.replace(b"{", b'{"max_tokens":1,"max_tokens":2,', 1),
                b'{"' + b"k" * 100_000 + b'":1}', b"\x1f\x8b\x08\x00", b"[" + b"1," * 100_000 + b"1]",
            )
        )  # fmt: skip


def wrong_fields() -> Iterator[tuple[str, bytes]]:
    """Every field of every route with every nasty value, one at a time."""
    for path in PATHS:
        for field in FIELDS:
            for value in INVALID_VALUES:
                if field in LENGTH_FIELDS and value == "null" and path in (CHAT, RESPONSES, MESSAGES):
                    continue
                yield path, as_json({**VALID[path], field: value})


def beyond_limits() -> Iterator[tuple[str, bytes]]:
    """More of everything than any server would allow."""
    many = 100_000
    texts, ids = json.dumps(["a"] * many), json.dumps(list(range(many)))
    schema = json.dumps({"enum": ["x" * 10 * many]})
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    of_all = {
        "stop": texts, "stop_token_ids": ids, "logit_bias": json.dumps(dict.fromkeys(range(many), 1)),
        "guided_json": schema, "guided_regex": json.dumps("a" * 10 * many), "n": str(many),
    }  # fmt: skip
    of_completions = {
        "prompt": texts, "best_of": str(many), "logprobs": str(many), "max_tokens": str(2**31 - 1),
    }  # fmt: skip
    of_chat = {
        "top_logprobs": str(many), "max_completion_tokens": str(2**31 - 1), "tools": json.dumps([tool] * many),
    }  # fmt: skip
    for path, fields in ((COMPLETIONS, of_all | of_completions), (CHAT, of_all | of_chat)):
        for name, value in fields.items():
            needed = {"logprobs": "true"} if name == "top_logprobs" else {}
            yield path, as_json({**VALID[path], **needed, name: value})
    yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "stop": json.dumps("x" * 10 * many)})
    yield RESPONSES, as_json({**VALID[RESPONSES], "max_output_tokens": str(2**31 - 1)})


def large_bodies(num_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Bodies of about this size with too many elements or too much text in one field, of every route."""

    def many(element: str, opening: str = "[", closing: str = "]") -> str:
        return opening + ",".join([element] * (num_bytes // (len(element) + 1))) + closing

    message, part = '{"role":"user","content":""}', '{"type":"text","text":""}'
    tool = '{"type":"function","function":{"name":"f","parameters":{}}}'
    numbered = ",".join(f'"{place}":1' for place in range(num_bytes // 10))
    blanks = '"' + " " * num_bytes + '"'
    for path, field, value in (
        *((COMPLETIONS, name, many('"a"')) for name in ("guided_choice", "stop", "prompt", "bad_words", "user")),
        *((COMPLETIONS, name, many("1")) for name in ("stop_token_ids", "prompt")),
        *((COMPLETIONS, name, many("[1]")) for name in ("prompt", "logits_processors")),
        *((COMPLETIONS, name, blanks) for name in ("prompt", "guided_json", "guided_regex", "model", "suffix")),
        (COMPLETIONS, "logit_bias", "{" + numbered + "}"),
        (COMPLETIONS, "guided_json", many("{}", '{"a":[', "]}")),
        (COMPLETIONS, "response_format", many("{}", '{"type":"json_schema","json_schema":{"schema":{"a":[', "]}}}")),
        (CHAT, "messages", many(message)), (CHAT, "messages", many(part, '[{"role":"user","content":[', "]}]")),
        (CHAT, "messages", '[{"role":"user","content":' + blanks + "}]"),
        (CHAT, "tools", many(tool)), (CHAT, "chat_template_kwargs", many("[]", '{"a":[', "]}")),
        (CHAT, "documents", many("{}")), (CHAT, "logit_bias", "{" + numbered + "}"),
        (RESPONSES, "input", many(message)), (RESPONSES, "input", blanks), (RESPONSES, "tools", many(tool)),
        (MESSAGES, "messages", many(message)), (MESSAGES, "system", many(part)), (MESSAGES, "tools", many(tool)),
        (COUNT, "messages", many(part, '[{"role":"user","content":[', "]}]")),
        (TOKENIZE, "prompt", '"' + "a " * (num_bytes // 2) + '"'), (TOKENIZE, "messages", many(message)),
        (DETOKENIZE, "tokens", many("1")), (DETOKENIZE, "model", blanks),
    ):  # fmt: skip
        yield path, as_json({**VALID[path], field: value})


def hostile_grammars() -> Iterator[tuple[str, bytes]]:
    """Schemas, regexes and grammars that are wrong, huge, deep or slow, in every field that takes one."""
    doubled = {f"d{depth}": {"allOf": [{"$ref": f"#/$defs/d{depth + 1}"}] * 2} for depth in range(30)}
    among = {"anyOf": [{"type": "object", "properties": {f"p{place}": {"$ref": "#"}}} for place in range(500)]}
    deep: dict[str, object] = {}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    # The library's limits do not end this one.
    endless = {"allOf": [{"type": "string", "pattern": f".*{place}.*"} for place in range(40)]}
    schemas: tuple[object, ...] = (
        endless,
        {"type": "nothing"}, {"type": 5}, {"properties": [1]}, {"required": "a"}, {"enum": []}, {"$ref": "#/no"}, False,
        {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"$defs": {**doubled, "d30": {"type": "object"}}, "$ref": "#/$defs/d0"}, among, deep,
        {"type": "string", "minLength": 10**9}, {"type": "array", "items": {"type": "null"}, "minItems": 10**8},
        {"type": "string", "pattern": "(a{1000}){1000}"}, {"type": "string", "pattern": "(a"},
        {"type": "integer", "multipleOf": 1234567, "minimum": 3, "maximum": 10**30}, {"enum": ["x" * 60_000]},
        {"type": "number", "minimum": 1e-300, "maximum": 1e300}, {"enum": [str(place) for place in range(6000)]},
        {"type": "object", "properties": {str(place): {"type": "string"} for place in range(2000)}},
        {"x-guidance": {"whitespace_pattern": "("}}, {"format": "nothing"}, {"type": "string", "format": 5},
    )  # fmt: skip
    regexes = (
        "(a", "(?=a)b", "(a)\\1", "(a+)+$", "(a{1000}){1000}", "(((a{1,100}){1,100}){1,100}){1,100}", ".*a.{300}b",
        "a?" * 2000 + "a" * 2000, "(" * 2000 + "a" + ")" * 2000, "a" * 100_000, "\\p{L}{500}", "[", "",
        "[^\x00-\U0010ffff]",
    )  # fmt: skip
    rules = "".join(f'\nr{place}: "a" start' for place in range(150))
    grammars = (
        "start: start", "start: x", "start: start start | \"a\" | ", "root ::= root", "root ::= (", "%llguidance {",
        "start: " + " | ".join(f"r{place}" for place in range(150)) + rules, "start: <[1000000000]>", "\x00",
        "start: /(/",
    )  # fmt: skip
    for schema in schemas:
        text = json.dumps(schema)
        wrapped = json.dumps({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "guided_json": text})
        yield CHAT, as_json({**VALID[CHAT], "response_format": wrapped})
        if len(text) < _PROMPT_CHARS:
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            yield CHAT, as_json({**VALID[CHAT], "tools": json.dumps([tool]), "tool_choice": '"required"'})
        form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
        yield RESPONSES, as_json({**VALID[RESPONSES], "text": json.dumps(form)})
    for regex in regexes:
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "structured_outputs": json.dumps({"regex": regex})})
    for grammar in grammars:
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "guided_grammar": json.dumps(grammar)})
    for depth in range(460, 1000, 12):  # as deep as JSON can be read in Python, and half as deep
        nested = '{"items":' * depth + "{}" + "}" * depth
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "guided_json": nested})
        tools = f'[{{"type":"function","function":{{"name":"f","parameters":{nested}}}}}]'
        yield CHAT, as_json({**VALID[CHAT], "tools": tools, "tool_choice": '"required"'})
        text = f'{{"format":{{"type":"json_schema","name":"x","schema":{nested}}}}}'
        yield RESPONSES, as_json({**VALID[RESPONSES], "text": text})
    for choice in ([], [""], ["a"] * 5000, ["\x00\"\\"], ["a" * 70_000]):
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "guided_choice": json.dumps(choice)})


def random_bodies(rng: random.Random, count: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Several fields wrong at once, bytes flipped, headers wrong."""
    for _ in range(count):
        path = rng.choice(PATHS)
        fields = dict(VALID[path])
        for _ in range(rng.randrange(1, 5)):
            field = rng.choice(FIELDS)
            if field not in LENGTH_FIELDS:
                fields[field] = rng.choice(INVALID_VALUES)
        body = bytearray(as_json(fields))
        for _ in range(rng.choice((0, 0, 1, 3))):
            body[rng.randrange(len(body))] = rng.randrange(256)
        headers = dict(rng.sample(INVALID_HEADERS, rng.choice((0, 0, 1, 2))))
        yield path, bytes(body), headers


def raw_requests(rng: random.Random) -> Iterator[bytes]:
    """Bytes that are no HTTP, or hardly."""
    good = as_json(VALID[COMPLETIONS])
    length = b"content-length: %d\r\n" % len(good)
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    yield from (
        b"\x00\x01\x02\r\n\r\n", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET " + b"/" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-a: " + b"b" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-a: b\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.0\r\n\r\n", b"HEAD /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"BREW /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"DELETE /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        post + b"content-length: -4\r\n\r\n" + good, post + b"content-length: x\r\n\r\n" + good,
        post + b"content-length: 99999999999999999999\r\n\r\n" + good,
        post + length + b"content-length: 3\r\n\r\n" + good,
        post + length + b"transfer-encoding: chunked\r\n\r\n" + good,
        post + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + good,
        post + b"transfer-encoding: chunked\r\n\r\n5\r\n{\"pro\r\n0\r\n\r\n",
        post + b"upgrade: websocket\r\nconnection: upgrade\r\n" + length + b"\r\n" + good,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    )  # fmt: skip
    for _ in range(40):
        yield rng.randbytes(rng.randrange(1, 400))


def extreme_numbers() -> Iterator[tuple[str, bytes]]:
    """Sampling parameters at the ends of what float32, float64 and integers hold: taken or refused, never a failure."""
    values = (
        "5e-324", "1e-320", "1e-45", "1e-38", "1e-30", "1e30", "1e38", "3.5e38", "1.7976931348623157e308", "-0.0",
        "-5e-324", "1" + "0" * 300, "-9223372036854775809", "18446744073709551616",
    )  # fmt: skip
    fields = (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "priority",
    )  # fmt: skip
    for field in fields:
        for value in values:
            for others in ({}, {"temperature": "0.7", "top_p": "0.9", "logit_bias": '{"1":100,"2":-100}'}):
                yield COMPLETIONS, as_json({**VALID[COMPLETIONS], **others, field: value})


def framed_requests(key: str | None) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Bytes of one connection, and the statuses of its responses: the end of a body must never be in doubt.

    key: sent with requests that are to be answered.
    """
    authorization = b"" if key is None else f"authorization: Bearer {key}\r\n".encode("latin-1")
    good = as_json(VALID[COMPLETIONS])
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + authorization
    last = b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    hidden = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    length, chunked = b"content-length: %d\r\n" % len(good), b"transfer-encoding: chunked\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(good), good)
    for offer in (
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAA\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
    ):
        yield head + offer + length + b"\r\n" + good + last, (200, 200)
        yield head + offer + chunked + b"\r\n" + chunk + b"\r\n" + last, (200, 200)
        yield head + offer + b"content-length: %d\r\n\r\n" % len(hidden) + hidden + last, (400, 200)
    trailers = b"authorization: Bearer none\r\nx-slo-ttft-ms: nan\r\n\r\n"
    yield head + chunked + b"\r\n" + chunk + trailers + last, (200, 200)
    yield head + b"x-a: b\r\n" * 1000 + length + b"\r\n" + good, (431,)
    for framing in (
        length + chunked, chunked + length, length + b"content-length: 3\r\n", b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: xchunked\r\n", b"transfer-encoding: chunked, identity\r\n", length + b"x-a: b\r\n c\r\n",
        length + b"x-a: b\nx-c: d\r\n", length + b"x-a: \0\r\n", length + b"host: localhost\r\n",
    ):  # fmt: skip
        yield head + framing + b"\r\n" + (chunk + b"\r\n" if b"chunked" in framing else good) + hidden, (400,)


def long_streams(rng: random.Random, count: int) -> Iterator[tuple[bytes, int]]:
    """Bodies of requests worth leaving, and after how many bytes of their answer."""
    for _ in range(count):
        num_tokens = rng.choice((1, 5, 40, 400))
        fields = {
            "prompt": json.dumps([rng.randrange(1, 3)] * num_tokens),
            "max_tokens": str(rng.choice((50, 100))),
            "ignore_eos": "true",
            "stream": rng.choice(("true", "false")),
            "n": str(rng.choice((1, 1, 3))),
        }
        yield as_json(fields), rng.choice((0, 1, 500, 3000)) if fields["stream"] == "true" else 0


def as_json(fields: dict[str, str]) -> bytes:
    """An object of fields whose values are JSON text already."""
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()
