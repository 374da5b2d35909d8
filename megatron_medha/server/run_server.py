"""Running the application on uvicorn: the listening socket, TLS, signals, and the drain before the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from megatron_medha.core.errors import ConfigError
from megatron_medha.server.http.connection import Connection, connection_class
from megatron_medha.server.http.routing import Api
from megatron_medha.server.http.tls_listener import TlsListener
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.system.checked_files import check_private
from megatron_medha.system.descriptors import connection_limits, raise_descriptor_limit

log = logging.getLogger(__name__)

# Idle connections close at once; after the drain only the last bytes of responses are left.
_FLUSH_S = 1
_MAX_HANDSHAKES = 256  # TLS handshakes at a time; one takes some milliseconds


class Server(uvicorn.Server):
    """Says when it listens; at the first signal drains, at the second ends at once; SIGHUP reloads."""

    def __init__(self, config: uvicorn.Config, service: Service, on_listening: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self._loop = asyncio.get_running_loop()
        context = self.config.ssl
        await super().startup(sockets=[] if context is not None else sockets)
        if not self.started:
            return
        if context is not None:
            self.servers += [self._tls_listener(listener, context) for listener in sockets or ()]  # type: ignore[misc]
        self._service.lifecycle.end_server = self.end
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            self._loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload()))
        if self._on_listening is not None:
            self._on_listening()

    def _tls_listener(self, listener: socket.socket, context: ssl.SSLContext) -> TlsListener:
        protocol = cast("type[Connection]", self.config.http_protocol_class)
        return TlsListener(
            listener,
            context,
            partial(protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state),
            max_handshakes=min(_MAX_HANDSHAKES, self.config.backlog),
            handshake_timeout_s=protocol.settings.header_timeout_s,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end, in the middle of whatever the main thread does."""
        # The loop may not have got round to ending yet when the second one comes.
        is_second = self._is_ending or bool(self._captured_signals)
        self._captured_signals.append(sig)
        if is_second:
            # Each response that is cut off now would log a traceback.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        if is_second or self._loop is None:
            self.force_exit = self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Drain, then stop; on the event loop."""
        if not self._is_ending:
            self._is_ending = True
            self._spawn(self._drain())

    async def _drain(self) -> None:
        await self._service.lifecycle.drain()
        self.should_exit = True

    async def _reload(self) -> None:
        try:
            await self._service.reload()
        except ConfigError as error:
            log.error("reload_rejected", extra={"fields": {"reason": str(error)}})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run(app: Api, config: ServerConfig, on_listening: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; on_listening gets the base URL. ConfigError if the port is taken."""
    check_tls(config)
    check_private_files(config)
    raise_descriptor_limit()
    with bind(config) as listener:
        host, port = listener.getsockname()[:2]
        scheme = "https" if config.tls_certificate is not None else "http"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        say = None if on_listening is None else lambda: on_listening(url)
        try:
            Server(uvicorn_config(app, config), app.state.service, say).run(sockets=[listener])
        except KeyboardInterrupt:
            pass  # uvicorn raises the signal again after it has shut down; by then all is done
        except SystemExit:
            if app.state.startup_error is None:
                raise
    if app.state.startup_error is not None:
        raise app.state.startup_error


def bind(config: ServerConfig) -> socket.socket:
    """A socket on the configured address, before anything slow is started; ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        # Another listener with SO_REUSEADDR shows only here.
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        listener.close()
        raise ConfigError(
            f"server.host={config.host} server.port={config.port} cannot be listened on ({error}); "
            f"choose another server.port, or end what uses it"
        ) from error
    return listener


def check_tls(config: ServerConfig) -> None:
    """ConfigError if the certificate and its key cannot be used together."""
    if config.tls_certificate is None or config.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_certificate, config.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"server.tls_certificate={config.tls_certificate} server.tls_key={config.tls_key}: {error}"
        ) from None


def check_private_files(config: ServerConfig) -> None:
    """ConfigError if others could read or change the files that hold keys."""
    for name in ("api_key_file", "tls_key"):
        if (path := getattr(config, name)) is not None:
            check_private(path, f"server.{name}")


def uvicorn_config(app: Api, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the app; uvloop is used where it is installed."""
    limits = connection_limits(config.max_connections)
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=connection_class(config, limits.num_connections),
        backlog=limits.backlog,
        lifespan="on",
        log_level="error",  # a client's malformed bytes are no news; our own errors are
        log_config=None,    # its lines go where ours go
        access_log=False,
        server_header=False,
        ws="none",
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
        timeout_keep_alive=config.keepalive_timeout_s,
        timeout_graceful_shutdown=_FLUSH_S,
    )
