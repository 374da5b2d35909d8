"""What web pages may do: the Host and Origin checks of a server without a key, and CORS.

A browser on the server's machine sends any request that a page makes. Programs send no Origin and are not affected.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.responses import Response

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.server_config import ServerConfig

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_EXPOSED_HEADERS = "x-request-id, retry-after, x-predicted-ttft-ms, x-medha-ignored, www-authenticate"
_PREFLIGHT_S = 600
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_TOKENS = re.compile(r"[\w!#$%&'*+.^`|~, \t-]{0,4096}", re.ASCII)
# Browsers send some of these with every request, and no page can leave all of them out.
_OF_BROWSERS = ("accept-language", "origin", "referer", "cookie", "sec-fetch-site", "sec-fetch-mode")


def check_host(headers: Headers, config: ServerConfig, own_address: str | None) -> None:
    """ApiError 403 if a page could have reached this server by a name of its own (DNS rebinding).

    own_address: the one the client connected to.
    """
    host = headers.get("host", "")
    name = _name_of(host)
    if not name or "*" in config.allowed_hosts or name in config.allowed_hosts or name == config.host.lower():
        return
    address = _address_of(name)
    if name == "localhost" or (address is not None and address.is_loopback):
        return
    if address is not None:
        # Nobody can point an address elsewhere; on a loopback server it is still not what clients use.
        if not config.is_loopback or name == own_address:
            return
    elif "." not in name and not any(header in headers for header in _OF_BROWSERS):
        return  # the name of a container or a service; public names, which anybody can register, have dots
    raise ApiError(
        403, f"Host: {host[:100]} is not one of this server's names; without a key it takes loopback names and "
        f"those of server.allowed_hosts", code="host_not_allowed",
    )  # fmt: skip


def check_origin(method: str, headers: Headers, config: ServerConfig) -> None:
    """ApiError 403 for what a page of another origin asks to be done."""
    if method in _SAFE_METHODS:
        return
    origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
    if len(origins) == 1 and is_allowed(origins[0], config):
        return
    if site in (None, "none"):
        # Our own authority has the origin's scheme: behind a proxy that ends TLS, the server's own is another one.
        own = origins[0].partition("://")[0] + "://" + headers.get("host", "") if len(origins) == 1 else ""
        is_own = not origins or (len(origins) == 1 and _authority_of(origins[0]) == _authority_of(own))
    else:
        is_own = site == "same-origin"  # the browser knows, also where a proxy has changed the Host
    if not is_own:
        shown = ", ".join(origins)[:100] or f"a {site} page"
        raise ApiError(
            403, f"{shown} may not use this server, which needs no key; list the origin in server.allowed_origins",
            code="origin_not_allowed",
        )  # fmt: skip


def is_allowed(origin: str, config: ServerConfig) -> bool:
    """Whether pages of this origin may use the server."""
    return "*" in config.allowed_origins or origin.lower() in config.allowed_origins


def cors_headers(headers: Headers, config: ServerConfig) -> list[tuple[bytes, bytes]]:
    """What lets the page that asked read the response, if it may."""
    if not config.allowed_origins:
        return []
    if "*" in config.allowed_origins:
        found = [(b"access-control-allow-origin", b"*")]
    else:
        found = [(b"vary", b"Origin")]
        origin = headers.get("origin")
        if origin is None or not is_allowed(origin, config):
            return found
        found.append((b"access-control-allow-origin", origin.encode("latin-1")))
    return [*found, (b"access-control-expose-headers", _EXPOSED_HEADERS.encode())]


def answer_preflight(method: str, headers: Headers, config: ServerConfig) -> Response | None:
    """The response to a browser that asks whether a page may send a request; None for everything else.

    CORS headers are added as to any response. ApiError 403 for origins that may not.
    """
    origin = headers.get("origin")
    if method != "OPTIONS" or origin is None or "access-control-request-method" not in headers:
        return None
    if not is_allowed(origin, config):
        raise ApiError(
            403, f"origin {origin[:100]} may not use this server; server.allowed_origins lists those that may",
            code="origin_not_allowed",
        )  # fmt: skip
    asked = headers.get("access-control-request-headers", "")
    allowed = {
        "access-control-allow-methods": "GET, HEAD, POST, DELETE",
        "access-control-max-age": str(_PREFLIGHT_S),
        "vary": "Access-Control-Request-Headers",
    }
    if asked and _TOKENS.fullmatch(asked) is not None:
        allowed["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(None, 200, allowed)


def _name_of(host: str) -> str:
    """The Host without its port, as it is compared."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _authority_of(origin: str) -> tuple[str, str]:
    scheme, _, rest = origin.lower().partition("://")
    port = rest.rpartition("]")[2].partition(":")[2]
    return _name_of(rest), port or _DEFAULT_PORTS.get(scheme, "")
