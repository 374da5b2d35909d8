"""What web pages may do to a server: DNS rebinding, cross-site requests, CORS."""

from __future__ import annotations

import re
import socket

import pytest
from fake_engine import WAIT_S
from running_server import Running, StartServer

from megatron_medha.core.errors import ConfigError
from megatron_medha.server.server_config import ServerConfig

GUARDED = ("/debug/requests", "/debug/schedule", "/metrics", "/v1/models", "/openapi.json", "/docs", "/dashboard")
PAGE = "http://localhost:3000"
BROWSER = {"accept-language": "en", "sec-fetch-mode": "cors"}
PROMPT = {"prompt": "a", "max_tokens": 1}


def own(server: Running) -> str:
    """The origin of the server's own pages."""
    return f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "EVIL.example.", "localhost.evil.example", "127.0.0.1.evil.example",
        "127.0.0.1.nip.io:8000", "192.168.1.7:8000", "[2001:db8::1]:8000", "0.0.0.0:8000", "[::]:8000", "127.1",
        "a.localhost",
    ],
)  # fmt: skip
def test_without_a_key_nothing_is_shown_to_a_foreign_host(server: Running, host: str) -> None:
    for path in GUARDED:
        response = server.get(path, headers={"host": host})
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "host_not_allowed"
    assert server.post("/v1/completions", PROMPT, headers={"host": host}).status_code == 403
    assert server.post("/admin/drain", headers={"host": host}).status_code == 403
    assert server.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "localhost.:8000", "127.0.0.1", "127.0.0.1:8000",
        "127.9.9.9", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:8000", "",
    ],
)  # fmt: skip
def test_loopback_names_are_taken(server: Running, host: str) -> None:
    for headers in ({"host": host}, {"host": host, **BROWSER}):
        assert server.get("/v1/models", headers=headers).status_code == 200


def test_a_name_without_dots_is_taken_from_programs_and_not_from_browsers(server: Running) -> None:
    assert server.get("/v1/models", headers={"host": "medha:8000"}).status_code == 200
    for name in ("accept-language", "origin", "referer", "cookie", "sec-fetch-site"):
        assert server.get("/v1/models", headers={"host": "medha:8000", name: "x"}).status_code == 403, name


def raw_status(server: Running, request: str) -> int:
    """Of a request that no library sends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode())
        return int(connection.recv(100).split()[1])


def test_a_host_that_is_absent_is_no_browsers_and_an_absolute_target_names_it(server: Running) -> None:
    assert raw_status(server, "GET /v1/models HTTP/1.0\n\n") == 200
    assert raw_status(server, "GET /v1/models HTTP/1.0\nhost: evil.example\n\n") == 403
    assert raw_status(server, "GET http://evil.example/v1/models HTTP/1.1\nhost: localhost\n\n") == 403
    assert raw_status(server, "GET http://localhost/v1/models HTTP/1.1\nhost: evil.example\n\n") == 200
    assert raw_status(server, "GET /v1/models HTTP/1.1\nhost: localhost\nhost: evil.example\n\n") == 400


def test_probes_are_answered_whatever_the_host_is(server: Running) -> None:
    for path in ("/health", "/live", "/ready", "/ping"):
        assert server.get(path, headers={"host": "10.0.0.7:8000"}).status_code == 200


def test_allowed_hosts_are_taken_besides(start_server: StartServer) -> None:
    server = start_server(allowed_hosts=("medha.example", "2001:db8::1"))
    for host in ("medha.example", "Medha.Example.:443", "[2001:db8::1]:80", "localhost"):
        assert server.get("/v1/models", headers={"host": host, **BROWSER}).status_code == 200, host
    assert server.get("/v1/models", headers={"host": "other.medha.example"}).status_code == 403
    anywhere = start_server(allowed_hosts=("*",))
    assert anywhere.get("/v1/models", headers={"host": "evil.example"}).status_code == 200


def test_with_a_key_the_host_does_not_count(start_server: StartServer) -> None:
    server = start_server(api_key="k")
    headers = {"host": "medha.example", "authorization": "Bearer k", "origin": "http://evil.example"}
    assert server.get("/v1/models", headers=headers).status_code == 200
    assert server.post("/v1/completions", PROMPT, headers=headers).status_code == 200


def test_a_server_open_to_all_takes_its_address_and_any_other_but_no_foreign_name(start_server: StartServer) -> None:
    server = start_server(host="0.0.0.0", allow_unauthenticated=True)
    for host in ("0.0.0.0:8000", "127.0.0.1", "192.168.1.7:8000", "[2001:db8::1]"):
        assert server.get("/v1/models", headers={"host": host}).status_code == 200, host
    assert server.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/admin/drain", "/admin/reload", "/v1/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": PAGE},
        {"origin": PAGE, "sec-fetch-site": "same-site"},
        {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"origin": "http://evil.example", "sec-fetch-site": "none"},
        {"origin": "https://127.0.0.1"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": ""},
    ],
)
def test_without_a_key_no_page_of_another_origin_has_anything_done(
    server: Running, path: str, headers: dict[str, str]
) -> None:
    response = server.client.post(path, content=b"{}", headers={"content-type": "text/plain", **headers})
    assert response.status_code == 403 and response.json()["error"]["code"] == "origin_not_allowed"
    assert not server.service.lifecycle.is_draining


def test_pages_of_the_server_and_programs_may(server: Running) -> None:
    origin = own(server)
    for headers in (
        {}, {"origin": origin}, {"origin": origin, "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"},
        {"origin": "https://proxy.example", "sec-fetch-site": "same-origin"}, {"sec-fetch-mode": "cors"},
        {"host": "localhost", "origin": "http://localhost"}, {"host": "localhost", "origin": "https://localhost"},
        {"host": "[::1]:80", "origin": "http://[::1]"},
    ):  # fmt: skip
        assert server.post("/v1/completions", PROMPT, headers=headers).status_code == 200, headers


def preflight(server: Running, path: str, origin: str = PAGE, **headers: str) -> object:
    """What a browser asks before a request with a key."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return server.client.options(path, headers={"origin": origin, **asked, **headers})


