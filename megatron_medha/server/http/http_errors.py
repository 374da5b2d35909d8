"""Errors in OpenAI's shape, or Anthropic's: client errors and internal errors as HTTP responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.core.request import Rejection

log = logging.getLogger(__name__)

ANTHROPIC_PREFIX = "/v1/messages"  # routes whose errors have Anthropic's shape
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error"}
MAX_MESSAGE_CHARS = 2_000
MAX_PARAM_CHARS = 200


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    error: ErrorBody


class AnthropicError(msgspec.Struct, frozen=True):
    """Anthropic's error object; param and code inside are ours, and its clients pass over them."""

    error: ErrorBody
    type: str = "error"


class ApiError(Exception):
    """Ends a request with this HTTP status and an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """retry_after_s: when to come back; clients get whole seconds, at least one."""
        # Some messages quote what a client sent, which may be megabytes.
        message = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else param[:MAX_PARAM_CHARS]
        self.code = code
        self.headers = headers or {}
        if retry_after_s is not None:
            self.headers = {**self.headers, "retry-after": str(max(1, math.ceil(retry_after_s)))}

    def as_json(self, path: str = "") -> bytes:
        """The response's body, in Anthropic's shape for its routes."""
        if path.startswith(ANTHROPIC_PREFIX):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else error_type(self.status))
            return msgspec.json.encode(AnthropicError(ErrorBody(self.message, kind, self.param, self.code)))
        return msgspec.json.encode(
            ErrorResponse(ErrorBody(self.message, error_type(self.status), self.param, self.code))
        )

    def as_response(self, path: str = "") -> Response:
        """The whole response."""
        return Response(self.as_json(path), self.status, self.headers, media_type="application/json")

    def rename_field(self, paths: Mapping[str, str]) -> None:
        """Name the field as the client does. paths: its own by ours; the longest that begins the field's counts."""
        given = self.param or ""
        known = [path for path in paths if given == path or given.startswith((f"{path}.", f"{path}["))]
        if known:
            longest = max(known, key=len)
            self.param = paths[longest] + given[len(longest) :]
            self.message = self.message.replace(given, self.param)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the client's request is wrong."""
    return ApiError(400, message, param=param, code=code)


def rejected(rejection: Rejection) -> ApiError:
    """A 429, or a 400 where coming back later would not help."""
    error = ApiError(
        400 if rejection.retry_after_s is None else 429,
        rejection.message,
        code=rejection.reason.removeprefix("max_"),
        retry_after_s=rejection.retry_after_s,
    )
    if rejection.predicted_ttft_s is not None:
        error.headers["x-predicted-ttft-ms"] = f"{rejection.predicted_ttft_s * 1e3:.0f}"
    return error


def internal_error() -> ApiError:
    """A 500; the client gets no details."""
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def error_type(status: int) -> str:
    """OpenAI's word for the kind of error a status is."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def install(app: Starlette) -> None:
    """Give every error of a route or of the framework OpenAI's shape."""
    for kind in (ApiError, HTTPException, RecursionError, Exception):
        app.add_exception_handler(kind, _respond)


async def _respond(request: Request, error: Exception) -> Response:
    path = request.url.path
    match error:
        case ApiError():
            return error.as_response(path)
        case HTTPException(status_code=status):  # the framework's own: unknown path (404), wrong method (405)
            phrase = HTTPStatus(status).phrase
            message, code = f"{phrase}: {request.method} {path}", phrase.lower().replace(" ", "_")
            return ApiError(status, message, code=code, headers=dict(error.headers or {})).as_response(path)
        case RecursionError():
            # Only what clients send is deep: a schema that could just be decoded is walked with less stack left.
            log.info("body_too_deep", extra={"fields": {"path": path}})
            return bad_request("the body is nested too deeply", code="invalid_json").as_response(path)
        case _:  # the framework re-raises it after this response, and the server logs the traceback
            return internal_error().as_response(path)
