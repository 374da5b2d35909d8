"""Whether the server takes requests, and its drain: take nothing new, let what runs finish, end the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.output_streams import OutputStreams
from megatron_medha.server.server_config import ServerConfig

log = logging.getLogger(__name__)

# For the error events of responses that a drain cuts off; after that their clients are not reading.
_CUT_OFF_GRACE_S = 1.0


class Lifecycle:
    """Counts the HTTP requests that a drain waits for."""

    def __init__(self, streams: OutputStreams, config: Callable[[], ServerConfig]) -> None:
        self.is_draining = False
        self.end_server: Callable[[], None] = lambda: None  # set by what runs the server
        self._streams = streams
        self._config = config
        self._num_active = 0
        self._is_idle: asyncio.Event | None = None

    def began(self) -> None:
        """An HTTP request that a drain waits for has come in."""
        self._num_active += 1

    def ended(self) -> None:
        """One of those is over."""
        self._num_active -= 1
        if not self._num_active and self._is_idle is not None:
            self._is_idle.set()

    @property
    def waits_for(self) -> str:
        """What a drain that begins now waits for, as the end of a sentence; empty if there is nothing."""
        if not self._num_active:
            return ""
        requests = "1 request" if self._num_active == 1 else f"{self._num_active} requests"
        return f": waiting up to {self._config().drain_timeout_s:g} s for {requests}; Ctrl-C again stops now"

    def check_open(self) -> None:
        """ApiError 503 once the server is shutting down."""
        if self.is_draining:
            raise self._stopping()

    async def drain(self) -> None:
        """Reject new requests; return when the running ones have ended, or were cut off after drain_timeout_s."""
        if self.is_draining:
            return
        self.is_draining = True
        self._is_idle = asyncio.Event()
        if not self._num_active:
            return
        log.info("drain_started", extra={"fields": {"num_active": self._num_active}})
        try:
            async with asyncio.timeout(self._config().drain_timeout_s):
                await self._is_idle.wait()
            return
        except TimeoutError:
            log.warning("drain_timed_out", extra={"fields": {"num_cut_off": self._num_active}})
            self._streams.end_all(self._stopping)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CUT_OFF_GRACE_S):
                await self._is_idle.wait()

    def _stopping(self) -> ApiError:
        return ApiError(
            503, "the server is shutting down", code="server_stopping", retry_after_s=self._config().retry_after_s,
            headers={"connection": "close"},
        )  # fmt: skip
