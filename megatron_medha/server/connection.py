"""One TCP connection: uvicorn's protocol, with bounds it lacks on slow and large heads and on readers that stall."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from megatron_medha.server.config import ServerConfig
from megatron_medha.server.errors import ApiError

# In a scope's extensions: the transport, for an answer that must end it though its reader takes nothing.
TRANSPORT = "medha.transport"


def connection_class(config: ServerConfig) -> type[HttpToolsProtocol]:
    """The protocol class for these settings; uvicorn makes an instance per connection."""

    class Bounded(Connection):
        settings = config

    return Bounded


class Connection(HttpToolsProtocol):
    """Uvicorn's own, which waits for ever for a head, takes heads of any size, and for ever flushes to a dead reader.

    Source of what is overridden: uvicorn 0.54, protocols/http/httptools_impl.py.
    """

    settings: ServerConfig
    _head_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _is_refused = False
    _has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """The client has connected; now it owes us a head."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; none are looked at once it has been refused."""
        if not self._is_refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._has_begun = True
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}
        self._num_head_bytes = 0
        if self._head_timer is None:
            self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count_head(len(name) + len(value))
        if not self._is_refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._stop_head_timer()
        if self._is_refused:
            return
        if len(self.connections) > self.settings.max_connections:
            self._refuse(ApiError(503, "too many connections are open", code="too_many_connections",
                                  headers={"retry-after": str(self.settings.retry_after_s)}))
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is complete, as far as we are concerned; the reader may still have to take it."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_flush(self.transport.get_write_buffer_size())

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come for a while: close, but not in the middle of what is still being read."""
        num_unread = self.transport.get_write_buffer_size()
        if num_unread:
            self._watch_flush(num_unread)
        super().timeout_keep_alive_handler()

    def _watch_flush(self, num_unread: int) -> None:
        # close() waits until all is taken; a reader that takes nothing would keep that in memory for ever.
        def look() -> None:
            num_now = self.transport.get_write_buffer_size()
            if num_now >= num_unread:
                self.transport.abort()
            elif num_now:
                self._watch_flush(num_now)

        self.loop.call_later(self.settings.stalled_reader_timeout_s, look)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.head_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._has_begun:
            self.transport.close()  # not a byte of a request: there is nothing to answer
        elif self.cycle is None or self.cycle.response_complete:
            self._refuse(ApiError(408, f"no complete head within {self.settings.head_timeout_s:g} s"))
        else:
            self.transport.abort()  # a pipelined request that crawls behind one still being answered

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self.settings.max_head_bytes and not self._is_refused:
            self._refuse(ApiError(431, f"the head exceeds {self.settings.max_head_bytes} bytes", code="head_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._is_refused = True
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is under way: nothing can be said between its parts
            return
        body = error.as_json()
        fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **error.headers}.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode("latin-1") + b"\r\n" + body)
        self.transport.close()


