"""Ending a server in order: drain, its deadline, the second signal; and bounds on connections."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import Running, StartServer

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EnginePhase
from megatron_medha.server.run_server import check_tls
from megatron_medha.server.server_config import ServerConfig

PATH = "/v1/completions"


def stream_body(**fields: object) -> bytes:
    return json.dumps({"prompt": "abc", "max_tokens": 20, "stream": True, **fields}).encode()


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
    return received


def tell(server: Running, number: int) -> None:
    server.server.handle_exit(number, None)


def test_a_drain_finishes_what_runs_and_refuses_what_is_new(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True), drain_timeout_s=60)
    running = server.connect(PATH, stream_body())
    server.engine.step(1)
    read_until(running, b'"text":"a"')
    tell(server, signal.SIGTERM)
    ready = server.get("/ready")
    while ready.status_code == 200:  # the signal reaches the loop in its own time
        ready = server.get("/ready")
    assert ready.json()["status"] == "draining" and int(ready.headers["retry-after"]) >= 1
    assert server.get("/health").status_code == 200
    refused = server.post(PATH, {"prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopping"
    assert int(refused.headers["retry-after"]) >= 1
    server.engine.step(19)
    rest = read_until(running, b"[DONE]")
    assert b'"finish_reason":"length"' in rest and b'"error"' not in rest
    running.close()
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    assert server.engine.status.phase is EnginePhase.STOPPED and server.engine.aborted == []


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_is_not_done_by_the_deadline_is_told(start_server: StartServer, is_stream: bool) -> None:
    server = start_server(FakeEngine(is_stepped=True), drain_timeout_s=0.05)
    running = server.connect(PATH, stream_body(stream=is_stream))
    server.engine.step(1)
    server.engine.wait_for_submitted(1)
    if is_stream:
        read_until(running, b'"text":"a"')
    tell(server, signal.SIGTERM)
    rest = read_until(running, b"server_stopping")
    assert is_stream or rest.startswith(b"HTTP/1.1 503")
    running.close()
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    server.engine.wait_until_idle()


def test_a_second_signal_ends_at_once(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True), drain_timeout_s=3600)
    with server.connect(PATH, stream_body()):
        server.engine.wait_for_submitted(1)
        tell(server, signal.SIGTERM)
        while server.get("/ready").status_code == 200:
            pass
        tell(server, signal.SIGTERM)
        server.thread.join(WAIT_S)
        assert not server.thread.is_alive()


def test_the_admin_route_drains_as_a_signal_does(start_server: StartServer) -> None:
    server = start_server()
    assert server.post("/admin/drain", {}).status_code == 202
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()


# ---- connections ----


def test_a_head_that_crawls_is_cut_off(start_server: StartServer) -> None:
    server = start_server(header_timeout_s=0.5)  # the last head below is to be well within it
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: ")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        assert connection.recv(1000) == b""  # it never said anything: closed without a word
    assert server.post(PATH, {"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("part", ["x" * 3000, "/" + "x" * 3000])
def test_a_head_that_is_too_large_is_refused(start_server: StartServer, part: str) -> None:
    server = start_server(max_header_bytes=2000)
    path, value = (part, "1") if part.startswith("/") else ("/health", part)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nx-large: {value}\r\n\r\n".encode())
        answer = read_until(connection, b"head_too_large")
    assert answer.startswith(b"HTTP/1.1 431")
    assert server.get("/health").status_code == 200


def test_more_connections_than_the_limit_are_told(start_server: StartServer) -> None:
    server = start_server(max_connections=2)
    with server.connect("/health", b""), server.connect("/health", b""), server.connect("/health", b"") as third:
        answer = read_until(third, b"too_many_connections")
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer


# ---- TLS ----


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For localhost, signed by itself."""
    directory = tmp_path_factory.mktemp("tls")
    paths = directory / "certificate.pem", directory / "key.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1],
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    return paths


def test_with_a_certificate_the_server_speaks_tls(
    start_server: StartServer, certificate: tuple[Path, Path]
) -> None:
    server = start_server(tls_certificate=certificate[0], tls_key=certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain, context.wrap_socket(
        plain, server_hostname="127.0.0.1"
    ) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def ask_over_tls(server: Running, context: ssl.SSLContext) -> bytes:
    """The first bytes that /health answers."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain, context.wrap_socket(
        plain, server_hostname="127.0.0.1"
    ) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        return connection.recv(1000)


def test_clients_that_never_begin_their_handshake_keep_nobody_out(
    start_server: StartServer, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_medha.server.run_server._MAX_HANDSHAKES", 4)
    server = start_server(tls_certificate=certificate[0], tls_key=certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    with ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        silent = [stack.enter_context(socket.create_connection(address, timeout=WAIT_S)) for _ in range(50)]
        silent[-1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")  # not TLS
        assert ask_over_tls(server, context).startswith(b"HTTP/1.1 200")
        assert silent[0].recv(1) == b""  # one more than there may be ended the oldest
    assert ask_over_tls(server, context).startswith(b"HTTP/1.1 200")


def test_a_handshake_that_crawls_is_cut_off(start_server: StartServer, certificate: tuple[Path, Path]) -> None:
    server = start_server(tls_certificate=certificate[0], tls_key=certificate[1], header_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        assert connection.recv(1) == b""


def test_tls_files_that_do_not_fit_are_named(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no key")
    with pytest.raises(ConfigError, match=r"server\.tls_key=.*broken"):
        check_tls(ServerConfig(tls_certificate=certificate[0], tls_key=broken))
    with pytest.raises(ConfigError, match=r"needs server\.tls_key"):
        ServerConfig(tls_certificate=certificate[0])
    with pytest.raises(ConfigError, match=r"server\.tls_key=.*no such file"):
        ServerConfig(tls_certificate=certificate[0], tls_key=tmp_path / "none.pem")
