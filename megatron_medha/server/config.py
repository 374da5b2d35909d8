"""How the HTTP server behaves: address, names, limits. Nothing here is about the engine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the server, each with its reason."""

    host: str = "127.0.0.1"                   # loopback: without an API key nobody else should reach it
    port: int = 8000                          # what vLLM uses, and so what people type
    served_model_names: tuple[str, ...] = ()  # the first one signs answers; empty: the checkpoint's own name
    api_key: str | None = None                # clients send it as "Authorization: Bearer KEY"
    max_body_bytes: int = 128 * 2**20         # 10M token ids as JSON are 70 MB, and a fair request
    body_timeout_s: float = 60.0              # between two parts: a client that stops half-way must not stay for ever
    max_live_requests: int = 8192             # sub-requests in the engine; beyond that 429 is kinder than memory
    max_n: int = 128                          # OpenAI's limit
    max_prompts: int = 2048                   # prompts in one call; lm-eval and OpenAI's batches stay below
    max_stop_strings: int = 16                # OpenAI allows 4, vLLM any; every one is matched on every character
    max_stop_string_chars: int = 1024         # text up to this long may be held back from the client
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024                # entries; the rank applies them one by one
    max_logprobs: int = 20                    # OpenAI's limit for chat, vLLM's default
    default_max_output_tokens: int = 16       # of /v1/completions, OpenAI's number; chat takes what fits
    sse_header_wait_s: float = 1.0            # an error within this time still gets its own HTTP status
    sse_keepalive_s: float = 10.0             # between comments while a prompt is in prefill; proxies cut idle lines
    engine_check_s: float = 1.0               # how soon requests end if the engine dies without a word
    retry_after_s: int = 5                    # what clients are told with 503 and 429
    keepalive_timeout_s: int = 30             # idle HTTP connections; load balancers often hold theirs for 30 s or more
    drain_timeout_s: int = 5                  # what running requests get to finish after SIGTERM or Ctrl-C
    stop_timeout_s: float = 10.0              # what the ranks get to exit before they are killed

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server.port={self.port} must be 0 (any free port) to 65535")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("server.api_key must be printable ASCII and not empty; leave it out to need no key")
        if not all(self.served_model_names):
            raise ConfigError(f"server.served_model_names={list(self.served_model_names)} has an empty name")
        at_least_one = (
            "max_body_bytes", "max_live_requests", "max_n", "max_prompts", "max_stop_string_chars",
            "default_max_output_tokens", "retry_after_s",
        )
        at_least_zero = (
            "max_stop_strings", "max_stop_token_ids", "max_logit_bias", "max_logprobs", "drain_timeout_s",
            "keepalive_timeout_s", "stop_timeout_s", "sse_header_wait_s",
        )
        above_zero = ("body_timeout_s", "sse_keepalive_s", "engine_check_s")
        for name in (*at_least_one, *at_least_zero, *above_zero):
            value = getattr(self, name)
            if value < (1 if name in at_least_one else 0) or (name in above_zero and value == 0):
                what = "at least 1" if name in at_least_one else "at least 0" if name in at_least_zero else "above 0"
                raise ConfigError(f"server.{name}={value} must be {what}")
