"""How `medha selftest` sends requests: as bytes over sockets, so that no client library corrects them."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import re
import ssl
from collections import defaultdict
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_RESPONSE_BYTES = 64 * 2**20
_SAMPLE = re.compile(rb"^(?:medha:)?(\w+)(?:\{[^}]*\})? ([\d.e+-]+)$", re.MULTILINE)


class ServerMisbehaved(Exception):
    """The server did what it must not; the message says what."""


@dataclass(frozen=True, slots=True)
class RawResponse:
    """An HTTP response, as far as the test looks at it."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class RawClient:
    """The server's address, the key, and how long a response may take."""

    url: str
    api_key: str | None
    timeout_s: float

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        parts = urlsplit(self.url)
        is_tls = parts.scheme == "https"
        # Whether the certificate is good is not what is tested here.
        context = ssl._create_unverified_context() if is_tls else None
        port = parts.port or (443 if is_tls else 80)
        return await asyncio.open_connection(parts.hostname, port, ssl=context, limit=MAX_RESPONSE_BYTES)

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """The bytes of a request; headers: instead of the usual ones where the names agree."""
        usual = {"host": urlsplit(self.url).netloc, "connection": "close", "content-length": str(len(body))}
        if self.api_key is not None:
            usual["authorization"] = f"Bearer {self.api_key}"
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**usual, **(headers or {})}.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body

    async def ask(self, method: str, path: str, body: bytes = b"") -> RawResponse | None:
        """Send a request and read the response."""
        return await self.send(self.request(method, path, body))

    async def send(
        self, raw: bytes, *, is_half_closed: bool = False, leaves_after: int | None = None
    ) -> RawResponse | None:
        """Send bytes and read what comes until the end; None if the server just closes. Broken if it hangs.

        leaves_after: read so many bytes of the response only, and disconnect.
        """
        reader, writer = await self.connect()
        try:
            async with asyncio.timeout(self.timeout_s):
                writer.write(raw)
                await writer.drain()
                if is_half_closed and writer.can_write_eof():
                    writer.write_eof()
                answer = b"" if leaves_after == 0 else await reader.read(-1 if leaves_after is None else leaves_after)
        except TimeoutError:
            raise ServerMisbehaved(f"no end of the response within {self.timeout_s:g} s") from None
        except OSError:
            return None
        finally:
            writer.close() if leaves_after is None else writer.transport.abort()
        return parse(answer) if answer and leaves_after is None else None

    async def metrics(self) -> dict[bytes, float]:
        """What /metrics shows, summed over replicas, without the prefix medha:; empty if it cannot be read."""
        values: dict[bytes, float] = defaultdict(float)
        answer = await self.ask("GET", "/metrics")
        if answer is not None and answer.status == 200:
            for name, value in _SAMPLE.findall(answer.body):
                values[name] += float(value)
        return values


class _Received(io.BytesIO):
    """Bytes as http.client reads them from a socket."""

    def makefile(self, mode: str) -> io.BytesIO:
        """The bytes."""
        return self


def parse(answer: bytes) -> RawResponse:
    """Status, headers and body of a response; ServerMisbehaved if these bytes are no HTTP."""
    response = http.client.HTTPResponse(_Received(answer))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except http.client.IncompleteRead as error:
        if response.chunked:
            raise ServerMisbehaved(f"a chunk without its size or its end: {answer[-80:]!r}") from None
        body = error.partial  # as after a HEAD
    except (http.client.HTTPException, ValueError) as error:
        raise ServerMisbehaved(f"not an HTTP response ({error!r}): {answer[:80]!r}") from None
    headers = {name.lower(): value for name, value in response.getheaders()}
    return RawResponse(response.status, headers, body)


def check(answer: RawResponse | None) -> None:
    """Broken unless a server may answer a bad request so: no 5xx but 503, and errors in OpenAI's shape."""
    if answer is None:
        return
    if answer.status >= 500 and answer.status != 503:
        raise ServerMisbehaved(f"status {answer.status}: {answer.body[:200]!r}")
    if answer.status in (429, 503) and "retry-after" not in answer.headers:
        raise ServerMisbehaved(f"status {answer.status} without Retry-After")
    if answer.status < 400 or not answer.headers.get("content-type", "").startswith("application/json"):
        return
    try:
        error = json.loads(answer.body)["error"]
        # OpenAI's shape, or on its own routes Anthropic's.
        is_shaped = set(error) in ({"message", "type", "param", "code"}, {"message", "type"})
        is_shaped = is_shaped and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        is_shaped = answer.body == b""  # of a HEAD
    if not is_shaped:
        raise ServerMisbehaved(f"status {answer.status} not in OpenAI's shape: {answer.body[:200]!r}")
