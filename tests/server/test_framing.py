"""HTTP framing: where a request ends, and what of it counts. Raw bytes, as no client library would send them."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from itertools import pairwise

import pytest
import uvicorn
from fake_engine import WAIT_S
from running_server import Running, StartServer
from uvicorn.server import ServerState

from megatron_medha.server.http.connection import Connection, connection_class
from megatron_medha.server.server_config import ServerConfig

PATH = b"/v1/completions"
BODY = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST = b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def chunks(body: bytes, trailers: bytes = b"", extension: bytes = b"") -> bytes:
    """The body in two chunks."""
    parts = (body[:5], body[5:])
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


def exchange(server: Running, *packets: bytes) -> list[tuple[int, bytes]]:
    """Status and body of every answer on one connection; a packet is sent once the server has taken the one before."""
    answers: list[tuple[int, bytes]] = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            connection.sendall(packet)
            server.get("/live")  # the loop has been round: what came before lies behind it
        file = connection.makefile("rb")
        try:
            while line := file.readline():
                head: dict[bytes, bytes] = {}
                while (field := file.readline()) not in (b"\r\n", b""):
                    name, _, value = field.partition(b":")
                    head[name.lower()] = value.strip()
                body = file.read(int(head.get(b"content-length", b"0")))
                if not line.startswith(b"HTTP/1.1 100"):
                    answers.append((int(line.split()[1]), body))
        except ConnectionResetError:
            pass
    return answers


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET, b"connection: upgrade\r\nupgrade: TLS/1.2, HTTP/2.0\r\n"])
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("is_split", [True, False])
def test_an_offer_to_change_the_protocol_is_passed_over(
    server: Running, offer: bytes, is_chunked: bool, is_split: bool
) -> None:
    framing, body = (CHUNKED, chunks(BODY)) if is_chunked else (LENGTH, BODY)
    request = HEAD + offer + framing + b"\r\n" + body
    cut = request.index(b"\r\n\r\n") + 4
    packets = (request[:cut], request[cut : cut + 9], request[cut + 9 :]) if is_split else (request,)
    answers = exchange(server, *packets, LAST)
    assert [status for status, _ in answers] == [200, 200]
    assert json.loads(answers[0][1])["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET])
def test_a_body_behind_an_offer_is_never_a_request(server: Running, offer: bytes) -> None:
    head = HEAD + offer + b"content-length: %d\r\n\r\n" % len(MODELS)
    for packets in ((head + MODELS,), (head, MODELS)):
        answers = exchange(server, *packets, LAST)
        assert [status for status, _ in answers] == [400, 200], answers


def test_requests_behind_one_with_an_offer_are_answered_too(server: Running) -> None:
    offering = b"GET /live HTTP/1.1\r\nhost: localhost\r\n" + H2C + b"\r\n"
    answers = exchange(server, offering * 3 + HEAD + H2C + LENGTH + b"\r\n" + BODY + LAST)
    assert [status for status, _ in answers] == [200] * 5


SMUGGLED = {
    "both lengths": LENGTH + CHUNKED,
    "both lengths, the other way round": CHUNKED + LENGTH,
    "two lengths": LENGTH + b"content-length: 3\r\n",
    "the same length twice": LENGTH + LENGTH,
    "a list of lengths": b"content-length: 3, 3\r\n",
    "a signed length": b"content-length: +3\r\n",
    "a negative length": b"content-length: -3\r\n",
    "an empty length": b"content-length: \r\n",
    "a space before the colon": b"content-length : 3\r\n",
    "an unknown coding": b"transfer-encoding: xchunked\r\n",
    "chunked that is not last": b"transfer-encoding: chunked, identity\r\n",
    "a coding that nobody undoes": b"transfer-encoding: gzip, chunked\r\n",
    "two coding headers": b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n",
    "chunked twice": b"transfer-encoding: chunked, chunked\r\n",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\n",
    "a folded header": LENGTH + b"x-a: b\r\n c\r\n",
    "a bare line feed": LENGTH + b"x-a: b\nx-c: d\r\n",
    "a bare carriage return": LENGTH + b"x-a: b\rx-c: d\r\n",
    "a NUL in a value": LENGTH + b"x-a: b\0c\r\n",
    "a NUL in a name": LENGTH + b"x\0a: b\r\n",
    "a line without a colon": LENGTH + b"x-a\r\n",
    "a second Host": LENGTH + b"host: localhost\r\n",
}


@pytest.mark.parametrize("framing", SMUGGLED.values(), ids=SMUGGLED)
def test_a_request_whose_end_is_in_doubt_is_refused_and_nothing_behind_it_is_read(
    server: Running, framing: bytes
) -> None:
    body = chunks(BODY) if b"chunked" in framing else BODY
    answers = exchange(server, HEAD + framing + b"\r\n" + body + MODELS)
    assert [status for status, _ in answers] == [400]
    assert json.loads(answers[0][1])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /live HTTP/1.1\r\n\r\n", 400),  # a Host is needed since HTTP/1.1
        (b"GET /live HTTP/1.0\r\n\r\n", 200),
        (b"GET /live HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nhost: user@localhost\r\n\r\n", 400),
        (b"GET http://localhost/live HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET http://user@localhost/live HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET http://localhost HTTP/1.1\r\nhost: x\r\n\r\n", 307),
        (b"GET ftp://localhost/live HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"CONNECT localhost:80 HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /live HTTP/2.0\r\nhost: x\r\n\r\n", 400),
        (b"GET /live\r\n\r\n", 400),
        (HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + chunks(BODY), 400),
    ],
)
def test_heads_that_are_odd_are_answered_by_the_letter_of_the_standard(
    server: Running, head: bytes, status: int
) -> None:
    if status in (200, 404):
        head = head.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
    answers = exchange(server, head)
    assert [one for one, _ in answers] == [status]


def test_expectations_to_continue_are_met(server: Running) -> None:
    answers = exchange(server, HEAD + H2C + b"expect: 100-continue\r\n" + LENGTH + b"\r\n", BODY, LAST)
    assert [status for status, _ in answers] == [200, 200]


def test_trailers_are_no_headers(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    trailers = b"authorization: Bearer secret\r\nx-request-id: mine\r\nhost: a\r\n"
    head = HEAD + CHUNKED + b"\r\n"
    for packets in ((head + chunks(BODY, trailers),), (head, chunks(BODY, trailers))):
        answers = exchange(server, *packets, LAST)
        assert [status for status, _ in answers] == [401, 200]


def test_trailers_behind_a_valid_request_change_nothing(server: Running) -> None:
    trailers = b"x-slo-tpot-ms: nothing\r\npriority: u=9\r\n"
    answers = exchange(server, HEAD + CHUNKED + b"\r\n" + chunks(BODY, trailers), LAST)
    assert [status for status, _ in answers] == [200, 200]


@pytest.mark.parametrize("num_headers", [100, 1000])
def test_the_number_of_headers_is_limited(server: Running, num_headers: int) -> None:
    head = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + b"a: b\r\n" * num_headers + b"\r\n"
    (answer,) = exchange(server, head)
    assert answer[0] == (200 if num_headers == 100 else 431)


@pytest.mark.parametrize("where", ["header", "extension", "trailer", "blank lines"])
def test_what_is_neither_body_nor_complete_is_limited_too(start_server: StartServer, where: str) -> None:
    server = start_server(max_header_bytes=4096)
    head = HEAD + CHUNKED + b"\r\n"
    first = {
        "header": b"GET /live HTTP/1.1\r\nhost: x\r\nx-a: ",
        "extension": head + b"5;",
        "trailer": head + chunks(BODY)[:-2] + b"x-a: ",
        "blank lines": b"\r\n",
    }[where]
    filler = b"\r\n" * 500 if where == "blank lines" else b"a" * 1000
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        answer = b""
        connection.sendall(first)
        for _ in range(12):
            server.get("/live")
            try:
                connection.sendall(filler)
            except OSError:
                break
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    assert b"HTTP/1.1 200" not in answer or where == "trailer"
    assert server.get("/live").status_code == 200


def test_small_chunks_are_not_too_much_framing(start_server: StartServer) -> None:
    server = start_server(max_header_bytes=1024)
    body = BODY + b" " * 20_000
    packets = [b"".join(b"1\r\n%c\r\n" % byte for byte in body[at : at + 2000]) for at in range(0, len(body), 2000)]
    answers = exchange(server, HEAD + CHUNKED + b"\r\n", *packets, b"0\r\n\r\n", LAST)
    assert [status for status, _ in answers] == [200, 200]


def test_a_page_that_answers_before_the_body_does_not_wait_for_it_for_ever(start_server: StartServer) -> None:
    server = start_server(keepalive_timeout_s=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        connection.settimeout(0.05)
        answer = None
        while answer != b"":  # a byte now and then keeps nothing open
            try:
                connection.sendall(b"x")
                answer = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break


class Written:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.data = b""
        self.is_paused = False
        self._is_closing = False

    def get_extra_info(self, name: str) -> None:
        """Nothing is known of the other side."""

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.data += data

    def close(self) -> None:
        """No more is taken."""
        self._is_closing = True

    abort = close

    def is_closing(self) -> bool:
        """Whether it has been closed."""
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        """All is read at once."""
        return 0

    def pause_reading(self) -> None:
        """Nothing is given on any more."""
        self.is_paused = True

    def resume_reading(self) -> None:
        """It is again."""
        self.is_paused = False


async def echo(scope: dict, receive: object, send: object) -> None:
    """Answers a request with its path, the names of its headers and its body."""
    body, more = b"", True
    while more:
        message = await receive()  # type: ignore[operator]
        body, more = body + message.get("body", b""), message.get("more_body", False)
    names = b",".join(name for name, _ in scope["headers"])
    content = b"%s|%s|%s;" % (scope["path"].encode(), names, body)
    headers = [(b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": content})  # type: ignore[operator]


def connected() -> tuple[Connection, Written]:
    """A connection to a server that echoes."""
    config = uvicorn.Config(echo, log_config=None, lifespan="off")
    protocol = connection_class(ServerConfig(), 10)(config, ServerState(), {})
    transport = Written()
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol, transport  # type: ignore[return-value]


async def answers_to(pieces: list[bytes]) -> bytes:
    """All that a connection is answered, by a server that echoes."""
    protocol, transport = connected()
    for piece in pieces:
        if not transport.is_closing():
            protocol.data_received(piece)
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    return b"".join(part.partition(b"\r\n\r\n")[2] for part in transport.data.split(b"HTTP/1.1 200 OK")[1:])


def test_however_the_bytes_are_cut_the_requests_are_the_same() -> None:
    head = b"POST /a HTTP/1.1\r\nhost: x\r\n"
    raw = (
        head + H2C + b"content-length: 3\r\n\r\nGET"
        + head + WEBSOCKET + CHUNKED + b"\r\n" + chunks(b"GET /hidden", b"trailer: x\r\n", b";a=b")
        + b"GET /b?c HTTP/1.1\r\nhost: x\r\n" + H2C + b"\r\n"
        + b"\r\n" + head + CHUNKED + b"\r\n" + chunks(b"no offer")
        + b"GET http://y/d HTTP/1.1\r\nhost: x\r\n\r\n"
    )  # fmt: skip
    offered = b"host,connection,upgrade,http2-settings"
    expected = (
        b"/a|" + offered + b",content-length|GET;"
        b"/a|host,connection,upgrade,sec-websocket-key,transfer-encoding|GET /hidden;"
        b"/b|" + offered + b"|;"
        b"/a|host,transfer-encoding|no offer;"
        b"/d|host|;"
    )  # fmt: skip

    async def check() -> None:
        cuts = [(cut,) for cut in range(1, len(raw))]
        rng = random.Random(0)
        cuts += [tuple(sorted(rng.sample(range(1, len(raw)), 6))) for _ in range(200)]
        for places in cuts:
            pieces = [raw[start:end] for start, end in pairwise((0, *places, len(raw)))]
            assert await answers_to(pieces) == expected, places
        assert await answers_to([raw[place : place + 1] for place in range(len(raw))]) == expected

    asyncio.run(check())


def test_what_comes_in_one_packet_is_parsed_by_slices_and_answered_whole() -> None:
    live = b"GET /live HTTP/1.1\r\nhost:\r\n\r\n"
    body = b"x" * 20_000
    chunked = b"POST /c HTTP/1.1\r\nhost:\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked += b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    whole = b"POST /w HTTP/1.1\r\nhost:\r\ncontent-length: %d\r\n\r\n" % (10 * len(body)) + 10 * body

    async def check() -> None:
        connection, transport = connected()
        connection.data_received(2_000 * live + chunked + whole + live)
        assert len(connection.pipeline) < 1_000
        while transport.data.count(b"/live") < 2_001 and not transport.is_closing():
            await asyncio.sleep(0)
        assert transport.data.count(b"/c|host,transfer-encoding|" + body + b";") == 1
        assert transport.data.count(b"/w|host,content-length|" + 10 * body + b";") == 1
        assert not transport.is_paused
        connection.connection_lost(None)

    asyncio.run(check())
