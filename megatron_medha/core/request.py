"""What a request is and where it stands. Tokens themselves are never here, only their counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked for, in numbers."""

    request_id: str
    num_prompt_tokens: int
    max_output_tokens: int
    arrival_s: float
    ttft_slo_s: float | None = None  # replaces the deadline derived from the prompt's own work
    tpot_slo_s: float | None = None  # lowers the step budget while this request decodes, within limits
    priority: int = 0                # lower runs first, before slack is compared
    deadline_multiplier: float | None = None  # of its SLO class, instead of the scheduler's own
    min_deadline_s: float | None = None       # likewise
    slo_class: str = ""              # the name of that class, for those who watch
    # Keys of the prompt's full granules, 16 bytes each, chained. Empty: the prefix cache gives it nothing
    # and keeps nothing of it.
    prefix_keys: bytes = b""
    reads_cache: bool = True         # False: all of the prompt is computed, though its KV is kept for others
    session_id: str = ""             # requests of one session continue one another; "": of none
    ends_session: bool = False       # nothing of the session follows
    # Of the prompt, those that an earlier request of its session began with, its output included; None: not known.
    # For those who watch.
    num_session_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a request is not admitted: by the API server's limits, its TTFT estimate, or the scheduler."""

    reason: str  # for metrics and clients
    message: str
    retry_after_s: float | None = None     # None: as it is, it is never admitted
    predicted_ttft_s: float | None = None  # where the estimate says no


def rejection(request: Request, is_in_use: bool, max_request_tokens: int) -> Rejection | None:
    """Why a request is not admitted; None where it is. is_in_use: a live request has its id."""
    num_tokens = request.num_prompt_tokens
    if request.max_output_tokens > 1:  # a lone output token is never computed: a prompt scored alone may fill all
        num_tokens += request.max_output_tokens
    if is_in_use:
        message = f"request id {request.request_id} is already in use"
    elif request.num_prompt_tokens < 1 or request.max_output_tokens < 1:
        message = "a request needs at least one prompt token and one output token"
    elif num_tokens > max_request_tokens:
        message = (
            f"{request.num_prompt_tokens} prompt tokens and up to {request.max_output_tokens} output tokens "
            f"exceed the {max_request_tokens} tokens one request may have"
        )
    else:
        return None
    return Rejection(reason="request_rejected", message=message)
