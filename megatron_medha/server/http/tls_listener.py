"""Connections with TLS: accepted with a bound on handshakes, which count as connections only once they are done."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

_log = logging.getLogger(__name__)

_ACCEPT_AGAIN_S = 0.1  # after the system had no descriptor for us


class TlsListener:
    """An asyncio server, as far as uvicorn looks at one.

    asyncio's own gives every client that connects a minute for its handshake, however many do.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        *,
        max_handshakes: int,
        handshake_timeout_s: float,
    ) -> None:
        """max_handshakes: at a time; one more ends the oldest. On the event loop."""
        listener.setblocking(False)
        self._listener = listener
        self._context = context
        self._make_protocol = make_protocol
        self._max_handshakes = max_handshakes
        self._timeout_s = handshake_timeout_s
        self._handshakes: dict[asyncio.Task[None], None] = {}  # oldest first
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """Accept no more."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()

    async def wait_closed(self) -> None:
        """Until that is so."""
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                _log.warning("connection_not_accepted reason=%s", error)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._shake_hands(connection))
            self._handshakes[task] = None
            task.add_done_callback(self._forget)
            if len(self._handshakes) > self._max_handshakes:
                next(iter(self._handshakes)).cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_protocol, connection, ssl=self._context, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:  # not TLS, too slow, or gone; ssl.SSLError and TimeoutError are OSErrors
            _log.debug("tls_handshake_failed reason=%s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise
