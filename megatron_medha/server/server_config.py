"""How the HTTP server behaves: address, keys, limits, times. Nothing here is about the engine."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_medha.core.errors import ConfigError
from megatron_medha.text.chat.call_syntax import ToolSyntax

# Bound once, when the server starts; a reload that changes one of these is refused.
FIXED_FIELDS = (
    "host", "port", "served_model_names", "tls_certificate", "tls_key", "keepalive_timeout_s", "header_timeout_s",
    "max_header_bytes", "max_connections", "generation_config",
)  # fmt: skip
_ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
_OUR_OWN = (ToolSyntax.LIST, ToolSyntax.ARGUMENTS)
GENERATION_CONFIGS = ("auto", "none")
TOOL_CALL_PARSERS = ("auto", *(syntax.value for syntax in ToolSyntax if syntax not in _OUR_OWN))
SECRET_FIELDS = ("api_key", "admin_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the server, each with its reason."""

    host: str = "127.0.0.1"                   # loopback: without an API key nobody else should reach it
    port: int = 8000                          # what vLLM uses, and so what people type
    served_model_names: tuple[str, ...] = ()  # the first one signs answers; empty: the checkpoint's own name
    api_key: str | None = None                # clients send it as "Authorization: Bearer KEY"
    api_key_file: Path | None = None          # more keys, one "NAME KEY" a line; limits per key count by name
    admin_key: str | None = None              # for /admin and /debug, which tell about everybody's requests
    allowed_hosts: tuple[str, ...] = ()       # without a key: names besides loopback ones, against DNS rebinding
    allowed_origins: tuple[str, ...] = ()     # pages that may use the server (CORS); without a key also against CSRF
    allow_unauthenticated: bool = False       # a public address without keys is a mistake more often than a wish
    tls_certificate: Path | None = None       # PEM, with the chain; for those without a proxy that ends TLS
    tls_key: Path | None = None               # PEM
    max_body_bytes: int = 128 * 2**20         # 10M token ids as JSON are 70 MB, and a fair request
    max_total_body_bytes: int = 2**30         # of bodies until their requests are admitted: eight of the largest
    max_header_bytes: int = 64 * 2**10        # request line and headers; nginx takes 32 KiB, uvicorn any amount
    body_timeout_s: float = 60.0              # between two parts: a client that stops half-way must not stay for ever
    header_timeout_s: float = 20.0            # for a whole head; slow-loris clients send a byte now and then
    max_connections: int = 16384              # each costs a descriptor and some 30 KB
    max_live_requests: int = 8192             # sub-requests in the engine; beyond that 429 is kinder than memory
    max_waiting_requests: int = 4096          # sub-requests without a token yet; a longer queue is mostly late
    max_waiting_tokens: int = 64_000_000      # prompt tokens of those: six prompts of 10M tokens
    max_live_requests_per_key: int | None = None   # sub-requests of one key, so that no client takes all places
    max_tokens_per_minute_per_key: int | None = None  # prompt and output, a minute's worth may come at once
    max_prompt_tokens: int | None = None      # None: whatever fits the context
    grammar_timeout_s: float = 2.0            # to compile one; ranks compile it too, beside their steps
    max_logprobs: int = 20                    # OpenAI's limit for chat, vLLM's default
    tool_call_parser: str = "auto"            # how the model writes calls: hermes, mistral, ...; auto: see its template
    generation_config: str = "auto"           # sampling defaults: of the checkpoint's generation_config.json, or none
    min_tpot_slo_ms: float = 1.0              # x-slo-tpot-ms shortens everybody's steps; nobody reads a token a ms
    reject_late: bool = False                 # whether to answer 429 where the first token is predicted to be late
    request_timeout_s: float | None = 3600.0  # from arrival to the last token; a 10M-token prompt takes tens of minutes
    stalled_client_timeout_s: float = 60.0    # a client that takes nothing for so long is gone
    max_buffered_tokens: int = 4096           # per HTTP request; a token waiting for its reader takes 0.3 KB
    sse_header_wait_s: float = 1.0            # an error within this time still gets its own HTTP status
    sse_keepalive_s: float = 10.0             # between comments while a prompt is in prefill; proxies cut idle lines
    sse_progress_s: float | None = None       # between progress comments; None: only for clients that ask
    log_requests: bool = False                # a line per request when it ends; vLLM's default, as logs grow by it
    retry_after_s: int = 5                    # sent to clients with 503 and 429 where nothing better is known
    keepalive_timeout_s: int = 30             # idle HTTP connections; load balancers often hold theirs for 30 s or more
    drain_timeout_s: float = 20.0             # running requests after SIGTERM; Kubernetes kills after 30 s

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server.port={self.port} must be 0 (any free port) to 65535")
        for name in SECRET_FIELDS:
            key = getattr(self, name)
            if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
                raise ConfigError(f"server.{name} must be printable ASCII without spaces; leave it out to need no key")
        if not all(self.served_model_names):
            raise ConfigError(f"server.served_model_names={list(self.served_model_names)} has an empty name")
        if (self.tls_certificate is None) != (self.tls_key is None):
            given, missing = ("tls_key", "tls_certificate") if self.tls_key else ("tls_certificate", "tls_key")
            raise ConfigError(f"server.{given}={getattr(self, given)} needs server.{missing} beside it")
        for name in ("tls_certificate", "tls_key", "api_key_file"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"server.{name}={path}: no such file")
        if not (self.is_loopback or self.needs_key or self.allow_unauthenticated):
            raise ConfigError(
                f"server.host={self.host} is reachable from elsewhere and no key is needed; give server.api_key or "
                "server.api_key_file, or say server.allow_unauthenticated=true"
            )
        self._check_sites()
        if self.tool_call_parser not in TOOL_CALL_PARSERS:
            known = ", ".join(TOOL_CALL_PARSERS)
            raise ConfigError(f"server.tool_call_parser={self.tool_call_parser} is not one of {known}")
        if self.generation_config not in GENERATION_CONFIGS:
            raise ConfigError(
                f"server.generation_config={self.generation_config} is not one of {', '.join(GENERATION_CONFIGS)}"
            )
        if self.max_total_body_bytes < self.max_body_bytes:
            raise ConfigError(
                f"server.max_total_body_bytes={self.max_total_body_bytes} must hold at least one body of "
                f"server.max_body_bytes={self.max_body_bytes}"
            )
        self._check_numbers()

    def _check_sites(self) -> None:
        for host in self.allowed_hosts:
            if host != "*" and re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host) is None:
                raise ConfigError(
                    f"server.allowed_hosts: {host}: names and addresses in lower case, without scheme, port and "
                    f"brackets; * is any"
                )
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and _ORIGIN.fullmatch(origin) is None:
                raise ConfigError(
                    f"server.allowed_origins: {origin}: origins are written SCHEME://HOST or SCHEME://HOST:PORT in "
                    f"lower case, without a path and without the scheme's own port; * is any"
                )

    def _check_numbers(self) -> None:
        may_be_zero = {
            "port", "max_logprobs", "drain_timeout_s", "keepalive_timeout_s", "sse_header_wait_s",
        }  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if field.name in may_be_zero:
                is_fit, what = value >= 0, "at least 0"
            elif isinstance(value, int):
                is_fit, what = value >= 1, "at least 1"
            else:
                is_fit, what = value > 0, "above 0"
            if not (is_fit and math.isfinite(value)):
                raise ConfigError(f"server.{field.name}={value} must be {what}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def needs_key(self) -> bool:
        """Whether clients must bring a key."""
        return self.api_key is not None or self.api_key_file is not None