def test_by_default_no_other_origin_may_use_the_server(server: Running) -> None:
    response = preflight(server, "/v1/chat/completions")
    assert response.status_code == 403 and "server.allowed_origins" in response.text
    read = server.get("/v1/models", headers={"origin": PAGE})
    assert read.status_code == 200 and not [name for name in read.headers if name.startswith("access-control")]
    assert server.client.options("/v1/models").status_code == 405  # no preflight


@pytest.mark.parametrize("api_key", [None, "k"])
@pytest.mark.parametrize("origin", [PAGE, "null", "vscode-webview://abc"])
def test_a_page_of_an_allowed_origin_can_do_and_read_everything(
    start_server: StartServer, api_key: str | None, origin: str
) -> None:
    server = start_server(allowed_origins=(PAGE, "null", "vscode-webview://abc"), api_key=api_key)
    asked = preflight(server, "/v1/completions", origin, **{"access-control-request-private-network": "true"})
    assert asked.status_code == 200  # before the key, which a preflight never has
    assert asked.headers["access-control-allow-origin"] == origin
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-private-network"] == "true"
    key = {"origin": origin, "sec-fetch-site": "cross-site", "authorization": f"Bearer {api_key}"}
    if api_key is None:
        del key["authorization"]
    for body, status in ((PROMPT, 200), ({**PROMPT, "stream": True}, 200), ({}, 400)):
        response = server.post("/v1/completions", body, headers=key)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert "Origin" in response.headers["vary"]
    if api_key is not None:
        refused = server.get("/v1/models", headers={"origin": origin, "authorization": "Bearer wrong"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin


def test_an_origin_that_is_not_listed_stays_out_beside_those_that_are(start_server: StartServer) -> None:
    server = start_server(allowed_origins=(PAGE,))
    for origin in ("http://localhost:3001", "https://localhost:3000", "http://localhost:3000.evil.example", "null"):
        assert preflight(server, "/v1/completions", origin).status_code == 403, origin
        assert server.post("/v1/completions", PROMPT, headers={"origin": origin}).status_code == 403
        response = server.get("/v1/models", headers={"origin": origin})
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["vary"] == "Origin"
    assert preflight(server, "/v1/models", PAGE, host="evil.example").status_code == 403


def test_a_star_lets_every_origin_in(start_server: StartServer) -> None:
    server = start_server(allowed_origins=("*",))
    for origin in ("http://anything.example", "null"):
        assert preflight(server, "/v1/completions", origin).headers["access-control-allow-origin"] == "*"
        response = server.post("/v1/completions", PROMPT, headers={"origin": origin, "sec-fetch-site": "cross-site"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")


def test_a_body_behind_a_preflight_or_a_refusal_is_never_a_request(server: Running) -> None:
    hidden = "GET /v1/models HTTP/1.1\nhost: localhost\n\n"
    length = len(hidden.replace("\n", "\r\n"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        head = f"POST /admin/drain HTTP/1.1\nhost: evil.example\ncontent-length: {length}\n\n"
        last = "GET /live HTTP/1.1\nhost: x\nconnection: close\n\n"
        connection.sendall((head + hidden + last).replace("\n", "\r\n").encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"403", b"200"]


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_hosts": ("http://a.example",)}, {"allowed_hosts": ("a.example:80",)},
        {"allowed_hosts": ("A.example",)}, {"allowed_hosts": ("",)},
        {"allowed_hosts": ("[::1]",)}, {"allowed_hosts": ("*.a.example",)},
        {"allowed_origins": ("a.example",)}, {"allowed_origins": ("http://a.example/",)},
        {"allowed_origins": ("http://a.example:80",)}, {"allowed_origins": ("https://a.example:443",)},
        {"allowed_origins": ("http://A.example",)}, {"allowed_origins": ("http://*.example/x",)},
        {"allowed_origins": ("",)},
    ],
)  # fmt: skip
def test_entries_that_could_never_match_are_refused(settings: dict[str, tuple[str, ...]]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"server\.{name}"):
        ServerConfig(**settings)
