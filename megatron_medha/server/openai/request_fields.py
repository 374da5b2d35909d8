"""Reading a request's headers, and the fields that all generating routes share, checked against the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from megatron_medha.core.sampling import Sampling
from megatron_medha.server.api_keys import ANONYMOUS, ApiClient
from megatron_medha.server.bodies.openai_types import SharedFields
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.service import ReadyState, Service

MAX_SLO_MS = 1e9
MAX_NAME_CHARS = 256  # as of names in bodies
YES = frozenset({"1", "true", "yes", "on"})
NO = frozenset({"0", "false", "no", "off"})

# Options that change a response elsewhere and do nothing here, what they may be all the same, and the way out.
REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("use_beam_search", (None, False), "not supported; best_of chooses among samples"),
    ("bad_words", (None, []), "not supported; logit_bias forbids single tokens"),
    ("allowed_token_ids", (None,), "not supported; structured_outputs says what an answer may be"),
    ("logits_processors", (None, []), "not supported"),
    ("prompt_logprobs", (None,), "not supported; echo with logprobs of /v1/completions has them"),
    ("truncate_prompt_tokens", (None,), "not supported: prompts are never cut here"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What is known of a generating request beside its body: when it came, from whom, and what its headers ask for."""

    ready: ReadyState
    arrival_s: float
    key: ApiClient                       # in whose share it is admitted
    address: str                      # the name of its key; its IP address where it has none
    ttft_s: float | None = None       # latency targets
    tpot_s: float | None = None
    slo_class: str | None = None
    session_id: str | None = None
    has_progress: bool | None = None  # comments while the prompt is computed; None: as the server is configured


def read_context(request: Request, service: Service) -> RequestContext:
    """Now, and with x-slo-ttft-ms, x-slo-tpot-ms, x-slo-class, x-session-id and x-medha-progress.

    ApiError 400 names the header that is wrong, 503 says why no request is taken.
    """
    arrival_s = service.engine.now_s()
    ready = service.ready()
    headers, slo = request.headers, service.slo
    slo_class = headers.get("x-slo-class")
    if slo_class is None:
        # A gateway's objective means a class of ours where the names agree; it has objectives for others too.
        objective = headers.get("x-gateway-inference-objective")
        slo_class = objective if objective in slo.names else None
    elif slo_class not in slo.names:
        raise bad_request(
            f"x-slo-class: expected one of {', '.join(slo.names)}, got `{slo_class[:40]}`", "x-slo-class"
        )
    tpot_s, least_ms = _slo_s(headers, "x-slo-tpot-ms"), service.config.min_tpot_slo_ms
    if tpot_s is not None and 1e3 * tpot_s < least_ms:
        raise bad_request(
            f"x-slo-tpot-ms: {1e3 * tpot_s:g} is below the least that this server takes, {least_ms:g} "
            "(server.min_tpot_slo_ms); send that, or leave the header out", "x-slo-tpot-ms",
        )  # fmt: skip
    key: ApiClient = request.state.client_key
    return RequestContext(
        ready=ready,
        arrival_s=arrival_s,
        key=key,
        address=request.client.host if key.name == ANONYMOUS.name and request.client is not None else key.name,
        ttft_s=_slo_s(headers, "x-slo-ttft-ms"),
        tpot_s=tpot_s,
        slo_class=slo_class,
        session_id=_session_id(headers),
        has_progress=_flag(headers, "x-medha-progress"),
    )


def sampling_of(
    fields: SharedFields,
    ready: ReadyState,
    *,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
    max_tokens: int | None,
    grammar: str | None,
) -> Sampling:
    """Sampling parameters; seed and length are filled in per choice."""
    min_tokens = fields.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad_request(f"min_tokens={min_tokens} must not exceed max_tokens={max_tokens}", "min_tokens")
    if min_tokens > ready.facts.max_request_tokens:
        raise bad_request(
            f"min_tokens: at most {ready.facts.max_request_tokens} tokens fit a request", "min_tokens"
        )
    vocab_size = ready.facts.shape.vocab_size
    client_stop_ids = _stop_ids(fields, vocab_size)
    model_stop_ids = () if fields.ignore_eos else ready.facts.stop_token_ids
    defaults = ready.sampling_defaults
    top_k = max(_or(fields.top_k, defaults.top_k), 0)  # -1 is vLLM's "off", 0 is ours
    return Sampling(
        max_output_tokens=1,
        min_output_tokens=min_tokens,
        temperature=_or(fields.temperature, defaults.temperature),
        top_k=min(top_k, vocab_size),
        top_p=_or(fields.top_p, defaults.top_p),
        min_p=_or(fields.min_p, defaults.min_p),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        logit_bias=_logit_bias(fields, vocab_size),
        stop_token_ids=tuple(dict.fromkeys((*model_stop_ids, *client_stop_ids))),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
    )


def refuse_all(fields: object, refused: Sequence[tuple[str, tuple[object, ...], str]]) -> None:
    """ApiError 400 at the first of these fields that asks for something; by name, what it may be, and the way out."""
    for name, allowed, way_out in refused:
        if getattr(fields, name) not in allowed:
            raise bad_request(f"{name}: {way_out}", name, "unsupported_parameter")


def _stop_ids(fields: SharedFields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.stop_token_ids or []
    if any(not 0 <= token_id < vocab_size for token_id in ids):
        raise bad_request(f"stop_token_ids: expected ids from 0 to {vocab_size - 1}", "stop_token_ids")
    return tuple(ids)


def _logit_bias(fields: SharedFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in (fields.logit_bias or {}).items():
        is_id = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size
        if not is_id:
            raise bad_request(
                f"logit_bias: expected token ids from 0 to {vocab_size - 1} as keys, got `{key[:40]}`", "logit_bias"
            )
        biases[int(key)] = bias
    return tuple(biases.items())


def _session_id(headers: Headers) -> str | None:
    session_id = headers.get("x-session-id")
    if session_id is not None and not 0 < len(session_id) <= MAX_NAME_CHARS:
        raise bad_request(f"x-session-id: expected 1 to {MAX_NAME_CHARS} characters", "x-session-id")
    return session_id


def _slo_s(headers: Headers, name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value_ms = float(text)
    except ValueError:
        value_ms = math.nan
    if not 0 < value_ms <= MAX_SLO_MS:  # NaN fails this too
        raise bad_request(f"{name}: expected milliseconds above 0 and at most {MAX_SLO_MS:g}, got `{text[:40]}`", name)
    return value_ms / 1e3


def _flag(headers: Headers, name: str) -> bool | None:
    text = headers.get(name)
    if text is None:
        return None
    if text.lower() not in YES | NO:
        raise bad_request(f"{name}: expected 1 or 0, got `{text[:40]}`", name)
    return text.lower() in YES


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
