"""From the engine's thread to the event loop: each delivery finds the HTTP request that waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from megatron_medha.core.ports import Delivery
from megatron_medha.server.http.http_errors import ApiError

_MAX_PER_TURN = 64  # deliveries that one request takes before others run: some 2 ms


class ClientDisconnected(Exception):
    """The client has closed its connection."""


class EngineLost(Exception):
    """The engine ended without a word to this request."""


def reader_too_slow(num_unread: int) -> ApiError:
    """What ends a request whose client does not read."""
    return ApiError(503, f"the client left {num_unread} tokens unread; the request has ended", code="reader_too_slow")


class OutputStream:
    """What one HTTP request waits for: the deliveries of all its sub-requests, in order. Event loop only."""

    def __init__(self, request_ids: Iterable[str], max_unread: int, on_overflow: Callable[[], None]) -> None:
        self.request_ids = tuple(request_ids)
        self._max_unread = max_unread
        self._on_overflow = on_overflow
        self._items: deque[tuple[Delivery, float]] = deque()  # each with the time at which it reached the event loop
        self._end: Exception | None = None
        self._has_news = asyncio.Event()
        self._num_in_turn = 0  # taken since others could run

    def push(self, delivery: Delivery, at_s: float) -> None:
        """Add a delivery that reached the event loop then; one too many unread ends the stream."""
        if self._end is not None:
            return
        if len(self._items) >= self._max_unread:
            self.end(reader_too_slow(self._max_unread))
            self._on_overflow()
            return
        self._items.append((delivery, at_s))
        self._has_news.set()

    def end(self, why: Exception) -> None:
        """No delivery matters any more: next() raises this from now on. The first reason stays."""
        if self._end is None:
            self._end = why
            self._items.clear()
            self._has_news.set()

    async def next(self) -> tuple[Delivery, float]:
        """The next delivery, and when it reached the event loop; raises the reason given to end()."""
        while True:
            if self._end is not None:
                raise self._end
            if not self._items:
                self._has_news.clear()
                await self._has_news.wait()
            elif self._num_in_turn == _MAX_PER_TURN:
                await asyncio.sleep(0)
            else:
                self._num_in_turn += 1
                return self._items.popleft()
            self._num_in_turn = 0

    async def wait(self, timeout_s: float) -> bool:
        """Whether next() has something to say, after waiting that long at most."""
        if self._end is None and not self._items:
            self._has_news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_news.wait()
        return self._end is not None or bool(self._items)


class OutputStreams:
    """All streams that are open. Only deliver() may be called from other threads."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._by_request_id: dict[str, OutputStream] = {}

    def __len__(self) -> int:
        return len(self._by_request_id)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop serves the clients; before the engine starts."""
        self._loop = loop

    def open(self, request_ids: Sequence[str], max_unread: int, on_overflow: Callable[[], None]) -> OutputStream:
        """Wait for these sub-requests; before they are submitted.

        Beyond max_unread unread deliveries the stream ends, and on_overflow is called.
        """
        stream = OutputStream(request_ids, max_unread, on_overflow)
        for request_id in stream.request_ids:
            assert request_id not in self._by_request_id, f"request id {request_id} is in use"
            self._by_request_id[request_id] = stream
        return stream

    def forget(self, request_id: str) -> None:
        """This sub-request has ended; what may still come for it is dropped."""
        self._by_request_id.pop(request_id, None)

    def close(self, stream: OutputStream) -> None:
        """The HTTP request has ended; none of its sub-requests is waited for any more."""
        for request_id in stream.request_ids:
            self._by_request_id.pop(request_id, None)

    def end_all(self, why: Callable[[], Exception]) -> None:
        """End every open stream."""
        for stream in set(self._by_request_id.values()):
            stream.end(why())

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """The engine's sink: one wake-up of the loop for all deliveries of a step. From any thread."""
        assert self._loop is not None, "attach() comes before the engine starts"
        try:
            self._loop.call_soon_threadsafe(self._dispatch, deliveries)
        except RuntimeError:
            # The loop is closed: the server has ended and with it every client there could be.
            if not self._loop.is_closed():
                raise

    def _dispatch(self, deliveries: Sequence[Delivery]) -> None:
        at_s = self._now_s()
        for delivery in deliveries:
            stream = self._by_request_id.get(delivery.request_id)
            if stream is not None:  # None: ended here while the token was on its way
                stream.push(delivery, at_s)
