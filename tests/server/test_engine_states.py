"""The server while the engine loads, fails and stops."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import Running, StartServer

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EnginePhase, EngineStatus
from megatron_medha.server.app import create_app
from megatron_medha.server.run_server import run
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.text.tokenizer import Tokenizer

PATH = "/v1/completions"


@dataclass
class LoadingEngine(FakeEngine):
    """Not ready yet."""

    status: EngineStatus = EngineStatus(EnginePhase.LOADING, "layer 3 of 4", 0.75)


def test_while_loading_requests_are_told_to_come_back(start_server: StartServer) -> None:
    server = start_server(LoadingEngine())
    for path, body in ((PATH, {"prompt": "a"}), ("/v1/chat/completions", {"messages": []}), ("/tokenize", {})):
        response = server.post(path, body)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "model_loading"
        assert "75%" in response.text and "layer 3 of 4" in response.text
    assert server.get("/health").status_code == 200
    assert server.get("/v1/models").json()["data"] == []
    ready = server.get("/ready")
    assert ready.status_code == 503
    assert ready.json() == {"status": "loading", "detail": "layer 3 of 4", "fraction": 0.75}
    server.engine.status = EngineStatus(EnginePhase.READY, "", 1.0)
    assert server.get("/ready").status_code == 200
    assert server.post(PATH, {"prompt": "a"}).status_code == 200


def test_while_ranks_come_up_again_requests_are_taken_and_probes_tell_the_truth(start_server: StartServer) -> None:
    server = start_server(FakeEngine())
    server.engine.status = EngineStatus(EnginePhase.RECOVERING, "rank 1 was ended by SIGKILL", 0.5, 2, 1)
    ready = server.get("/ready")
    assert ready.status_code == 503 and int(ready.headers["retry-after"]) > 0
    assert ready.json() == {"status": "recovering", "detail": "rank 1 was ended by SIGKILL", "fraction": 0.5}
    assert server.get("/health").status_code == 200
    assert server.post(PATH, {"prompt": "a"}).status_code == 200
    page = server.get("/metrics").text.splitlines()
    samples = {line.split("{")[0]: float(line.split()[-1]) for line in page if line.startswith("medha:")}
    assert samples["medha:rank_failures_total"] == 2 and samples["medha:rank_recoveries_total"] == 1
    assert samples["medha:is_ready"] == 0


def test_the_port_listens_before_the_tokenizer_is_there(start_server: StartServer, tokenizer: Tokenizer) -> None:
    coming: Future[Tokenizer] = Future()
    server = start_server(FakeEngine(), coming)
    assert server.get("/ready").json()["detail"] == "loading the tokenizer"
    assert server.post(PATH, {"prompt": "a"}).status_code == 503
    coming.set_result(tokenizer)
    assert server.post(PATH, {"prompt": "a"}).status_code == 200


def test_a_tokenizer_that_cannot_be_loaded_is_a_failure_with_its_reason(start_server: StartServer) -> None:
    broken: Future[Tokenizer] = Future()
    broken.set_exception(ValueError("tokenizer.json is missing"))
    server = start_server(FakeEngine(), broken)
    assert server.get("/health").status_code == 503
    assert "tokenizer.json is missing" in server.post(PATH, {"prompt": "a"}).text


@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_request_in_flight_when_the_engine_fails_gets_a_500(
    start_server: StartServer, is_silent: bool, n: int
) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    connection = server.connect(PATH, json.dumps({"prompt": "abc", "n": n}).encode(), "connection: close\r\n")
    server.engine.wait_for_submitted(n)
    server.engine.fail("rank 0 died", is_silent=is_silent)
    answer = b"".join(iter(lambda: connection.recv(4096), b""))
    connection.close()
    assert answer.startswith(b"HTTP/1.1 500")
    assert b"rank 0 died" in answer and b'"error"' in answer
    server.assert_nothing_is_left()
    assert server.get("/health").status_code == 503
    after = server.post(PATH, {"prompt": "abc"})
    assert after.status_code == 503 and after.json()["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_stream_that_had_begun_ends_with_an_error_event(start_server: StartServer, is_silent: bool) -> None:
    server = start_server(FakeEngine(is_stepped=True))
    server.engine.step(1)
    events = []
    with server.client.stream("POST", PATH, json={"prompt": "abc", "stream": True}) as response:
        for line in response.iter_lines():
            if line and not events:
                server.engine.fail("rank 0 died", is_silent=is_silent)
            events += [line] if line else []
    assert "rank 0 died" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
    assert events[-1] == "data: [DONE]"
    server.assert_nothing_is_left()


def test_a_stream_sends_comments_while_it_waits_for_its_first_token(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True), sse_header_wait_s=0.0, sse_keepalive_s=0.01)
    lines = []
    with server.client.stream("POST", PATH, json={"prompt": "abc", "stream": True, "max_tokens": 1}) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 4:
                server.engine.step(1)
    assert lines[0].startswith(": ") and lines[2].startswith(": ")
    assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


@dataclass
class RefusingEngine(FakeEngine):
    """Breaks when it is handed the second sub-request: a bug of ours."""

    def submit(self, *args: object) -> None:
        if self.submitted:
            raise RuntimeError("boom")
        super().submit(*args)  # type: ignore[arg-type]


@dataclass
class BrokenEngine(FakeEngine):
    """Cannot even start."""

    def start(self, sink: object) -> None:
        raise ConfigError("no such device")


def test_an_engine_that_cannot_start_ends_the_server_with_its_error(tokenizer: Tokenizer) -> None:
    config = ServerConfig(port=0)
    with pytest.raises(ConfigError, match="no such device"):
        run(create_app(Service(BrokenEngine(), tokenizer, config)), config)


def test_a_bug_of_ours_is_a_500_without_details_and_leaves_nothing(start_server: StartServer) -> None:
    server = start_server(RefusingEngine(is_stepped=True), allowed_origins=("*",))
    response = server.post(PATH, {"prompt": "abc", "n": 2}, headers={"x-request-id": "mine"})
    assert response.status_code == 500
    assert (response.headers["x-request-id"], response.headers["access-control-allow-origin"]) == ("mine", "*")
    assert response.json()["error"]["code"] == "internal_error" and "boom" not in response.text
    server.assert_nothing_is_left()


def test_stopping_the_server_ends_what_is_in_flight(start_server: StartServer) -> None:
    server: Running = start_server(FakeEngine(is_stepped=True))
    connection = server.connect(PATH, json.dumps({"prompt": "abc"}).encode())
    server.engine.wait_for_submitted(1)
    server.server.should_exit = True
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    connection.close()
    assert server.engine.status.phase is EnginePhase.STOPPED
    assert server.engine.aborted == [server.engine.submitted[0].request.request_id]
