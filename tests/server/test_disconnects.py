"""Clients that go away, in every state: their requests leave the engine and nothing waits for them."""

from __future__ import annotations

import json
import queue
import threading
from array import array

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import Running, StartServer, eventually

from megatron_medha.text.tokenizer import Tokenizer

PATH = "/v1/completions"


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": "abc", "max_tokens": 900, **fields}).encode()


def read_until(connection: object, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(4096)  # type: ignore[attr-defined]
        assert part, received
        received += part
    return received


@pytest.fixture
def stepped(start_server: StartServer) -> Running:
    return start_server(FakeEngine(is_stepped=True))


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_gone_before_the_first_token_ends_its_requests(stepped: Running, is_stream: bool, n: int) -> None:
    connection = stepped.connect(PATH, body(stream=is_stream, n=n))
    stepped.engine.wait_for_submitted(n)
    connection.close()
    stepped.engine.wait_for_aborts(n)
    stepped.assert_nothing_is_left()
    assert sorted(stepped.engine.aborted) == sorted(live.request.request_id for live in stepped.engine.submitted)


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_gone_in_the_middle_of_a_stream_ends_its_requests(stepped: Running, n: int) -> None:
    connection = stepped.connect(PATH, body(stream=True, n=n))
    stepped.engine.step(2)
    read_until(connection, b'"text":"b"')
    connection.close()
    stepped.engine.wait_for_aborts(n)
    stepped.assert_nothing_is_left()


def test_a_client_gone_in_the_middle_of_a_whole_answer_ends_its_requests(stepped: Running) -> None:
    connection = stepped.connect(PATH, body())
    stepped.engine.step(3)
    stepped.engine.wait_for_submitted(1)
    connection.close()
    stepped.engine.wait_for_aborts(1)
    stepped.assert_nothing_is_left()


def test_a_choice_that_was_complete_is_not_aborted_with_the_others(stepped: Running) -> None:
    connection = stepped.connect(PATH, json.dumps({"prompt": ["abc", "xyz"], "stop": "b", "stream": True}).encode())
    stepped.engine.step(2)
    read_until(connection, b'"text":"y"')  # the other choice ended with the event before
    connection.close()
    stepped.engine.wait_for_aborts(2)
    stepped.assert_nothing_is_left()
    assert len(stepped.engine.aborted) == len(set(stepped.engine.aborted))


def test_a_client_that_does_not_read_is_ended_when_it_goes(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_request_tokens=200_000))
    connection = server.connect(PATH, json.dumps({"prompt": "abc", "max_tokens": 100_000, "stream": True}).encode())
    server.engine.wait_for_submitted(1)
    assert server.post(PATH, {"prompt": "x"}).status_code == 200  # the others are served meanwhile
    connection.close()
    server.assert_nothing_is_left()


def test_every_client_of_many_gets_its_own_tokens_though_others_leave(stepped: Running) -> None:
    leaving = [stepped.connect(PATH, body(prompt="leave", stream=True)) for _ in range(4)]
    staying = [stepped.connect(PATH, body(prompt="stay", max_tokens=5, stream=False)) for _ in range(4)]
    stepped.engine.wait_for_submitted(8)
    stepped.engine.step(1)
    for connection in leaving:
        read_until(connection, b'"text":"l"')
        connection.close()
    stepped.engine.step(4)
    for connection in staying:
        assert b'"text":"stays"' in read_until(connection, b'"total_tokens":9')
        connection.close()
    stepped.engine.wait_for_aborts(4)
    stepped.assert_nothing_is_left()


class SlowTokenizer:
    """Says that it encodes, and goes on when it may."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.begun: queue.Queue[str] = queue.Queue()
        self.may_go_on = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: bool) -> array[int]:
        self.begun.put(text[0])
        assert self.may_go_on.wait(WAIT_S)
        return self._tokenizer.encode(text, **options)


def test_long_text_of_a_client_that_left_while_it_waited_is_never_tokenized(
    start_server: StartServer, tokenizer: Tokenizer
) -> None:
    slow = SlowTokenizer(tokenizer)
    server = start_server(FakeEngine(max_request_tokens=200_000), slow)
    bodies = [json.dumps({"prompt": 100_000 * letter, "max_tokens": 1}).encode() for letter in "abc"]
    connections = [server.connect(PATH, body) for body in bodies[:2]]
    assert {slow.begun.get(timeout=WAIT_S) for _ in connections} == set("ab")  # both threads are busy
    leaving = server.connect(PATH, bodies[2])
    eventually(lambda: server.service.bodies.num_bytes == 3 * len(bodies[0]))
    leaving.close()
    eventually(lambda: server.service.bodies.num_bytes == 2 * len(bodies[0]))
    slow.may_go_on.set()
    for connection, letter in zip(connections, "ab"):
        assert f'"text":"{letter}"'.encode() in read_until(connection, b'"usage"')
        connection.close()
    eventually(lambda: server.service.bodies.num_bytes == 0)
    assert slow.begun.empty()
