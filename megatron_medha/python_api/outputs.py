"""What a request has come to, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import MedhaError


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural) of one token at one position."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # by token id; the chosen one first


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt. From stream(): what is new of it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None      # stop, length, or None while it grows
    stop_reason: int | str | None = None  # the stop string or id of the request's own that ended it

    @property
    def finished(self) -> bool:
        """Whether nothing more follows."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds since the epoch, as time.time() has them."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """From arrival to the first step, seconds."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """One request: its prompt and its completions, or why it has failed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # nothing predicts the first token
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    metrics: RequestMetrics | None = None
    error: MedhaError | None = None  # RequestError or EngineError; then there are no outputs
