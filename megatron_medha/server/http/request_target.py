"""What the head of a request must be before anything is done with it: version, framing, Host and target (RFC 9112)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httptools

from megatron_medha.server.http.http_errors import ApiError, bad_request

_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)


def read_target(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The target as path and query; the Host of an absolute one replaces the header. ApiError for heads to refuse."""
    if method == b"CONNECT":
        raise ApiError(405, "CONNECT: this server is not a proxy", code="method_not_allowed")
    if version not in ("1.0", "1.1"):
        raise _invalid(f"HTTP/{version} is not supported; use HTTP/1.1")
    _check_coding([value for name, value in headers if name == b"transfer-encoding"], version)
    _check_host([value for name, value in headers if name == b"host"], version)
    if (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        host, target = absolute[1], absolute[2]
        _check_host([host], version)
        headers[:] = [(b"host", host), *((name, value) for name, value in headers if name != b"host")]
        target = target if target.startswith(b"/") else b"/" + target
    if not (target.startswith(b"/") or target == b"*"):
        raise _invalid("the request's target is not a path")
    try:
        httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError as error:
        raise _invalid(f"the request's target: {error}") from None
    return target


def _check_coding(codings: Sequence[bytes], version: str) -> None:
    # A coding that we cannot undo would leave the body's end, or its text, to guesswork.
    if codings and (version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise _invalid("Transfer-Encoding can only be chunked, once, and in HTTP/1.1")


def _check_host(hosts: Sequence[bytes], version: str) -> None:
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise _invalid(f"{len(hosts)} Host headers; exactly one is needed")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise _invalid("the Host is not HOST or HOST:PORT")


def _invalid(message: str) -> ApiError:
    return bad_request(message, code="invalid_http")
