"""Places for connections: what is answered when all are taken, and how many descriptors leave room for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import Running, StartServer

PATH = "/v1/completions"
BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()


def silent(server: Running, num: int, stack: ExitStack) -> list[socket.socket]:
    """So many connections on which nothing is sent."""
    address = ("127.0.0.1", server.port)
    return [stack.enter_context(socket.create_connection(address, timeout=WAIT_S)) for _ in range(num)]


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended it."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def status_on_a_new_connection(server: Running, path: str, body: bytes | None = None) -> int:
    """Of one request."""
    method = "GET" if body is None else "POST"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body or b'')}\r\n\r\n"
        connection.sendall(head.encode() + (body or b""))
        return int(connection.recv(100).split()[1])


def test_probes_are_answered_however_many_connections_are_silent(start_server: StartServer) -> None:
    server = start_server(max_connections=4)
    with ExitStack() as stack:
        first, *_ = silent(server, 100, stack)
        for path in ("/health", "/live", "/ready", "/ping"):
            assert status_on_a_new_connection(server, path) == 200
        first.sendall(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200"), "who came in time keeps the place"


def test_a_request_takes_the_place_of_a_silent_connection(start_server: StartServer) -> None:
    server = start_server(max_connections=4)
    with ExitStack() as stack:
        connections = silent(server, 100, stack)
        assert status_on_a_new_connection(server, PATH, BODY) == 200
        assert is_closed(connections[0])


def test_busy_connections_keep_their_places_and_probes_are_answered_beside_them(start_server: StartServer) -> None:
    server = start_server(FakeEngine(is_stepped=True), max_connections=2)
    streams = [server.connect(PATH, BODY) for _ in range(2)]
    server.engine.wait_for_submitted(2)
    assert status_on_a_new_connection(server, "/health") == 200
    assert status_on_a_new_connection(server, PATH, BODY) == 503
    assert status_on_a_new_connection(server, "/v1/models") == 503
    server.engine.step(1)
    for stream in streams:
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
        stream.close()


def test_silent_connections_beyond_the_limit_are_closed(start_server: StartServer) -> None:
    server = start_server(max_connections=4)
    with ExitStack() as stack:
        connections = silent(server, 100, stack)
        server.wait_until(lambda: len(server.server.server_state.connections) <= 4 + 16)
        assert is_closed(connections[10])


def limits(soft: int, hard: int, max_connections: int) -> dict[str, int]:
    """What a process with these limits on descriptors sets itself."""
    program = f"""
import json, resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from megatron_medha.system.descriptors import connection_limits, raise_descriptor_limit
raise_descriptor_limit()
limits = connection_limits({max_connections})
print(json.dumps([resource.getrlimit(resource.RLIMIT_NOFILE)[0], limits.num_connections, limits.backlog]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return dict(zip(("soft", "connections", "backlog"), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("soft", "hard"), [(64, 64), (64, 256), (256, 1024), (1024, 4096)])
def test_descriptors_limit_connections_and_leave_a_reserve(soft: int, hard: int) -> None:
    found = limits(soft, hard, 16384)
    assert found["soft"] == hard
    assert 4 <= found["connections"] <= hard - 60
    assert hard <= 128 or found["connections"] > hard // 3
    assert found["connections"] + 16 + found["backlog"] + 28 <= hard


def test_with_descriptors_enough_the_configured_number_counts() -> None:
    found = limits(1024, 4096, 100)
    assert (found["connections"], found["backlog"]) == (100, min(2048, found["backlog"]))
