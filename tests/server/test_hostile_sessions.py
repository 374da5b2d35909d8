"""Sessions, salts and shared prefixes as a hostile or careless client uses them, over a simulated replica."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from live_server import LiveEngine
from running_server import Running, StartServer, eventually

from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.core.scheduling.scheduler import Scheduler

COMPLETIONS = "/v1/completions"
GRANULE = 16
PROMPT = [place % 250 for place in range(200)]


@pytest.fixture
def start_live(start_server: StartServer) -> Callable[..., Running]:
    def start(*, server: dict[str, Any] | None = None, **options: Any) -> Running:
        engine = LiveEngine(kv=options.pop("kv", KVConfig()), **options)
        running = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics, **(server or {}))
        eventually(lambda: running.get("/ready").status_code == 200)
        return running

    return start


def num_cached(server: Running, prompt: list[int] = PROMPT, **fields: Any) -> int:
    response = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 2, **fields})
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def whole_granules(num_tokens: int) -> int:
    return num_tokens // GRANULE * GRANULE


WRONG = [1, 1.5, True, [], ["a"], {}, {"a": "b"}, "x" * 257, "x" * 1_000_000]


@pytest.mark.parametrize("name", ["session_id", "cache_salt", "prompt_cache_key"])
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_name_of_the_wrong_type_or_length_is_refused_and_named(
    start_server: StartServer, path: str, name: str
) -> None:
    server = start_server(FakeEngine(granule_tokens=GRANULE))
    field = {COMPLETIONS: {"prompt": "a"}, "/v1/responses": {"input": "a"}}.get(
        path, {"messages": [{"role": "user", "content": "a"}]}
    )
    for value in WRONG:
        length = {} if path == "/v1/responses" else {"max_tokens": 1}
        response = server.post(path, {**field, **length, name: value})
        assert response.status_code == 400 and name in response.text, (value, response.text)
        assert len(response.content) < 2000
    assert not server.engine.submitted


@pytest.mark.parametrize("name", ["ends_session", "cache_prompt"])
@pytest.mark.parametrize("value", [1, "yes", [], {}])
def test_a_flag_that_is_none_is_refused_and_named(start_server: StartServer, name: str, value: object) -> None:
    server = start_server(FakeEngine(granule_tokens=GRANULE))
    response = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, name: value})
    assert response.status_code == 400 and name in response.text


@pytest.mark.parametrize("name", ["a\nb", "\r\nx-session-id: other", "\0", "\ud800", "é" * 256, " ", "a b", "\u202e"])
def test_names_may_hold_any_character_and_never_meet_another(start_server: StartServer, name: str) -> None:
    server = start_server(FakeEngine(granule_tokens=GRANULE))
    for session in (name, name + "x" if len(name) < 256 else name[1:] + "x"):
        body = {"prompt": "a" * 40, "max_tokens": 1, "session_id": session, "cache_salt": session}
        response = server.client.post(COMPLETIONS, content=json.dumps(body).encode())
        if name == "\ud800" and response.status_code == 400:
            return  # no text
        assert response.status_code == 200, response.text
    first, second = (live.request for live in server.engine.submitted)
    assert first.session_id == f"anonymous {name}" != second.session_id
    assert first.prefix_keys[:KEY_BYTES] != second.prefix_keys[:KEY_BYTES]


def test_addresses_name_no_sessions_of_each_other_where_they_are_isolated(start_server: StartServer) -> None:
    for isolates_keys, owner in ((False, "anonymous"), (True, "127.0.0.1")):
        server = start_server(FakeEngine(granule_tokens=GRANULE), isolates_keys=isolates_keys)
        assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "session_id": "s"}).status_code == 200
        assert server.engine.submitted[-1].request.session_id == f"{owner} s"


def test_the_end_of_a_session_ends_no_other_and_is_no_end_of_its_own_name(start_live: Callable[..., Running]) -> None:
    server = start_live(num_blocks=60)  # of 16 tokens
    mine, others = [1] * 208, [2] * 208
    num_cached(server, mine, session_id="mine")
    num_cached(server, others, session_id="others")
    num_cached(server, [3] * 40, session_id="others", ends_session=True)
    # 26 blocks are cached beside those of the two live tokens: some must go, and those of the ended session first.
    num_cached(server, [4] * 750)
    assert num_cached(server, mine, session_id="mine") == whole_granules(207)
    assert num_cached(server, others, session_id="others") < whole_granules(207)
    assert num_cached(server, others, session_id="others") == whole_granules(207)  # it goes on like any other


def test_many_sessions_leave_no_more_than_their_names(start_live: Callable[..., Running]) -> None:
    server = start_live(num_blocks=40)
    num_sessions = int(os.environ.get("MEDHA_SESSIONS", "300"))
    for session in range(num_sessions):
        prompt = [7 + session % 200, session // 200] * 10
        num_cached(server, prompt, max_tokens=1, session_id=f"session {session}")
    server.engine.wait_until_idle()
    index = server.engine.audit.scheduler.memory.cache.index
    assert len(index._left_by_session) == num_sessions
    assert [num_cached(server) for _ in range(2)] == [0, whole_granules(len(PROMPT) - 1)]


def test_what_a_session_left_beyond_its_time_goes_like_that_of_no_session(start_live: Callable[..., Running]) -> None:
    for session_ttl_s, is_kept in ((1e6, True), (0.0, False)):
        server = start_live(num_blocks=60, kv=KVConfig(session_ttl_s=session_ttl_s, session_share=1.0, eviction="ttl"))
        session, plain = [1] * 400, [2] * 400
        num_cached(server, session, session_id="idle")
        num_cached(server, plain)
        num_cached(server, [3] * 400)
        assert (num_cached(server, session, session_id="idle") == whole_granules(399)) == is_kept


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, whole_granules(199)), ({"logprobs": 1}, whole_granules(199)), ({"echo": True}, whole_granules(199)),
        ({"echo": True, "logprobs": 1}, 0), ({"n": 3}, whole_granules(199)), ({"best_of": 3}, whole_granules(199)),
        ({"n": 2, "echo": True, "logprobs": 1}, 0), ({"max_tokens": 0, "echo": True}, whole_granules(199)),
        ({"cache_prompt": False}, 0), ({"n": 3, "cache_prompt": False}, 0),
    ],
)  # fmt: skip
def test_cached_tokens_of_every_kind_of_completion(
    start_live: Callable[..., Running], fields: dict[str, Any], expected: int
) -> None:
    server = start_live()
    assert num_cached(server) == 0
    assert num_cached(server, **fields) == expected


def test_siblings_of_a_client_that_leaves_are_answered(start_live: Callable[..., Running]) -> None:
    server = start_live(max_batch_tokens=32)
    stem = [place % 250 for place in range(2000)]
    engine = server.engine

    def is_waited_for(scheduler: Scheduler) -> bool:
        waiting = [seq for seq in scheduler.sequences if scheduler.awaited(seq) is not None]
        return len(waiting) == 3 and any(seq.num_computed_tokens > 300 for seq in scheduler.sequences)

    engine.audit.stop_at(lambda scheduler: scheduler.num_sequences > 0)
    lead = server.connect(COMPLETIONS, json.dumps({"prompt": [*stem, 1, 2], "max_tokens": 900}).encode())
    engine.wait_for_submitted(1)
    siblings = [
        server.connect(COMPLETIONS, json.dumps({"prompt": [*stem, 9 + index], "max_tokens": 3}).encode())
        for index in range(3)
    ]
    engine.wait_for_submitted(4)
    engine.audit.wait_until_stopped()
    engine.audit.stop_at(is_waited_for)
    engine.audit.wait_until_stopped()
    lead.close()
    engine.wait_for_aborts(1)
    engine.audit.go_on()
    for connection in siblings:
        received = b""
        while b'"cached_tokens"' not in received or not received.rstrip().endswith(b"}"):
            part = connection.recv(65536)
            assert part, received
            received += part
        body = json.loads(received[received.index(b"{") :])
        assert body["usage"]["completion_tokens"] == 3
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 288
        connection.close()
    server.assert_nothing_is_left()
