"""What `medha selftest` says to a server: bytes over sockets, with nothing between that could put them right."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_RESPONSE_BYTES = 64 * 2**20


class ServerMisbehaved(Exception):
    """The server did what it must not; the message says what."""


@dataclass(frozen=True, slots=True)
class RawResponse:
    """An HTTP answer, as far as the test looks at it."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class OpenResponse:
    """An answer that has begun."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    timeout_s: float
    first: bytes = b""

    async def read(self, num_bytes: int) -> bytes:
        """So many bytes at most, -1: all until the end; Broken if it hangs."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.reader.read(num_bytes)
        except TimeoutError:
            raise ServerMisbehaved(f"nothing more within {self.timeout_s:g} s") from None
        except OSError:
            return b""

    async def rest(self) -> bytes:
        """All of the answer."""
        return self.first + await self.read(-1)

    def close(self) -> None:
        """Enough of it."""
        self.writer.transport.abort()


@dataclass(frozen=True, slots=True)
class RawClient:
    """The server's address, and how long it may keep silent."""

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

    async def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> RawResponse | None:
        """Send a request and read the answer."""
        return await self.send(self.request(method, path, body, headers))

    async def send(self, raw: bytes, *, is_half_closed: bool = False) -> RawResponse | None:
        """Send bytes and read what comes until the end; None if the server just closes. Broken if it hangs."""
        reader, writer = await self.connect()
        try:
            async with asyncio.timeout(self.timeout_s):
                try:
                    writer.write(raw)
                    await writer.drain()
                    if is_half_closed and writer.can_write_eof():
                        writer.write_eof()
                    answer = await reader.read(-1)
                except (ConnectionError, OSError):
                    return None
        except TimeoutError:
            raise ServerMisbehaved(f"no end of the answer within {self.timeout_s:g} s") from None
        finally:
            writer.close()
        return parse(answer) if answer else None

    async def begin(self, raw: bytes) -> OpenResponse:
        """Send a request and wait for the first bytes of its answer; Broken if none come."""
        reader, writer = await self.connect()
        begun = OpenResponse(reader, writer, self.timeout_s)
        writer.write(raw)
        begun.first = await begun.read(1)
        return begun

    async def leave(self, raw: bytes, after_bytes: int) -> None:
        """Send bytes, read so many of the answer, and go away."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            await writer.drain()
            if after_bytes:
                async with asyncio.timeout(self.timeout_s):
                    await reader.read(after_bytes)
        except TimeoutError:
            raise ServerMisbehaved(f"nothing came within {self.timeout_s:g} s") from None
        except (ConnectionError, OSError):
            pass
        finally:
            writer.transport.abort()


def parse(answer: bytes) -> RawResponse:
    """Status, headers and body of the last answer in these bytes; Broken if they are no HTTP."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, gap, body = body.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split()
    if not gap or len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise ServerMisbehaved(f"not an HTTP answer: {answer[:80]!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = _joined(body)
    return RawResponse(int(words[1]), headers, body)


def check(answer: RawResponse | None) -> None:
    """Broken unless this is how a server may answer nonsense: no 5xx but 503, and errors in OpenAI's shape."""
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


def _joined(body: bytes) -> bytes:
    parts: list[bytes] = []
    while body:
        size, gap, rest = body.partition(b"\r\n")
        try:
            num_bytes = int(size, 16)
        except ValueError:
            raise ServerMisbehaved(f"a chunk without its size: {size[:40]!r}") from None
        if not gap or not num_bytes:
            break
        parts.append(rest[:num_bytes])
        body = rest[num_bytes + 2 :]
    return b"".join(parts)
