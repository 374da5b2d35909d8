"""The timeline of one request: its moments, what follows from them, and the observer that writes them down.

Latencies are those of the field: TTFT from the planned arrival, TBT between two tokens, TPOT per request after the
first token, E2E to the last token. Times are seconds of the clock that the scheduler is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Chunk,
    Completed,
    Event,
    Output,
    Preempted,
    Rejected,
    TokenOut,
)
from megatron_medha.core.request import Request


class Ending(Enum):
    """How a request ended."""

    FINISHED = "finished"
    REJECTED = "rejected"
    ABORTED = "aborted"
    UNFINISHED = "unfinished"  # it has not, or not before the run did


@dataclass(slots=True, kw_only=True)
class RequestStats:
    """One request's moments and counts. Moments that have not come are None."""

    request: Request
    ending: Ending = Ending.UNFINISHED
    why: str | None = None             # of a rejection
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens_out: int = 0            # counted with each token, or at the end
    num_scheduled_tokens: int = 0      # whose KV batches have computed, or will; 0 again after a loss
    num_ever_scheduled: int = 0        # the most that this has been: what is below and computed again was lost
    num_cached_tokens: int | None = 0  # of the prompt, whose KV was there when it first began; None: not known
    num_preemptions: int = 0           # losses of its KV; waiting for others is none
    num_tokens_lost: int = 0
    max_tbt_s: float | None = None
    execution_s: float = 0.0           # in which a batch with this request was in flight
    isolated_s: float = 0.0            # T_iso: TTFT of the same prompt alone on the same machine
    deadline_miss_rate: float | None = None  # None: no target between tokens was set

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.num_tokens_out < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens_out - 1)

    @property
    def e2e_s(self) -> float | None:
        """Arrival to last token; None unless all tokens came."""
        if self.ending is not Ending.FINISHED or self.last_token_s is None:
            return None
        return self.last_token_s - self.request.arrival_s

    @property
    def normalized_s(self) -> float | None:
        """E2E per output token."""
        return None if self.e2e_s is None else self.e2e_s / self.num_tokens_out

    @property
    def scheduling_delay_s(self) -> float | None:
        """Arrival to the first batch it is in."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.request.arrival_s

    @property
    def preempted_s(self) -> float | None:
        """In the system, but in no batch: E2E = scheduling delay + execution + this."""
        if self.e2e_s is None or self.scheduling_delay_s is None:
            return None
        return self.e2e_s - self.scheduling_delay_s - self.execution_s

    @property
    def slowdown(self) -> float | None:
        """TTFT over what it would be alone: the length-fair TTFT."""
        return None if self.ttft_s is None or self.isolated_s <= 0.0 else self.ttft_s / self.isolated_s

    def num_computed_before(self, chunk: Chunk) -> int:
        """Tokens of a chunk of this request that are computed again."""
        return max(0, min(chunk.start + chunk.num_tokens, self.num_ever_scheduled) - chunk.start)


R = TypeVar("R", bound=RequestStats)


def _ignore(*_: object) -> None:
    pass


class RequestTracker(Generic[R]):
    """An Observer that keeps the stats of the live requests of one scheduler.

    Per step it costs a look at each output and work in proportion to the prefill chunks, whatever else is live.
    """

    def __init__(
        self,
        begin: Callable[[Request], R | None],
        *,
        on_chunk: Callable[[R, Chunk, float], None] = _ignore,
        on_first_token: Callable[[R, float], None] = _ignore,
        on_preempted: Callable[[R, int, float], None] = _ignore,
        on_end: Callable[[R, str, float], None] = _ignore,
    ) -> None:
        """begin: makes the stats of a request that has arrived; None: it is not tracked.

        on_chunk: called before a prefill chunk is noted. on_preempted: a request has lost the KV of so many tokens.
        on_end: a request is no longer live, and why in words.
        """
        self.live: dict[str, R] = {}
        self._prefilling: dict[str, R] = {}  # whose next token needs chunks
        self._begin = begin
        self._on_chunk = on_chunk
        self._on_first_token = on_first_token
        self._on_preempted = on_preempted
        self._on_end = on_end

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        match event:
            case Arrived(request):
                if (stats := self._begin(request)) is not None:
                    self.live[request.request_id] = self._prefilling[request.request_id] = stats
            case Aborted(request_id):
                self._end(request_id, Ending.ABORTED, "aborted", now_s)
            case Completed():
                for request_id, why in event.failed:
                    self._end(request_id, Ending.REJECTED, f"failed: {why}", now_s, why)
            case _:
                pass
        prefilling = self._prefilling
        for output in outputs:
            if type(output) is TokenOut:  # nearly all are, and none of them a first or a last one
                request_id, _, reason, _ = output
                first = prefilling.pop(request_id, None) if prefilling else None
                if first is not None and first.first_token_s is None:  # else it had lost its KV, and has it again
                    first.first_token_s = now_s
                    self._on_first_token(first, now_s)
                if reason is not None:
                    self._end(request_id, Ending.FINISHED, reason.value, now_s)
            elif isinstance(output, Preempted):
                if (lost := self.live.get(output.request_id)) is not None:
                    lost.num_preemptions += 1
                    lost.num_tokens_lost += output.num_tokens_lost
                    self.lose(lost, output.num_tokens_lost + output.num_cached_tokens)
                    self._on_preempted(lost, output.num_tokens_lost, now_s)
            elif isinstance(output, Rejected):
                self._end(output.request_id, Ending.REJECTED, f"rejected: {output.why}", now_s, output.why)

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        # Decodes come first in a batch; going backwards, the first that is no prefill ends the prefills.
        for chunk in reversed(batch.chunks):
            stats = self._prefilling.get(chunk.request_id)
            if stats is None:
                break
            self._on_chunk(stats, chunk, now_s)
            if stats.first_scheduled_s is None:
                stats.first_scheduled_s = now_s
                stats.num_cached_tokens = chunk.start
            stats.num_scheduled_tokens = end = chunk.start + chunk.num_tokens
            stats.num_ever_scheduled = max(stats.num_ever_scheduled, end)

    def lose(self, stats: R, num_tokens: int) -> None:
        """A live request has lost its KV, of so many tokens, and starts again."""
        stats.num_ever_scheduled = max(stats.num_ever_scheduled, num_tokens)
        stats.num_scheduled_tokens = 0
        self._prefilling[stats.request.request_id] = stats

    def _end(self, request_id: str, ending: Ending, outcome: str, now_s: float, why: str | None = None) -> None:
        stats = self.live.pop(request_id, None)  # None: refused, or aborted after its end
        if stats is not None:
            self._prefilling.pop(request_id, None)
            stats.ending, stats.why = ending, why
            self._on_end(stats, outcome, now_s)
