"""When work for a client ends early: it disconnected, its request timed out, or it stopped reading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from megatron_medha.server.http.body_reader import SMALL_BODY_BYTES
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.output_streams import OutputStream
from megatron_medha.server.server_config import ServerConfig

_CHECKS_PER_TIMEOUT = 4  # a stalled reader is found at most a quarter of the timeout late


T = TypeVar("T")


async def cancel_on_disconnect(receive: Receive, num_bytes: int, work: Coroutine[Any, Any, T]) -> T:
    """What `work` on so many bytes comes to; it is cancelled, and this is ApiError 400, once the client has gone.

    Clients with a timeout send a long document again and again; a million tokens of text keep a core busy for seconds.
    """
    if num_bytes <= SMALL_BODY_BYTES:
        return await work  # done before a disconnect could be noticed
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(400, "the client closed the connection", code="client_gone")  # no client reads it
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def until_gone(receive: Receive) -> None:
    """Wait for the client's disconnect. The body has been read, so what comes next can only be that."""
    while (await receive())["type"] != "http.disconnect":
        pass


class RequestTimeouts:
    """Two timers of a response, for its length and for its reader; none per token."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: OutputStream,
        transport: asyncio.Transport | None,
        unsent_part: Callable[[], int | None],
        config: ServerConfig,
    ) -> None:
        """transport: of the client's connection; None where the server has none of its own (an ASGI test client)."""
        self.outcome: str | None = None  # why it ran out
        self._loop = loop
        self._stream = stream
        self._transport = transport
        self._unsent_part = unsent_part
        self._last_part: int | None = None
        self._num_checks = 0  # that found the same part still being sent
        self._config = config
        self._deadline: asyncio.TimerHandle | None = None
        self._check_timer: asyncio.TimerHandle | None = None

    def start(self, age_s: float) -> None:
        """Begin to wait, for a request that arrived that long ago."""
        timeout_s = self._config.request_timeout_s
        if timeout_s is not None:
            self._deadline = self._loop.call_later(max(0.0, timeout_s - age_s), self._time_out)
        self._check_later()

    def end(self) -> None:
        """The response is complete."""
        for timer in (self._deadline, self._check_timer):
            if timer is not None:
                timer.cancel()

    def _time_out(self) -> None:
        self.outcome = self.outcome or "request_timeout"
        self._stream.end(
            ApiError(
                503,
                f"the request was not done within {self._config.request_timeout_s:g} s (server.request_timeout_s)",
                code="request_timeout",
                retry_after_s=self._config.retry_after_s,
            )
        )

    def _check_later(self) -> None:
        self._check_timer = self._loop.call_later(
            self._config.stalled_client_timeout_s / _CHECKS_PER_TIMEOUT, self._check_reader
        )

    def _check_reader(self) -> None:
        part = self._unsent_part()
        self._num_checks = self._num_checks + 1 if part is not None and part == self._last_part else 0
        self._last_part = part
        if self._transport is None or self._num_checks < _CHECKS_PER_TIMEOUT:
            self._check_later()
            return
        # Nothing can be said to someone who does not listen: the connection ends, and the send that waits with it.
        self.outcome = self.outcome or "reader_stalled"
        self._transport.abort()
