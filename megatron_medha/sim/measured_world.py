"""The world of `medha simulate`: arrivals as they come, a ledger of requests, a sample of the state now and then."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.core.batch import Arrived, Batch, Chunk, Completed, Event, Output, Preempted, Rejected, TokenOut
from megatron_medha.sim.ledger import Ledger
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.sim.sim_world import SimRuntime
from megatron_medha.workload.request_feed import RequestFeed


class MeasuredSimRuntime(SimRuntime):
    """Keeps nothing of a request that has ended but what the ledger has made of it.

    on_sample: called at most once every sample_s of simulated time, at the next event.
    until_s: no event after this moment happens.
    """

    def __init__(
        self,
        feed: RequestFeed,
        pipeline: Pipeline,
        truth: Callable[[Batch], StepTimes],
        ledger: Ledger,
        until_s: float = float("inf"),
        sample_s: float = float("inf"),
        on_sample: Callable[[float], None] = lambda now_s: None,
        api_server_s: float = 0.0,
        places_itself: bool = True,
    ) -> None:
        super().__init__(feed, pipeline, api_server_s, places_itself)
        self._truth = truth
        self._ledger = ledger
        self._until_s = until_s
        self._sample_s = sample_s
        self._next_sample_s = 0.0
        self._on_sample = on_sample
        self._not_begun: set[str] = set()  # requests that no batch has yet, or not since they were preempted
        self._flights: dict[int, tuple[list[Chunk], float]] = {}  # prefill chunks, and when it was submitted
        self._batch_start_s = 0.0  # of the batch completed last, whose tokens are handed out
        self._active_since_s = 0.0
        self.active_s = 0.0        # with at least one batch in flight; those cut off run to their end

    def next_event(self) -> Event | None:
        """See Runtime."""
        event = super().next_event()
        if event is None or self._now_s > self._until_s:
            if self._flights:  # cut off while batches ran: all of their work is counted, so all of their time is
                ends_s = [at_s for at_s, _, other in self._heap if isinstance(other, Completed)]
                if isinstance(event, Completed):
                    ends_s.append(self._now_s)
                self.active_s += max(ends_s) - self._active_since_s
                self._flights.clear()
            return None
        if isinstance(event, Completed):
            prefills, self._batch_start_s = self._flights.pop(event.batch_id)
            if prefills:
                self._ledger.completed(prefills, self._batch_start_s, self._now_s)
            if not self._flights:
                self.active_s += self._now_s - self._active_since_s
        elif isinstance(event, Arrived):
            self._ledger.arrived(event.request)
            self._not_begun.add(event.request.request_id)
        if self._now_s >= self._next_sample_s:
            self._next_sample_s = self._now_s + self._sample_s
            self._on_sample(self._now_s)
        return event

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        if not self._flights:
            self._active_since_s = self._now_s
        not_begun = self._not_begun
        # Of a prompt that is cached but for its last token, a single token is a prefill.
        prefills = [
            chunk
            for chunk in batch.chunks
            if chunk.num_tokens > 1 or not chunk.start or chunk.request_id in not_begun
        ]
        self._flights[batch.batch_id] = prefills, self._now_s
        if prefills:
            not_begun.difference_update([chunk.request_id for chunk in prefills])
            self._ledger.submitted(prefills, self._now_s)
        self.enter(batch, self._truth(batch))

    def emit(self, output: Output) -> None:
        """See Runtime."""
        if isinstance(output, TokenOut):
            is_last = output.finish_reason is not None
            self._ledger.token(output.request_id, self._batch_start_s, self._now_s, is_last)
            if is_last:
                self._feed.ended(output.request_id, self._now_s, True)
        elif isinstance(output, Preempted):
            self._ledger.preempted(output.request_id, output.num_tokens_lost)
            self._not_begun.add(output.request_id)
        elif isinstance(output, Rejected):
            self._ledger.rejected(output.request_id, output.why)
            self._not_begun.discard(output.request_id)
            self._feed.ended(output.request_id, self._now_s, False)
