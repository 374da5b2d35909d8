"""A simulated replica in virtual time: an event heap over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf

from megatron_medha.core.batch import Arrived, Batch, Completed, Event, FirstStageDone, RanksLost, Woken
from megatron_medha.sim.held_batches import InterruptiblePipeline
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.workload.request_feed import OpenLoop, RequestFeed


class SimRuntime:
    """A Runtime in virtual time over one replica: a heap of events, and a pipeline that batches run through.

    feed: the requests; the next one is asked for when the last has come, and their keys as their outputs grow.
    api_server_s: from a request's arrival until the scheduler learns of it: HTTP, tokenizer.
    places_itself: False: arrivals are pushed, by the caller, who takes them from the feed.
    """

    def __init__(
        self,
        feed: RequestFeed,
        pipeline: Pipeline,
        api_server_s: float = 0.0,
        places_itself: bool = True,
    ) -> None:
        self._api_server_s = api_server_s
        self._feed = feed
        self._arrivals = feed if places_itself else OpenLoop(())
        self._heap: list[tuple[float, int, Event]] = []
        self._num_pushed = 0
        self._now_s = 0.0
        self._num_in_flight = 0
        self.pipeline = pipeline
        self.wakes_at_s: Callable[[], float] = _never  # when the scheduler wants to be woken

    def push(self, at_s: float, event: Event) -> None:
        """Let an event happen at a moment; events of the same moment happen in the order they were pushed."""
        heappush(self._heap, (at_s, self._num_pushed, event))
        self._num_pushed += 1

    def now_s(self) -> float:
        """See Runtime."""
        return self._now_s

    @property
    def next_event_s(self) -> float:
        """When the next event happens, arrivals aside; infinity if there is none."""
        return min(self._heap[0][0] if self._heap else inf, self.wakes_at_s())

    def next_event(self) -> Event | None:
        """See Runtime."""
        arrival_s, wake_s = self._arrivals.next_s + self._api_server_s, self.wakes_at_s()
        if wake_s < arrival_s and wake_s < (self._heap[0][0] if self._heap else inf):
            self._now_s = max(self._now_s, wake_s)
            return Woken()
        if arrival_s <= (self._heap[0][0] if self._heap else inf):
            if arrival_s == inf:
                return None
            self._now_s = arrival_s
            return Arrived(self._arrivals.pop())
        self._now_s, _, event = heappop(self._heap)
        if isinstance(event, Completed):
            self._num_in_flight -= 1
            if isinstance(self.pipeline, InterruptiblePipeline):
                self.pipeline.leave(event.batch_id)
        elif isinstance(event, RanksLost):
            self._heap = [entry for entry in self._heap if not isinstance(entry[2], Completed | FirstStageDone)]
            heapify(self._heap)
            self.pipeline.clear(self._now_s)
            self._num_in_flight = 0
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        if isinstance(self.pipeline, InterruptiblePipeline):  # the scheduler knows whether it is for one that overtakes
            return self._num_in_flight <= self.pipeline.spp
        return self._num_in_flight < self.pipeline.spp and self.pipeline.first_stage_free_s <= self._now_s

    def enter(self, batch: Batch, times: StepTimes) -> None:
        """Send a batch through the pipeline."""
        self._num_in_flight += 1
        if isinstance(self.pipeline, InterruptiblePipeline):
            self._enter_interruptible(self.pipeline, batch, times)
            return
        done_s = self.pipeline.run(batch.batch_id, times, self._now_s)
        if self.pipeline.spp > 1:
            self.push(self.pipeline.first_stage_free_s, FirstStageDone(batch.batch_id))
        self.push(done_s, self.completed(batch, times.duration_s))

    def _enter_interruptible(self, pipeline: InterruptiblePipeline, batch: Batch, times: StepTimes) -> None:
        """The moments of batches that it overtakes change."""
        moved = {passage.batch.batch_id: passage for passage in pipeline.enter(batch, times, self._now_s)}
        kept: list[tuple[float, int, Event]] = []
        events: list[tuple[float, int, Event]] = []
        for entry in self._heap:
            is_moved = isinstance(entry[2], Completed | FirstStageDone) and entry[2].batch_id in moved
            (events if is_moved else kept).append(entry)
        self._heap = kept
        heapify(kept)
        for _, _, event in sorted(events, key=lambda entry: entry[1]):
            if isinstance(event, Completed):
                passage = moved[event.batch_id]
                self.push(passage.done_s, event._replace(held_s=sum(passage.held_s)))
            elif isinstance(event, FirstStageDone):
                self.push(moved[event.batch_id].left_first_stage_s, event)
        passage = moved[batch.batch_id]
        if pipeline.spp > 1:
            self.push(passage.left_first_stage_s, FirstStageDone(batch.batch_id))
        self.push(passage.done_s, self.completed(batch, times.duration_s))

    def completed(self, batch: Batch, duration_s: float) -> Completed:
        """How a batch ends: no sampled token is a stop token, and nothing has failed."""
        if self._feed.granule_tokens is None:
            return Completed(batch_id=batch.batch_id, duration_s=duration_s)
        return Completed(batch.batch_id, duration_s, filled_keys=filled_keys(self._feed, batch))


def _never() -> float:
    return inf


def filled_keys(feed: RequestFeed, batch: Batch) -> tuple[tuple[str, bytes], ...]:
    """See Completed: of the granules that the tokens of this batch fill."""
    granule_tokens = feed.granule_tokens
    assert granule_tokens is not None
    found = []
    for chunk in batch.chunks:
        num_known_tokens = chunk.start + chunk.num_tokens + 1
        if num_known_tokens % granule_tokens or not chunk.samples_token:
            continue
        if keys := feed.filled_keys(chunk.request_id, num_known_tokens):
            found.append((chunk.request_id, keys))
    return tuple(found)
