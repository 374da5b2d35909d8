"""One TCP connection: uvicorn's protocol, stricter on heads and framing, with limits for slow clients."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from megatron_medha.server.http.http_errors import ApiError, bad_request
from megatron_medha.server.http.request_target import read_target
from megatron_medha.server.server_config import ServerConfig

# In a scope's extensions: the transport, to abort a response that its client does not read.
TRANSPORT = "medha.transport"
PROBE_PATHS = frozenset({b"/health", b"/live", b"/ready", b"/ping"})
_PROBE_METHODS = (b"GET", b"HEAD")
_FRAMING_FIELDS = (b"content-length", b"transfer-encoding")
_MAX_HEADERS = 128       # browsers send 20, proxies add 10; every route reads them all
_MAX_EXTRA = 16          # connections beyond the limit, of which a probe may be one
_SLICE_BYTES = 16 * 2**10  # parsed at once: 600 requests or 2,700 chunks, some 10 ms
_CHUNK_HEADER_BYTES = 16  # of a chunk's size and line ends; more than that counts as part of the head


def connection_class(config: ServerConfig, num_connections: int) -> type[HttpToolsProtocol]:
    """The protocol class for these settings; uvicorn makes an instance per connection."""

    class Bounded(Connection):
        settings = config
        num_places = num_connections
        silent: dict[Connection, None] = {}
        extra: dict[Connection, None] = {}

    return Bounded


class _Flow(FlowControl):
    """Uvicorn's own, but nothing is read while bytes that have come wait to be parsed."""

    has_unparsed = False

    def resume_reading(self) -> None:
        if not self.has_unparsed:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """Uvicorn's own waits for ever for a head, takes heads of any size, and loses the body behind an Upgrade offer.

    Beyond `num_places` connections probes are still served; any other request takes the place of a connection that
    has sent nothing yet, or gets a 503.

    Source of what is overridden: uvicorn 0.54, protocols/http/httptools_impl.py.
    """

    settings: ServerConfig
    num_places: int
    silent: dict[Connection, None]  # those that have sent nothing, oldest first; shared by all connections
    extra: dict[Connection, None]   # those beyond the limit, oldest first
    _head_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _num_framing_bytes = 0  # received for this message, but neither body nor a chunk's own size
    _num_messages = 0
    _num_body_due = 0       # of the message's content-length, still to come
    _next_slice: asyncio.Handle | None = None
    _is_refused = False
    _is_in_head = False
    _is_passing_over = False  # of an Upgrade offer: the parser is being given the message's framing once more

    # ---- connections ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """The client has connected; its first head is due within header_timeout_s."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        self._unparsed = bytearray()
        self._start_head_timer()
        if len(self.connections) - len(self.extra) <= self.num_places:
            self.silent[self] = None
            return
        self.extra[self] = None
        if len(self.extra) > _MAX_EXTRA:
            next(iter(self.extra))._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_head_timer()
        self._forget()
        self._unparsed.clear()
        super().connection_lost(exc)

    def _forget(self) -> None:
        self.silent.pop(self, None)
        self.extra.pop(self, None)

    def _abort(self) -> None:
        self._is_refused = True
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _take_place(self, method: bytes) -> bool:
        """Whether this connection beyond the limit may have its request handled."""
        if method in _PROBE_METHODS and self.url.partition(b"?")[0] in PROBE_PATHS:
            return True
        if not self.silent:
            return False
        next(iter(self.silent))._abort()
        del self.extra[self]
        return True

    # ---- bytes ----

    def data_received(self, data: bytes) -> None:
        """Bytes from the client, parsed in slices; other tasks run between them."""
        self._unparsed += data
        if len(self._unparsed) == len(data):  # else the next slice is planned, or waits for responses
            self._parse_slice()

    def _parse_slice(self) -> None:
        self._next_slice = None
        size = max(_SLICE_BYTES, self._num_body_due)
        part = bytes(self._unparsed[:size])
        del self._unparsed[:size]
        self._parse(part)
        if self._is_refused or self.transport.is_closing():
            self._unparsed.clear()
        self.flow.has_unparsed = bool(self._unparsed)
        if self._unparsed:
            self.flow.pause_reading()
            self._plan_slice()
        elif not self.pipeline and (self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()  # else what is pipelined or not taken yet has paused it

    def _plan_slice(self) -> None:
        # Pipelined requests are handled first: each holds a scope and headers in memory.
        if self._unparsed and not self.pipeline and self._next_slice is None:
            self._next_slice = self.loop.call_soon(self._parse_slice)

    def _parse(self, data: bytes) -> None:
        # After a refusal nothing more is parsed.
        message = self._num_messages
        rest = memoryview(data)
        while not self._is_refused:
            try:
                self.parser.feed_data(rest)
                break
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                self._pass_over_offer()
            except httptools.HttpParserCallbackError as error:
                raise error.__context__ or error from None  # a mistake of ours: asyncio logs it and closes
            except httptools.HttpParserError as error:
                self._refuse(bad_request(f"not a valid HTTP/1.1 request: {error}", code="invalid_http"))
        if message == self._num_messages:
            self._count(framing=len(data))

    def _pass_over_offer(self) -> None:
        # RFC 9110, 7.8: a server may ignore Upgrade. The parser takes what follows the head for another protocol and
        # begins a new message; with the framing fields once more it reads on where it was.
        framing = [name + b": " + value + b"\r\n" for name, value in self.headers if name in _FRAMING_FIELDS]
        self._is_passing_over = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")

    # ---- what the parser finds ----

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._is_passing_over or self._is_refused:
            return
        # Not with every byte: blank lines, or a body that no route reads, do not keep a connection open.
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self.silent.pop(self, None)
        self._is_in_head = True
        self._num_messages += 1
        self._num_body_due = 0
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}
        self._num_head_bytes = self._num_framing_bytes = 0
        if self._head_timer is None:
            self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        if not (self._is_passing_over or self._is_refused):
            super().on_url(url)
            self._count(head=len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer behind the body: those are passed over, since they may not change the request."""
        if self._is_passing_over or self._is_refused:
            return
        self._count(head=len(name) + len(value))
        if self._is_refused or not self._is_in_head:
            return
        super().on_header(name, value)
        if len(self.headers) > _MAX_HEADERS:
            self._refuse(ApiError(431, f"more than {_MAX_HEADERS} headers", code="head_too_large"))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self._is_passing_over:
            self._is_passing_over = False
            return
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self._is_in_head = False
        if self._is_refused:
            return
        method = self.parser.get_method()
        try:
            self.url = read_target(method, self.url, self.parser.get_http_version(), self.headers)
            if self in self.extra and not self._take_place(method):
                raise ApiError(503, "too many connections are open", code="too_many_connections",
                               retry_after_s=self.settings.retry_after_s)
        except ApiError as error:
            self._refuse(error)
            return
        super().on_headers_complete()
        self._num_body_due = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        if self in self.extra:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """A chunk's size."""
        self._num_framing_bytes -= _CHUNK_HEADER_BYTES

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._num_framing_bytes -= len(body)
        self._num_body_due -= min(len(body), self._num_body_due)
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; behind an Upgrade offer the parser says so before the body."""
        if self.parser.should_upgrade():
            return
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The response is complete; the client may still have to read it."""
        super().on_response_complete()
        self._plan_slice()
        if self.transport.is_closing():
            self._watch_flush()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not while its client is still reading a response."""
        self._watch_flush()
        super().timeout_keep_alive_handler()

    def _watch_flush(self, num_before: float = float("inf")) -> None:
        # close() waits until the client has read everything; one that reads nothing would keep it in memory for ever.
        num_unread = self.transport.get_write_buffer_size()
        if num_unread >= num_before:
            self.transport.abort()
        elif num_unread:
            self.loop.call_later(self.settings.stalled_client_timeout_s, self._watch_flush, num_unread)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.header_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._unparsed:
            self._start_head_timer()  # it may be here already, behind requests that still run
        elif not self._is_in_head:
            self.transport.close()  # no byte of a request has come: no response is due
        elif self.cycle is None or self.cycle.response_complete:
            self._refuse(ApiError(408, f"no complete head within {self.settings.header_timeout_s:g} s"))
        else:
            self.transport.abort()  # a slow pipelined request behind one that still runs

    def _count(self, *, head: int = 0, framing: int = 0) -> None:
        # The parser shows a header when it is complete, chunk extensions never: what it swallows is counted too.
        self._num_head_bytes += head
        self._num_framing_bytes += framing
        most = self.settings.max_header_bytes
        if max(self._num_head_bytes, self._num_framing_bytes) > most and not self._is_refused:
            self._refuse(ApiError(431, f"the head exceeds {most} bytes", code="head_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Respond without the application, and close."""
        self._is_refused = True
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started or not self.cycle.more_body or self.pipeline:
                self.transport.abort()  # a response has begun, or is due before this one
                return
            self.cycle.disconnected = True  # the application stops waiting for the rest of the body
            self.cycle.message_event.set()
        body = error.as_json()
        fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **error.headers}.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode("latin-1") + b"\r\n" + body)
        self.transport.close()


