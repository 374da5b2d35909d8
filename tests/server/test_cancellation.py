"""Clients that leave, at every state their request can be in: blocks and rank state come back, others are served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from live_server import LiveEngine
from running_server import Running, StartServer, eventually

from megatron_medha.core.kv.sequence import Status
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.server.observe.metrics import Metrics

PATH = "/v1/completions"
LONG, SHORT = 3000, 40


def start(start_server: StartServer, engine: LiveEngine, **settings: object) -> Running:
    server = start_server(engine, journal=engine.journal, **settings)
    while server.get("/ready").status_code != 200:
        time.sleep(0.001)  # the engine's thread starts; nothing tells
    return server


def body(num_tokens: int = LONG, **fields: object) -> bytes:
    return json.dumps(
        {"prompt": [num_tokens % 200] * num_tokens, "max_tokens": 500, "ignore_eos": True, "stream": True, **fields}
    ).encode()


def one(scheduler: Scheduler, num_tokens: int = LONG) -> object | None:
    # A list at once: the engine may be at work while a test looks.
    return next((seq for seq in list(scheduler.sequences) if seq.request.num_prompt_tokens == num_tokens), None)


def is_queued(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return seq is not None and seq.is_waiting


def is_mid_chunk(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return seq is not None and seq.num_batches_in_flight == 1 and 0 < seq.num_computed_tokens < LONG - 100


def is_paused_with_kv(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return (
        seq is not None
        and seq.status is Status.PREFILLING
        and not seq.num_batches_in_flight
        and bool(seq.block_table.shards)
        and scheduler.num_batches_in_flight == 1
    )


def is_in_its_last_chunk(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return seq is not None and seq.num_batches_in_flight == 1 and seq.num_scheduled_tokens == LONG


def is_decoding(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return seq is not None and seq.num_output_tokens == 3


def is_decoding_in_flight(scheduler: Scheduler) -> bool:
    seq = one(scheduler)
    return seq is not None and seq.num_output_tokens == 3 and seq.num_batches_in_flight == 1


STATES = [is_queued, is_mid_chunk, is_paused_with_kv, is_in_its_last_chunk, is_decoding, is_decoding_in_flight]


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("is_state", STATES)
def test_a_client_that_leaves_gives_everything_back(
    start_server: StartServer, is_state: Callable[[Scheduler], bool], is_stream: bool
) -> None:
    engine = LiveEngine()
    server = start(start_server, engine)
    pauses = is_state is is_paused_with_kv
    engine.audit.stop_at(is_mid_chunk if pauses else is_state)
    leaving = server.connect(PATH, body(stream=is_stream))
    engine.audit.wait_until_stopped()
    if pauses:  # by one that comes while it is in the middle
        urgent = server.connect(PATH, body(LONG - 1, priority=-1, max_tokens=2))
        engine.wait_for_submitted(2)
        engine.audit.stop_at(is_state)
        engine.audit.wait_until_stopped()
    leaving.close()
    engine.wait_for_aborts(1)
    engine.audit.go_on()
    if pauses:
        received = b""
        while b"[DONE]" not in received:
            received += urgent.recv(65536)
        urgent.close()
    engine.wait_until_idle()
    # The next batch tells the ranks to forget it, unless they have never known it.
    assert server.post(PATH, {"prompt": [5] * SHORT, "max_tokens": 2}).status_code == 200
    engine.wait_until_idle()
    assert len(engine.audit.released) >= 1
    eventually(lambda: server.service.admission.num_live == 0)
    assert engine.audit.num_checks > 3


@pytest.mark.parametrize(("is_state", "num_tokens"), [(is_mid_chunk, 64), (is_decoding, LONG)])
def test_prompt_tokens_of_a_client_that_leaves_are_counted_as_far_as_they_were_computed(
    start_server: StartServer, is_state: Callable[[Scheduler], bool], num_tokens: int
) -> None:
    metrics = Metrics()
    engine = LiveEngine(metrics=metrics)
    server = start(start_server, engine, metrics=metrics)
    engine.audit.stop_at(is_state)
    leaving = server.connect(PATH, body())
    engine.audit.wait_until_stopped()
    leaving.close()
    engine.wait_for_aborts(1)
    engine.audit.go_on()
    engine.wait_until_idle()
    eventually(lambda: server.service.admission.num_live == 0)
    assert num_tokens <= metrics.num_prompt_tokens <= LONG


def test_a_client_that_leaves_while_there_is_no_memory_for_it_leaves_the_queue(start_server: StartServer) -> None:
    engine = LiveEngine(num_blocks=220, step_s=0.1, max_batch_tokens=1024)  # the holder decodes for ten seconds
    server = start(start_server, engine)
    holder = server.connect(PATH, body(3200, max_tokens=100))
    engine.audit.wait_for(lambda scheduler: scheduler.memory.num_free_blocks < 30)
    leaving = server.connect(PATH, body())
    engine.audit.wait_for(is_queued)
    leaving.close()
    engine.audit.wait_for(lambda scheduler: one(scheduler) is None)
    holder.close()
    engine.wait_until_idle()


def test_many_clients_leaving_at_random_lose_no_block(start_server: StartServer) -> None:
    engine = LiveEngine(num_blocks=300)  # so little that answers preempt each other
    server = start(start_server, engine)
    connections = [
        server.connect(PATH, body(20 + 173 * place % 2000, max_tokens=20 + place, n=1 + place % 3))
        for place in range(24)
    ]
    for place, connection in enumerate(connections):
        if place % 3 != 0:
            connection.recv(50 if place % 2 else 1)
            connection.close()
    for connection in connections[::3]:
        received = b""
        while b"[DONE]" not in received:
            part = connection.recv(65536)
            assert part, received[-300:]
            received += part
        connection.close()
    engine.wait_until_idle()
    eventually(lambda: server.service.admission.num_live == 0)


def test_a_reader_that_stalls_is_cut_off_and_its_request_ended(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = start(start_server, engine, stalled_client_timeout_s=0.2, max_buffered_tokens=100_000)
    stalled = server.connect(PATH, body(10, max_tokens=4000, n=32), receive_bytes=4096)
    engine.wait_for_aborts(32)
    engine.wait_until_idle()
    assert server.service.metrics.num_cut_off == {"reader_stalled": 1}
    stalled.close()


def test_unread_tokens_are_bounded_and_the_request_ends_before_its_reader_does(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = start(start_server, engine, max_buffered_tokens=50)
    slow = server.connect(PATH, body(10, max_tokens=4000, n=32), receive_bytes=4096)
    engine.wait_for_aborts(32)
    engine.wait_until_idle()
    received = b""
    while b"[DONE]" not in received:  # it reads after all: then it hears of it
        part = slow.recv(65536)
        assert part
        received += part
    assert b'"code":"reader_too_slow"' in received
    slow.close()


def test_a_request_beyond_its_time_ends_with_503(start_server: StartServer) -> None:
    engine = LiveEngine()
    server = start(start_server, engine, request_timeout_s=0.05)
    response = server.post(PATH, {"prompt": [1] * 3000, "max_tokens": 1000})
    assert response.status_code == 503 and response.json()["error"]["code"] == "request_timeout"
    assert int(response.headers["retry-after"]) >= 1
    engine.wait_until_idle()
