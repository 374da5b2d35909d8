"""Structured output and tool calls over HTTP: what reaches the engine, and what clients see of its answer."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from fake_engine import WAIT_S, FakeEngine, Rule, say
from running_server import Running, StartServer

from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.grammar.grammar_trials import _ask
from megatron_medha.grammar.guidance import GrammarCompiler
from megatron_medha.text.tokenizer import Tokenizer, TokenizerConfig

pytest.importorskip("llguidance")
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
END = 257
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<tool_call>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or m.tool_calls[0].function.arguments.city }}\n{% endfor %}"
)
WEATHER = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "$defs": {"city": {"enum": ["Bergen", "Oslo"]}},
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


def obey(tokenizer: Tokenizer) -> Rule:
    """A model of no sense that samples as a rank does: anything that the grammar allows."""
    compiler = GrammarCompiler(tokenizer.as_json(), 300, (END,))
    matchers: dict[str, Any] = {}

    def next_token(request: Request, prompt: Sequence[int], sampling: Sampling, place: int) -> int:
        if sampling.grammar is None:
            return END
        if place == 0:
            matchers[request.request_id] = compiler.matcher(sampling.grammar)
        matcher = matchers[request.request_id]
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        token = random.Random(f"{place}{sampling.seed}").choice([one for one in range(300) if bits >> one & 1])
        if token != END:
            assert matcher.consume_token(token)
        return token

    return next_token


@pytest.fixture
def with_tools(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer._backend, TokenizerConfig(eos_token="</s>", chat_template=TEMPLATE))


@pytest.fixture
def obedient(start_server: StartServer, with_tools: Tokenizer) -> Running:
    return start_server(FakeEngine(rule=obey(with_tools)), with_tools)


@pytest.fixture
def says(start_server: StartServer, with_tools: Tokenizer) -> Callable[[str], Running]:
    return lambda text: start_server(FakeEngine(rule=say([*text.encode(), END])), with_tools)


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize(
    ("fields", "is_match"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}},
         lambda text: json.loads(text)["city"] in ("Bergen", "Oslo") and list(json.loads(text)) == ["city", "days"]),
        ({"guided_json": json.dumps(WEATHER)}, lambda text: 1 <= json.loads(text)["days"] <= 9),
        ({"structured_outputs": {"regex": "[0-9]{4}-x+y"}}, lambda text: text[4:6] == "-x" and text[:4].isdigit()),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, lambda text: text in ("yes", 'n"o')),
        ({"guided_grammar": 'root ::= "a" [0-9] "b"'}, lambda text: len(text) == 3 and text[1].isdigit()),
        ({"guided_grammar": 'start: "a" /[0-9]/ "b"'}, lambda text: len(text) == 3 and text[1].isdigit()),
    ],
)  # fmt: skip
def test_an_answer_matches_what_the_request_says(
    obedient: Running, fields: dict, is_match: Callable[[str], bool]
) -> None:
    body = {"prompt": "a", "max_tokens": 300, "seed": 1, **fields}
    choices = obedient.post(COMPLETIONS, {**body, "n": 2}).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop"]
    assert all(is_match(choice["text"]) for choice in choices), choices
    streamed = obedient.events(COMPLETIONS, body)
    assert "".join(json.loads(event)["choices"][0]["text"] for event in streamed[:-1]) == choices[0]["text"]


def test_a_grammar_that_takes_too_long_is_refused(start_server: StartServer) -> None:
    server = start_server(grammar_timeout_s=1e-3)
    rules = "".join(f'\nr{place}: "a" start' for place in range(100))
    grammar = "start: " + " | ".join(f"r{place}" for place in range(100)) + rules
    error = server.post(COMPLETIONS, {"prompt": "a", "guided_grammar": grammar}).json()["error"]
    assert (error["code"], error["param"]) == ("grammar_too_complex", "guided_grammar")
    assert not server.engine.submitted


def never_compiled(place: int) -> dict:
    """A schema that keeps the library busy for hours, whatever its limits are."""
    return {"allOf": [{"type": "string", "pattern": f".*{place}{other}.*"} for other in range(40)]}


def test_grammars_that_never_end_hurt_nobody_else(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_medha.grammar.grammar_trials._QUEUE_S", WAIT_S)  # all are served in the end
    server = start_server(grammar_timeout_s=2.0)
    with ThreadPoolExecutor(8) as threads:
        hostile = [{"prompt": "a", "guided_json": never_compiled(place)} for place in (1, 2, 3, 3, 3)]
        refused = [threads.submit(server.post, COMPLETIONS, body) for body in hostile]
        served = [threads.submit(server.post, COMPLETIONS, {"prompt": "a", "guided_regex": f"a{place}+"})
                  for place in range(3)]  # fmt: skip
    assert [one.result().status_code for one in served] == [200] * 3
    errors = [one.result().json()["error"] for one in refused]
    assert {(error["code"], error["param"]) for error in errors} == {("grammar_too_complex", "guided_json")}
    trials = server.service.grammars._trials
    assert trials is not None and not trials._slow_lane.locked()
    # What is left has nothing to do: one that hung would not answer.
    assert {one.pid for one in trials._all} == {one.pid for one in trials._idle}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_grammar_process_finds_no_secret_in_its_environment(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHA_ADMIN_KEY", "sk-very-secret")
    monkeypatch.setenv("MY_VARIABLE", "sk-configured")
    server = start_server(api_key="sk-configured")
    headers = {"authorization": "Bearer sk-configured"}
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}, headers=headers).status_code == 200
    trials = server.service.grammars._trials
    assert trials is not None
    for process in trials._all:
        found = b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
        assert b"PATH=" in found and b"very-secret" not in found and b"sk-configured" not in found


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_a_grammar_process_that_cannot_be_started_fails_its_request_alone(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async def no_process(*command: str, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    server = start_server()
    with monkeypatch.context() as patch:
        patch.setattr("asyncio.create_subprocess_exec", no_process)
        response = server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}).status_code == 200


@pytest.fixture
def hold_grammars(tmp_path: Path, start_server: StartServer) -> Iterator[Callable[[int], Running]]:
    """A server with two keys; one of them has sent so many schemas that are never compiled, and waits."""
    sockets: list[socket.socket] = []

    def start(count: int) -> Running:
        keys = tmp_path / "keys"
        keys.write_text("one key-1\ntwo key-2\n")
        keys.chmod(0o600)
        server = start_server(api_key_file=keys, grammar_timeout_s=10 * WAIT_S)
        for place in range(count):
            body = json.dumps({"prompt": "a", "guided_json": never_compiled(place)}).encode()
            sockets.append(socket.create_connection(("127.0.0.1", server.port), WAIT_S))
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer key-1\r\n"
            sockets[-1].sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while len(server.service.grammars._in_progress) < count:
            server.get("/health")
        return server

    yield start
    for one in sockets:
        one.close()


@pytest.mark.parametrize("key", ["key-1", "key-2"])
def test_a_small_grammar_never_waits_for_those_that_are_never_compiled(
    hold_grammars: Callable[[int], Running], key: str
) -> None:
    server = hold_grammars(20)
    for place in range(3):
        body = {"prompt": "a", "guided_regex": f"a{place}+"}
        assert server.post(COMPLETIONS, body, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_a_small_grammar_is_not_taken_for_a_slow_one_where_its_process_gets_no_time(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}).status_code == 200
    trials = server.service.grammars._trials
    assert trials is not None
    monkeypatch.setattr("megatron_medha.grammar.grammar_trials._FAST_LANE_S", 1e-6)
    monkeypatch.setattr("megatron_medha.grammar.grammar_trials._MAX_WAITS", 10**6)
    monkeypatch.setattr("megatron_medha.grammar.grammar_trials._computed_s", lambda pid: 1.0)
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "b"}).status_code == 200
    assert not trials._overdue


def test_one_client_leaves_others_a_place_for_grammars_that_take_long(
    hold_grammars: Callable[[int], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_medha.grammar.grammar_trials._FAST_LANE_S", 1e-9)  # all of them do, then
    server = hold_grammars(20)
    for place in range(3):
        body = {"prompt": "a", "guided_regex": f"b{place}+"}
        assert server.post(COMPLETIONS, body, headers={"authorization": "Bearer key-2"}).status_code == 200


def test_a_grammar_process_whose_pipe_has_closed_counts_as_ended() -> None:
    class ClosedPipe:
        def is_closing(self) -> bool:
            return True

        def write(self, line: bytes) -> None:
            raise RuntimeError("the handler is closed")  # as uvloop does

    process: Any = SimpleNamespace(stdin=ClosedPipe(), stdout=object())
    assert asyncio.run(_ask(process, b"{}\n")) is None


def test_a_grammar_process_that_was_killed_is_replaced(start_server: StartServer) -> None:
    server = start_server()
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}).status_code == 200
    trials = server.service.grammars._trials
    assert trials is not None
    killed = [one.pid for one in trials._all]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "b"}).status_code == 200
    assert not {one.pid for one in trials._all} & set(killed)


def test_without_an_end_token_nothing_can_be_guided(start_server: StartServer) -> None:
    server = start_server(FakeEngine(stop_token_ids=()))
    assert "end token" in server.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}).json()["error"]["message"]


@pytest.mark.parametrize(("choice", "most"), [("required", 16), ({"type": "function", "function": {"name": "now"}}, 1)])
def test_an_answer_that_must_call_does(obedient: Running, choice: Any, most: int) -> None:
    chat = client_of(obedient).chat.completions
    for seed in range(3):
        body = {"model": "fake-model", "messages": HI, "tools": TOOLS, "tool_choice": choice, "seed": seed}
        answer = chat.create(**body).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        calls = answer.message.tool_calls
        assert calls and len(calls) <= most
        for call in calls:
            arguments = json.loads(call.function.arguments)
            assert set(arguments) == ({"city", "days"} if call.function.name == "weather" else set())
        with chat.stream(**body) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert [one.function.arguments for one in streamed.message.tool_calls or ()] == [
            call.function.arguments for call in calls
        ]


def test_calls_are_told_from_text_whole_and_in_a_stream(says: Callable[[str], Running]) -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
    server = says(f"Let me see.<tool_call>\n{call}\n</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>")
    chat = client_of(server).chat.completions
    body: Any = {"model": "fake-model", "messages": HI, "tools": TOOLS}
    message = chat.create(**body).choices[0].message
    assert message.content == "Let me see."
    assert [(one.function.name, one.function.arguments) for one in message.tool_calls or ()] == [
        ("weather", '{"city": "Oslo", "days": 2}'), ("now", "{}"),
    ]
    with chat.stream(**body) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == "Let me see."
    assert [(one.function.name, one.function.arguments) for one in streamed.tool_calls or ()] == [
        (one.function.name, one.function.arguments) for one in message.tool_calls or ()
    ]
    alone = chat.create(**body, parallel_tool_calls=False).choices[0].message
    assert [one.function.name for one in alone.tool_calls or ()] == ["weather"]
    plain = chat.create(**{**body, "tool_choice": "none"}).choices[0].message
    assert plain.tool_calls is None and plain.content is not None and "<tool_call>" in plain.content


def test_the_template_is_told_of_tools_and_gets_arguments_as_objects(says: Callable[[str], Running]) -> None:
    server = says("ok")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert server.post(CHAT, {"messages": messages, "tools": TOOLS}).status_code == 200
    prompt = bytes(server.engine.submitted[-1].prompt.tolist()).decode()
    assert prompt.endswith("<|assistant|>Oslo\n") and '"name": "weather"' in prompt
    counted = server.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["count"]
    assert counted == len(prompt)


def test_openais_client_gets_responses_whole_and_streamed(says: Callable[[str], Running]) -> None:
    server = says("Good day.")
    responses = client_of(server).responses
    body: Any = {"model": "fake-model", "input": "hi", "instructions": "Be kind."}
    answer = responses.create(**body)
    assert (answer.status, answer.output_text, answer.store) == ("completed", "Good day.", False)
    assert answer.usage is not None and answer.usage.output_tokens == 10
    assert bytes(server.engine.submitted[-1].prompt.tolist()).decode() == "<|system|>Be kind.\n<|user|>hi\n"
    events = list(responses.create(**body, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Good day."
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "Good day."
    cut = responses.create(**body, max_output_tokens=4)
    assert (cut.status, cut.output_text) == ("incomplete", "Good")
    assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"


def test_responses_call_tools_and_are_guided(obedient: Running) -> None:
    responses = client_of(obedient).responses
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    body: Any = {"model": "fake-model", "input": HI, "tools": [tool], "extra_body": {"seed": 1}}
    body["tool_choice"] = "required"
    answer = responses.create(**body)
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls and all(json.loads(call.arguments)["city"] in ("Oslo", "Bergen") for call in calls)
    *_, last = responses.create(**body, stream=True)
    assert [item.arguments for item in last.response.output] == [call.arguments for call in calls]
    follow_up = [*HI, *(item.model_dump() for item in calls[:1]),
                 {"type": "function_call_output", "call_id": calls[0].call_id, "output": "rain"}]  # fmt: skip
    schema = {"type": "json_schema", "name": "w", "schema": WEATHER}
    final = responses.create(model="fake-model", input=follow_up, text={"format": schema})
    assert json.loads(final.output_text)["city"] in ("Oslo", "Bergen")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"), ({"input": []}, "input"),
        ({"input": 5}, "input"), ({"input": [{"type": "function_call"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output"}]}, "input[0]"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"), ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"), ({"n": 2}, "n"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_a_response_that_cannot_be_is_refused(says: Callable[[str], Running], fields: dict, param: str) -> None:
    answer = says("x").post(RESPONSES, {"input": "hi", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_the_best_of_several_are_answered(start_server: StartServer) -> None:
    # The fake's log-probabilities fall with the token's id.
    server = start_server(FakeEngine(rule=lambda request, prompt, sampling, place: 90 - (sampling.seed or 0)))
    body = {"prompt": ["a", "b"], "best_of": 4, "n": 2, "seed": 0, "max_tokens": 2}
    answer = server.post(COMPLETIONS, body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    single = server.post(COMPLETIONS, {**body, "n": 4, "logprobs": 0}).json()["choices"]
    ranked = sorted(single[:4], key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert [choice["text"] for choice in answer["choices"][:2]] == [choice["text"] for choice in ranked[:2]]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "odd"}}])
def test_what_a_tools_schema_cannot_keep_is_named_with_its_place(obedient: Running, choice: Any) -> None:
    odd = {"type": "object", "properties": {"a": {"const": 2**53 + 1}, "b": {"not": {"const": 1}}}}
    tools = [TOOLS[1], {"type": "function", "function": {"name": "odd", "parameters": odd}}]
    error = obedient.post(CHAT, {"messages": HI, "tools": tools, "tool_choice": choice}).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "invalid_grammar")
    start = "tools[1].function.parameters" if choice == "required" else "#"
    assert f"{start}/properties/a/const: 9007199254740993 " in error["message"]
    assert f"{start}/properties/b/not: " in error["message"]


def test_names_inside_of_each_tools_schema_are_its_own(start_server: StartServer, with_tools: Tokenizer) -> None:
    server = start_server(FakeEngine(rule=obey(with_tools), max_request_tokens=9000), with_tools)

    def schema(kind: str, own_id: str) -> dict[str, Any]:
        uses = {"named": {"$ref": "#same"}, "whole": {"$ref": f"{own_id}#/$defs/x"},
                "same": {"const": {"$ref": "#", "$anchor": kind}}}  # fmt: skip
        return {"$id": own_id, "type": None, "properties": uses, "required": list(uses), "additionalProperties": False,
                "$defs": {"x": {"$anchor": "same", "enum": [kind]}}}  # fmt: skip

    tools = [{"type": "function", "function": {"name": kind, "parameters": schema(kind, f"https://{kind}/s")}}
             for kind in "ab"]  # fmt: skip
    for choice in ("required", {"type": "function", "function": {"name": "a"}}):
        body = {"messages": HI, "tools": tools, "tool_choice": choice, "max_tokens": 900}
        message = server.post(CHAT, body).json()["choices"][0]["message"]
        kind, arguments = message["tool_calls"][0]["function"].values()
        assert json.loads(arguments) == {"named": kind, "whole": kind, "same": {"$ref": "#", "$anchor": kind}}


def test_a_model_of_pydantic_is_kept_by_a_format_and_by_tools(
    start_server: StartServer, with_tools: Tokenizer
) -> None:
    server = start_server(FakeEngine(rule=obey(with_tools), max_request_tokens=9000), with_tools)

    class Lamp(pydantic.BaseModel):
        kind: Literal["lamp"]
        price: Annotated[float, pydantic.Field(ge=0, le=1e6)] | None = None
        colours: set[Literal["red", "blue"]]
        sold: date

    class Chair(pydantic.BaseModel):
        kind: Literal["chair"]
        legs: int = pydantic.Field(ge=0, le=2**63 - 1)
        maker: ipaddress.IPv4Address

    class Order(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        what: Annotated[Lamp | Chair, pydantic.Field(discriminator="kind")]
        rooms: dict[Literal["hall", "attic"], bool]

    chat = client_of(server).chat.completions
    schema: Any = Order.model_json_schema()
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "order", "parameters": schema}}]
    body: Any = {"model": "fake-model", "messages": HI, "max_tokens": 900}
    format_of_it = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    named = {"type": "function", "function": {"name": "order"}}
    for seed in range(8):
        said = chat.create(**body, seed=seed, response_format=format_of_it).choices[0]
        called = chat.create(**body, seed=seed, tools=tools, tool_choice=named).choices[0]
        arguments = (called.message.tool_calls or ())[0].function.arguments
        for choice, text in ((said, said.message.content), (called, arguments)):
            if choice.finish_reason != "length":
                Order.model_validate_json(text or "")
    assert chat.create(**body, tools=tools, tool_choice="required").choices[0].message.tool_calls
