"""Plain ASGI around the app: request ids, API keys, sites, and the count a drain waits for. No body is touched."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_medha.server.api_keys import ApiClient
from megatron_medha.server.http.cross_site import answer_preflight, check_host, check_origin, cors_headers
from megatron_medha.server.http.http_errors import ApiError, internal_error
from megatron_medha.server.service import Service

# Probes carry no key, and learn nothing worth one. The page at /dashboard is the same for everybody; what it shows
# comes from /debug, with a key.
# Nor does a probe's Host count: it is the address of a pod or whatever a load balancer writes.
PROBE_PATHS = frozenset({"/health", "/live", "/ready", "/ping"})
OPEN_PATHS = PROBE_PATHS | {"/", "/dashboard"}
ADMIN_PREFIXES = ("/admin/", "/debug/")
MAX_REQUEST_ID_CHARS = 128


class AuthMiddleware:
    """Names every request, and turns away those without the key, and new work once the server is shutting down.

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
        of_site = cors_headers(headers, self._service.config)

        has_begun = False

        async def send_named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
                message["headers"].extend(of_site)
            await send(message)

        path = scope["path"]
        try:
            early = self._check_site(scope, headers)
            client = self._client(path, headers) if early is None and path not in OPEN_PATHS else None
            if client is not None and not path.startswith(ADMIN_PREFIXES) and path != "/metrics":
                self._service.lifecycle.check_open()
        except ApiError as error:
            early = error.as_response(path)
        if early is not None or client is None:
            await (early or self._app)(scope, receive, send_named)
            return
        state = scope.setdefault("state", {})
        state["client"], state["request_id"], state["client_key"] = client.name, request_id, client
        state["traceparent"] = headers.get("traceparent")
        self._service.lifecycle.began()
        try:
            await self._app(scope, receive, send_named)
        except Exception:
            # The framework's own response would lack the request id and the CORS headers.
            if not has_begun:
                await internal_error().as_response(path)(scope, receive, send_named)
            raise
        finally:
            self._service.lifecycle.ended()

    def _check_site(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a CORS preflight, which carries no key; None: go on. ApiError for pages that may not."""
        config = self._service.config
        if not config.needs_key and scope["path"] not in PROBE_PATHS:
            check_host(headers, config, (scope.get("server") or (None,))[0])
            check_origin(scope["method"], headers, config)
        return answer_preflight(scope["method"], headers, config)

    def _client(self, path: str, headers: Headers) -> ApiClient:
        keys = self._service.keys
        # Anthropic's clients send x-api-key, some beside another Authorization.
        x_api_key = headers.get("x-api-key")
        given = [headers.get("authorization"), None if x_api_key is None else f"Bearer {x_api_key}"]
        tried: list[str | None] = [one for one in given if one is not None] or [None]
        client = next((found for one in tried if (found := keys.find(one)) is not None), None)
        if client is None:
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if path.startswith(ADMIN_PREFIXES) and not client.is_admin:
            way_out = "this key is not it" if keys.has_admin_key else "start the server with server.admin_key"
            raise ApiError(403, f"{path} needs the admin key; {way_out}", code="admin_key_needed")
        return client


def _request_id(given: str | None) -> str:
    # A client's id goes back to it and into the log; anything odd is not worth carrying around.
    is_fit = given is not None and 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
    return given if is_fit and given is not None else uuid.uuid4().hex
