"""Who may come in: places, shares of a key, and whether it would be in time."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from running_server import Running, StartServer, eventually, spec

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.request import Rejection
from megatron_medha.server.admission import AdmissionControl, AdmissionTicket
from megatron_medha.server.api_keys import ANONYMOUS, ApiClient, ApiKeys
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import ApiError, rejected
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.ttft_estimate import TtftEstimator

PATH = "/v1/completions"
A, B = ApiClient("a"), ApiClient("b")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock | None = None) -> AdmissionControl:
    return AdmissionControl(clock or Clock(), TtftEstimator())


def admit(
    admission: AdmissionControl, config: ServerConfig, client: ApiClient, spec: GenerationSpec
) -> AdmissionTicket:
    ticket = admission.admit(config, client, spec.requests())
    assert isinstance(ticket, AdmissionTicket)
    return ticket


def refusal(admission: AdmissionControl, config: ServerConfig, client: ApiClient, spec: GenerationSpec) -> ApiError:
    rejection = admission.admit(config, client, spec.requests())
    assert isinstance(rejection, Rejection)
    error = rejected(rejection)
    assert error.status == 429
    assert int(error.headers["retry-after"]) >= 1
    return error


def test_places_in_the_queue_come_back_with_the_first_token_and_live_ones_at_the_end() -> None:
    door = admission()
    config = ServerConfig(max_waiting_requests=2, max_live_requests=3)
    ticket = admit(door, config, A, spec(n=2))
    assert refusal(door, config, B, spec()).code == "waiting_requests"
    ticket.first_token(0)
    ticket.first_token(0)
    other = admit(door, config, B, spec())
    ticket.first_token(1)
    assert refusal(door, config, B, spec()).code == "live_requests"
    ticket.close(7)
    other.close(0)
    assert (door.num_live, door.num_waiting, door.num_waiting_tokens) == (0, 0, 0)
    assert door.num_refused == {"max_waiting_requests": 1, "max_live_requests": 1}


def test_waiting_tokens_are_bounded_but_a_single_long_prompt_still_gets_in() -> None:
    door = admission()
    config = ServerConfig(max_waiting_tokens=10)
    ticket = admit(door, config, A, spec(25))
    assert refusal(door, config, B, spec(1)).code == "waiting_tokens"
    ticket.first_token(0)
    admit(door, config, B, spec(1))


def test_a_key_at_its_limit_does_not_take_the_others_places() -> None:
    door = admission()
    config = ServerConfig(max_live_requests_per_key=2)
    ticket = admit(door, config, A, spec(n=2))
    assert refusal(door, config, A, spec()).code == "live_requests_per_key"
    admit(door, config, B, spec())
    ticket.close(0)
    admit(door, config, A, spec())


def test_tokens_a_minute_are_spent_by_prompt_and_output_and_earned_by_waiting() -> None:
    clock = Clock()
    door = admission(clock)
    config = ServerConfig(max_tokens_per_minute_per_key=600)
    admit(door, config, A, spec(500)).close(num_output_tokens=40)
    error = refusal(door, config, A, spec(100))
    assert error.headers["retry-after"] == "4"  # 40 tokens are missing, 10 come a second
    admit(door, config, B, spec(100))
    clock.now_s += 4.0
    admit(door, config, A, spec(100))


def test_a_prompt_beyond_a_minutes_worth_is_possible_when_the_minute_is_unspent() -> None:
    clock = Clock()
    door = admission(clock)
    config = ServerConfig(max_tokens_per_minute_per_key=60)
    admit(door, config, A, spec(600))
    assert int(refusal(door, config, A, spec(1)).headers["retry-after"]) == 541
    clock.now_s += 541.0
    admit(door, config, A, spec(1))


def test_limits_reach_clients_as_429_and_leave_nothing(start_server: StartServer) -> None:
    server: Running = start_server(FakeEngine(is_stepped=True), max_waiting_requests=2)
    with server.connect(PATH, json.dumps({"prompt": "a", "n": 2}).encode()):
        server.engine.wait_for_submitted(2)
        response = server.post(PATH, {"prompt": "a"})
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        assert "server.max_waiting_requests" in response.text
    server.assert_nothing_is_left()
    eventually(lambda: server.service.admission.num_live == 0)
    page = server.get("/metrics").text
    labels = 'engine="0",model_name="fake-model",reason="max_waiting_requests"'
    assert f"vllm:admission_rejections_total{{{labels}}} 1.0" in page


def test_a_prompt_over_the_configured_length_is_413(start_server: StartServer) -> None:
    server = start_server(max_prompt_tokens=5)
    for prompt in ("abcdef", [1] * 6, "a" * 900):
        response = server.post(PATH, {"prompt": prompt})
        assert response.status_code == 413 and response.json()["error"]["code"] == "prompt_too_long", prompt
    assert server.post(PATH, {"prompt": "abcde"}).status_code == 200


# ---- keys ----


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may come\nalice sk-alice\n\nbob   sk-bob\n")
    return path


def test_a_key_file_names_its_clients(key_file: Path) -> None:
    ring = ApiKeys(ServerConfig(api_key="sk-main", api_key_file=key_file, admin_key="sk-root"))
    assert ring.find("Bearer sk-alice") == ApiClient("alice")
    assert ring.find("bearer sk-bob") == ApiClient("bob")
    assert ring.find("Bearer sk-main") == ApiClient("default")
    assert ring.find("Bearer sk-root") == ApiClient("admin", is_admin=True)
    for wrong in (None, "", "sk-alice", "Bearer", "Bearer sk-alic", "Basic sk-alice", "Bearer \udcff"):
        assert ring.find(wrong) is None


def test_an_admin_key_alone_leaves_the_rest_open(key_file: Path) -> None:
    ring = ApiKeys(ServerConfig(admin_key="sk-root"))
    assert ring.find(None) == ANONYMOUS
    assert ring.find("Bearer wrong") is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no key"), ("# nothing\n", "no key"), ("alice\n", "line 1"), ("alice sk-1 more\n", "line 1"),
        ("alice sk-1\nbob sk-1\n", "line 2: this key was given before"), ("admin sk-1\n", "the server's own"),
    ],
)  # fmt: skip
def test_a_key_file_that_is_wrong_is_refused_by_line_and_never_by_key(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        ApiKeys(ServerConfig(api_key_file=path))
    assert "sk-1" not in str(caught.value)


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def status(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json().get("error", {}).get("code")


def test_admin_routes_open_to_the_admin_key_only(start_server: StartServer, key_file: Path) -> None:
    server = start_server(api_key_file=key_file, admin_key="sk-root")
    for path in ("/debug/schedule", "/debug/live", "/debug/requests"):
        assert status(server.get(path)) == (401, "invalid_api_key")
        assert status(server.get(path, headers=with_key("sk-bob"))) == (403, "admin_key_needed")
        assert server.get(path, headers=with_key("sk-root")).status_code == 200
    assert status(server.post("/admin/reload", {}, headers=with_key("sk-bob")))[0] == 403
    assert server.post(PATH, {"prompt": "a"}, headers=with_key("sk-root")).status_code == 200


def test_without_an_admin_key_a_server_with_keys_keeps_its_admin_routes_closed(start_server: StartServer) -> None:
    server = start_server(api_key="sk-main")
    response = server.get("/debug/schedule", headers=with_key("sk-main"))
    assert response.status_code == 403 and "server.admin_key" in response.text


def test_limits_count_by_key(start_server: StartServer, key_file: Path) -> None:
    server = start_server(FakeEngine(is_stepped=True), api_key_file=key_file, max_live_requests_per_key=1)
    body = json.dumps({"prompt": "a"}).encode()
    with server.connect(PATH, body, "authorization: Bearer sk-alice\r\n"):
        server.engine.wait_for_submitted(1)
        refused = server.post(PATH, {"prompt": "a"}, headers=with_key("sk-alice"))
        assert status(refused) == (429, "live_requests_per_key")
        with server.connect(PATH, body, "authorization: Bearer sk-bob\r\n"):
            server.engine.wait_for_submitted(2)
    server.assert_nothing_is_left()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_address_without_keys_is_refused_unless_said_so(host: str, key_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.allow_unauthenticated=true"):
        ServerConfig(host=host)
    ServerConfig(host=host, allow_unauthenticated=True)
    ServerConfig(host=host, api_key="sk-1")
    ServerConfig(host=host, api_key_file=key_file)
    for loopback in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        ServerConfig(host=loopback)


# ---- reload ----


def test_keys_and_limits_are_read_again_without_a_restart(start_server: StartServer, key_file: Path) -> None:
    configs = {"api_key_file": key_file, "admin_key": "sk-root", "port": 0}
    server = start_server(**configs, read_config=lambda: ServerConfig(**configs, drain_timeout_s=0))
    assert server.get("/v1/models", headers=with_key("sk-carol")).status_code == 401
    key_file.write_text("carol sk-carol\n")
    configs["max_prompt_tokens"] = 2
    answer = server.post("/admin/reload", {}, headers=with_key("sk-root"))
    assert answer.json() == {"changed": ["max_prompt_tokens"]}
    assert server.get("/v1/models", headers=with_key("sk-carol")).status_code == 200
    assert server.get("/v1/models", headers=with_key("sk-alice")).status_code == 401
    assert server.post(PATH, {"prompt": "abc"}, headers=with_key("sk-carol")).status_code == 413


@pytest.mark.parametrize(
    ("change", "what"), [({"port": 1234}, "server.port"), ({"max_logprobs": -1}, "server.max_logprobs")]
)
def test_a_reload_that_cannot_be_changes_nothing(start_server: StartServer, change: dict, what: str) -> None:
    configs: dict = {"port": 0, "drain_timeout_s": 0, "max_live_requests": 7}
    server = start_server(read_config=lambda: ServerConfig(**{**configs, **change}))
    answer = server.post("/admin/reload", {})
    assert answer.status_code == 400 and what in answer.json()["error"]["message"]
    assert server.service.config.max_live_requests == ServerConfig().max_live_requests


