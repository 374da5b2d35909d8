"""Plain ASGI around the app: request ids on every answer, and the API key. No body is touched."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_medha.server.errors import ApiError
from megatron_medha.server.service import Service

# Probes and scrapers carry no key, and learn nothing worth one.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})
MAX_REQUEST_ID_CHARS = 128


class FrontDoor:
    """Names every request, and turns away those without the key.

    Not the framework's own middleware class: that one wraps every body part in a task and a
    memory stream, which costs more per token than all the rest of the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._service.is_key_right(headers.get("authorization")):
            error = ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )
            await error.as_response()(scope, receive, send_named)
            return
        await self._app(scope, receive, send_named)


def _request_id(given: str | None) -> str:
    # A client's id goes back to it and nowhere else; anything odd is not worth carrying around.
    is_fit = given is not None and 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
    return given if is_fit and given is not None else uuid.uuid4().hex
