"""What `medha selftest` sends: wrong bodies, bytes that are no HTTP, more than any limit, clients that disconnect."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_medha.cli.fuzz.fuzz_wire import RawClient

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
PATHS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES, COUNT, TOKENIZE, DETOKENIZE)
GUARDED = ("/v1/models", "/metrics", "/version", "/openapi.json", "/debug/schedule", "/tokenize", "/admin/reload")
LARGE_BODIES = "large bodies"
_SLOW_TIMEOUT_S = 130.0  # for heads (20 s) and bodies (60 s) that never come, by the server's own defaults
_NUM_SILENT = 1_200      # more than the 1,024 descriptors that shells and service managers give
_REFUSED = range(400, 600)


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes of one connection, how they are sent, and which statuses hold beside what a server may always answer."""

    what: str
    raw: bytes
    statuses: range | None = None
    is_half_closed: bool = False
    leaves_after: int | None = None  # bytes of the response
    num_silent: int = 0              # connections that are open meanwhile and send nothing
    timeout_s: float | None = None


def groups(wire: RawClient, rng: random.Random, num_random: int, large_bytes: int, slow_tests: bool
           ) -> Iterator[tuple[str, Iterable[Case]]]:  # fmt: skip
    """All cases, by kind. Large bodies first, so that the most memory that the server has had is theirs."""

    def posted(bodies: Iterable[tuple[Any, ...]], **how: Any) -> Iterator[Case]:
        for path, body, *headers in bodies:
            shown = f"POST {path} {body[:120]!r} {headers[0] if headers else ''}"
            yield Case(shown, wire.request("POST", path, body, *headers), **how)

    good = wire.request("POST", COMPLETIONS, as_json(VALID[COMPLETIONS]))
    yield LARGE_BODIES, posted(large_bodies(large_bytes))
    yield "broken JSON", posted(broken_bodies())
    yield "wrong fields", posted(wrong_fields())
    yield "extreme numbers", posted(extreme_numbers())
    yield "beyond the limits", posted(beyond_limits(), statuses=_REFUSED)
    yield "hostile grammars", posted(hostile_grammars())
    yield "random bodies", posted(random_bodies(rng, num_random))
    # Some of these are requests that only lack their end; saying that no more comes is their end.
    yield "no HTTP", (Case(repr(raw[:120]), raw, is_half_closed=True) for raw in raw_requests(rng))
    live = wire.request("GET", "/health")
    yield "silent connections", (
        Case(f"beside {num} silent connections", live, range(200, 201), num_silent=num) for num in (100, _NUM_SILENT)
    )
    # Answered or closed, both are right: the end of sending is all that a client that leaves says, too.
    yield "half-closed sockets", posted(((COMPLETIONS, body) for body, _ in long_streams(rng, 10)), is_half_closed=True)
    yield "the same id twice", posted([(COMPLETIONS, as_json(VALID[COMPLETIONS]), {"x-request-id": "the-same"})] * 40)
    yield "clients that disconnect", (
        Case(f"left after {num_bytes} bytes of {body[:80]!r}", wire.request("POST", COMPLETIONS, body),
             leaves_after=num_bytes)
        for body, num_bytes in long_streams(rng, max(1, num_random // 10))
    )  # fmt: skip
    yield "bodies that stop", (
        Case(f"gone after {part}0% of a request", good[: part * len(good) // 10], leaves_after=0) for part in range(10)
    )
    if wire.api_key is not None:
        stranger = RawClient(wire.url, None, wire.timeout_s)
        yield "without the key", (
            Case(f"GET {path} without a key", stranger.request("GET", path), range(401, 402)) for path in GUARDED
        )
    if slow_tests:
        raw = wire.request("POST", COMPLETIONS, b"x" * 100)
        yield "slow heads and bodies", (
            Case(f"a {what} that never ends", part, timeout_s=_SLOW_TIMEOUT_S)
            for what, part in (("head", raw[:30]), ("body", raw[:-50])) * 4
        )


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
    "stop_sequences", "thinking", "output_config", "output_format", "cache_salt", "cache_prompt", "session_id",
    "ends_session", "prompt_cache_key", "nvext",
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
    ("x-session-id", "a" * 5000), ("x-session-id", "\xff\xfe"),
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
    many, most = 100_000, str(2**31 - 1)
    texts, ids = json.dumps(["a"] * many), json.dumps(list(range(many)))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    of_both = {
        "stop": texts, "stop_token_ids": ids, "logit_bias": json.dumps(dict.fromkeys(range(many), 1)), "n": str(many),
        "guided_json": json.dumps({"enum": ["x" * 10 * many]}), "guided_regex": json.dumps("a" * 10 * many),
    }  # fmt: skip
    for path, fields in (
        (COMPLETIONS, {**of_both, "prompt": texts, "best_of": str(many), "logprobs": str(many), "max_tokens": most}),
        (CHAT, {**of_both, "max_completion_tokens": most, "tools": json.dumps([tool] * many)}),
        (COMPLETIONS, {"stop": json.dumps("x" * 10 * many)}), (RESPONSES, {"max_output_tokens": most}),
    ):  # fmt: skip
        for name, value in fields.items():
            yield path, as_json({**VALID[path], name: value})
    yield CHAT, as_json({**VALID[CHAT], "logprobs": "true", "top_logprobs": str(many)})


def large_bodies(num_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Bodies of about this size with too many elements or too much text in one field, of every route."""

    def many(element: str) -> str:
        return "[" + ",".join([element] * (num_bytes // (len(element) + 1))) + "]"

    numbers, texts, objects = many("1"), many('"a"'), many("{}")
    blanks, nested = '"' + " " * num_bytes + '"', '{"a":' + many("[]") + "}"
    for path in PATHS:
        for value in (numbers, texts, objects, many('{"role":"user","content":""}'), blanks, nested):
            yield path, as_json({**VALID[path], next(iter(VALID[path])): value})
    fields = [(COMPLETIONS, field) for field in ("stop", "guided_json", "guided_choice", "logit_bias")]
    for path, field in (*fields, (CHAT, "tools"), (CHAT, "chat_template_kwargs")):
        for value in (texts, objects, blanks, nested):
            yield path, as_json({**VALID[path], field: value})


def hostile_grammars() -> Iterator[tuple[str, bytes]]:
    """Schemas, regexes and grammars that are wrong, huge, deep or slow, in the fields that take them."""
    doubled = {f"d{depth}": {"allOf": [{"$ref": f"#/$defs/d{depth + 1}"}] * 2} for depth in range(30)}
    among = {"anyOf": [{"type": "object", "properties": {f"p{place}": {"$ref": "#"}}} for place in range(500)]}
    # The library's limits do not end this one.
    endless = {"allOf": [{"type": "string", "pattern": f".*{place}.*"} for place in range(40)]}
    schemas: tuple[object, ...] = (
        endless, {"type": "nothing"}, {"type": 5}, {"properties": [1]}, {"enum": []}, {"$ref": "#/no"}, False, among,
        {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"}, {"type": "string", "minLength": 10**9},
        {"$defs": {**doubled, "d30": {"type": "object"}}, "$ref": "#/$defs/d0"}, {"type": "string", "pattern": "(a"},
        {"type": "array", "items": {"type": "null"}, "minItems": 10**8}, {"enum": ["x" * 60_000]},
        {"type": "string", "pattern": "(a{1000}){1000}"}, {"type": "number", "minimum": 1e-300, "maximum": 1e300},
        {"type": "integer", "multipleOf": 1234567, "minimum": 3, "maximum": 10**30}, {"type": "string", "format": 5},
        {"type": "object", "properties": {str(place): {"type": "string"} for place in range(2000)}},
    )  # fmt: skip
    # As deep as JSON can be read in Python, and half as deep.
    deep = ('{"items":' * depth + "{}" + "}" * depth for depth in range(460, 1000, 24))
    for schema in (*map(json.dumps, schemas), *deep):
        yield COMPLETIONS, as_json({**VALID[COMPLETIONS], "guided_json": schema})
        if len(schema) < _PROMPT_CHARS:
            tools = f'[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]'
            yield CHAT, as_json({**VALID[CHAT], "tools": tools, "tool_choice": '"required"'})
        form = f'{{"format":{{"type":"json_schema","name":"x","schema":{schema}}}}}'
        yield RESPONSES, as_json({**VALID[RESPONSES], "text": form})
    regexes = (
        "(a", "(?=a)b", "(a)\\1", "(a+)+$", "(a{1000}){1000}", "(((a{1,100}){1,100}){1,100}){1,100}", ".*a.{300}b",
        "a?" * 2000 + "a" * 2000, "(" * 2000 + "a" + ")" * 2000, "a" * 100_000, "\\p{L}{500}", "[", "",
    )  # fmt: skip
    rules = "".join(f'\nr{place}: "a" start' for place in range(150))
    grammars = (
        "start: start", "start: x", 'start: start start | "a" | ', "root ::= (", "%llguidance {", "\x00", "start: /(/",
        "start: " + " | ".join(f"r{place}" for place in range(150)) + rules, "start: <[1000000000]>",
    )  # fmt: skip
    choices: tuple[list[str], ...] = ([], [""], ["a"] * 5000, ["\x00\"\\"], ["a" * 70_000])
    for field, values in (("guided_regex", regexes), ("guided_grammar", grammars), ("guided_choice", choices)):
        for value in values:
            yield COMPLETIONS, as_json({**VALID[COMPLETIONS], field: json.dumps(value)})


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
    rest = b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    yield from (
        b"\x00\x01\x02\r\n\r\n", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        b"GET /\x00" + rest + b"\r\n", b"GET /%00%ff%2e%2e/" + rest + b"\r\n", b"GET /\xff\xfe" + rest + b"\r\n",
        b"GET /" + b"a" * 200_000 + rest + b"\r\n", b"GET /" + rest + b"x-a: " + b"b" * 200_000 + b"\r\n\r\n",
        b"GET /" + rest + b"x-a: b\r\n" * 20_000 + b"\r\n", b"HEAD /health" + rest + b"\r\n",
        *(method + b" /v1/completions" + rest + b"\r\n" for method in (b"BREW", b"DELETE")),
    )  # fmt: skip
    for framing in (
        b"content-length: -4", b"content-length: x", b"content-length: 99999999999999999999", b"upgrade: websocket",
        b"content-length: 3\r\ncontent-length: 4", b"content-length: 3\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked",
    ):  # fmt: skip
        yield b"POST /v1/completions" + rest + framing + b"\r\n\r\n" + good
    for _ in range(40):
        yield rng.randbytes(rng.randrange(1, 400))


def extreme_numbers() -> Iterator[tuple[str, bytes]]:
    """Sampling parameters at the ends of what float32, float64 and integers hold: taken or refused, never a failure."""
    values = (
        "5e-324", "1e-45", "1e-38", "1e-30", "1e30", "3.5e38", "1.7976931348623157e308", "-0.0", "-5e-324",
        "1" + "0" * 300, "-9223372036854775809", "18446744073709551616",
    )  # fmt: skip
    others = {"temperature": "0.7", "top_p": "0.9", "logit_bias": '{"1":100,"2":-100}'}
    for field in (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "priority",
    ):  # fmt: skip
        for value in values:
            yield COMPLETIONS, as_json({**VALID[COMPLETIONS], **others, field: value})


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
