"""How a completion is sampled: the fields of the HTTP API's body, checked when they are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from megatron_medha.python_api.api_errors import RequestError, invalid_fields
from megatron_medha.server.bodies.openai_types import SharedFields
from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.openai.request_fields import MAX_SLO_MS, REFUSED, refuse_all

# What is no field of the body: what its two kinds name differently, and what HTTP has in headers.
_BESIDE_BODY = frozenset({"logprobs", "slo_class", "ttft_slo_s", "tpot_slo_s"})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names and meaning as in vLLM. None: the checkpoint's generation_config.json, or else OpenAI's default.

    Raises RequestError, a ValueError, for what no model could do.
    """

    n: int = 1
    max_tokens: int | None = None  # None: 16 for a prompt, what fits the context for a chat, as over HTTP
    min_tokens: int = 0
    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None         # of the chosen token and this many of the most likely
    prompt_logprobs: int | None = None  # the same of every position of the prompt
    structured_outputs: Mapping[str, Any] | None = None  # one of json, regex, choice, grammar, json_object
    response_format: Mapping[str, Any] | None = None     # OpenAI's way to say the same
    # Beyond vLLM's: scheduling and the prefix cache.
    priority: int | None = None  # lower runs first
    slo_class: str | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    session_id: str | None = None  # requests of one session continue one another
    ends_session: bool = False
    cache_salt: str | None = None
    cache_prompt: bool = True
    # Not supported. They are here so that the error can say what to use.
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Any] | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens == 0:
            raise RequestError("max_tokens=0: expected at least 1", "max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise RequestError(f"{name}={value}: expected a number of tokens, 0 or more", name)
        for name in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_SLO_MS / 1e3:
                raise RequestError(f"{name}={value}: expected seconds above 0 and at most {MAX_SLO_MS / 1e3:g}", name)
        try:
            refuse_all(self.shared_fields(), REFUSED)
        except ApiError as error:
            raise RequestError(error.message, error.param) from None

    def shared_fields(self) -> SharedFields:
        """As the part of a body that completions and chats have in common."""
        given = {
            field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name not in _BESIDE_BODY
        }
        given["prompt_logprobs"] = None  # as `echo`, where it is possible
        try:
            return msgspec.convert(given, SharedFields)
        except msgspec.ValidationError as error:
            raise invalid_fields(error) from None

    @property
    def num_logprobs(self) -> int | None:
        """How many the model is asked for, of prompt and output alike."""
        asked = [number for number in (self.logprobs, self.prompt_logprobs) if number is not None]
        return max(asked, default=None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value
