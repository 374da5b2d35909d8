"""Errors in OpenAI's shape: what a client did wrong, or what went wrong here, as HTTP answers."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

log = logging.getLogger(__name__)


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with this HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def as_json(self) -> bytes:
        """The body of the answer."""
        body = ErrorBody(self.message, error_type(self.status), self.param, self.code)
        return msgspec.json.encode(ErrorAnswer(body))

    def as_response(self) -> Response:
        """The whole answer."""
        return Response(self.as_json(), self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the client's request is wrong."""
    return ApiError(400, message, param=param, code=code)


def our_bug() -> ApiError:
    """A 500: all a client needs to know of a mistake of ours."""
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def error_type(status: int) -> str:
    """OpenAI's word for the kind of error a status is."""
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"


def install(app: Starlette) -> None:
    """Make every error that leaves a route, or that no route caused, take OpenAI's shape."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RecursionError, _answer_too_deep)
    app.add_exception_handler(Exception, _answer_our_bug)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.as_response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    # The framework's own: unknown path (404), wrong method (405).
    assert isinstance(error, HTTPException)
    status = error.status_code
    phrase = HTTPStatus(status).phrase
    answer = ApiError(
        status,
        f"{phrase}: {request.method} {request.url.path}",
        code=phrase.lower().replace(" ", "_"),
        headers=dict(error.headers or {}),
    )
    return answer.as_response()


async def _answer_too_deep(request: Request, error: Exception) -> Response:
    # Nothing here is deep but what clients send: a schema that could just be decoded is gone through once more with
    # less of the stack left.
    log.warning("body_too_deep", extra={"fields": {"path": request.url.path}})
    return bad_request("the body is nested too deeply", code="invalid_json").as_response()


async def _answer_our_bug(request: Request, error: Exception) -> Response:
    # The framework re-raises after this answer, so the traceback is logged by the server.
    return our_bug().as_response()
