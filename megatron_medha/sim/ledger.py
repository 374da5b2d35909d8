"""What is written down of the requests of a simulation: live ones as sums, and once they have ended nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_medha.core.batch import Chunk
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import DeadlineMisses, Slo
from megatron_medha.stats.summary import GapCounts, Summary


@dataclass(slots=True, kw_only=True)
class LiveRequest(RequestStats):
    """One request on its way: what is needed while its tokens come."""

    gaps: GapCounts
    misses: DeadlineMisses | None
    executed_until_s: float


class Ledger:
    """Follows every request from arrival to end; keeps none that has ended.

    isolated_s: TTFT of a prompt of so many tokens alone on this machine.
    on_end: takes the stats of each request as it ends, after the summary has.
    """

    def __init__(
        self,
        summary: Summary,
        slo: Slo,
        isolated_s: Callable[[int], float],
        on_end: Callable[[RequestStats], None] = lambda stats: None,
    ) -> None:
        self.summary = summary
        self._slo = slo
        self._isolated_s = isolated_s
        self._on_end = on_end
        self._live: dict[str, LiveRequest] = {}
        self.num_ended = 0

    @property
    def live(self) -> Iterable[LiveRequest]:
        """Requests that have arrived and not ended, in order of arrival."""
        return self._live.values()

    @property
    def num_live(self) -> int:
        """How many those are."""
        return len(self._live)

    def arrived(self, request: Request) -> None:
        """A request came in."""
        self._live[request.request_id] = LiveRequest(
            request=request,
            isolated_s=self._isolated_s(request.num_prompt_tokens),
            gaps=self.summary.sums_for(request.num_prompt_tokens).gaps,
            misses=None if self._slo.tbt_s is None else DeadlineMisses(self._slo.tbt_s),
            executed_until_s=request.arrival_s,
        )

    def submitted(self, prefills: Iterable[Chunk], now_s: float) -> None:
        """A batch with these prefill chunks was submitted."""
        for chunk in prefills:
            live = self._live.get(chunk.request_id)
            if live is not None:
                live.num_scheduled_tokens = chunk.start + chunk.num_tokens
                if live.first_scheduled_s is None:
                    live.first_scheduled_s = now_s
                    live.num_cached_tokens = chunk.start

    def completed(self, prefills: Iterable[Chunk], start_s: float, now_s: float) -> None:
        """Their batch has ended; its tokens are handed out next, but chunks that sample none have run, too."""
        for chunk in prefills:
            if not chunk.samples_token and (live := self._live.get(chunk.request_id)) is not None:
                live.execution_s += now_s - max(start_s, live.executed_until_s)
                live.executed_until_s = now_s

    def token(self, request_id: str, start_s: float, now_s: float, is_last: bool) -> None:
        """A request got a token from a batch that was submitted at start_s."""
        live = self._live[request_id]
        last_s = live.last_token_s
        live.last_token_s = now_s
        live.num_tokens_out += 1
        # Consecutive chunks of a prompt overlap in the pipeline: their time is counted once.
        live.execution_s += now_s - (start_s if start_s > live.executed_until_s else live.executed_until_s)
        live.executed_until_s = now_s
        if last_s is None:
            live.first_token_s = now_s
            if live.misses is not None:
                live.misses.first_token(now_s - live.request.arrival_s, self._slo.deadline_s(live.isolated_s))
        else:
            gap_s = now_s - last_s
            live.gaps.add(gap_s)
            if live.max_tbt_s is None or gap_s > live.max_tbt_s:
                live.max_tbt_s = gap_s
            if live.misses is not None:
                live.misses.next_token(gap_s)
        if is_last:
            self._end(live, Ending.FINISHED)

    def preempted(self, request_id: str, num_tokens_lost: int) -> None:
        """A request lost its KV."""
        live = self._live[request_id]
        live.num_scheduled_tokens = 0
        live.num_preemptions += 1
        live.num_tokens_lost += num_tokens_lost

    def rejected(self, request_id: str, why: str) -> None:
        """A request was refused, or failed."""
        self._end(self._live[request_id], Ending.REJECTED, why)

    def close(self) -> None:
        """The run is over: requests that are still here have not finished."""
        for live in list(self._live.values()):
            self._end(live, Ending.UNFINISHED)

    def _end(self, live: LiveRequest, ending: Ending, why: str | None = None) -> None:
        del self._live[live.request.request_id]
        self.num_ended += 1
        live.ending, live.why = ending, why
        if live.misses is not None:
            live.deadline_miss_rate = live.misses.rate
        self.summary.add(live)
        self._on_end(live)
