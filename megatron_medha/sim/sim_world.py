"""A simulated replica in virtual time: an event heap over pipeline stages, and the world that remembers everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    Event,
    FinishReason,
    FirstStageDone,
    Output,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.step_cost import CostModel, StepLoad, step_s
from megatron_medha.core.kv.shards import context_in
from megatron_medha.core.request import Request
from megatron_medha.sim.pipeline import Pipeline, StepTimes


@dataclass(slots=True)
class RequestRecord:
    """What a client would have seen of one request."""

    request: Request
    token_times_s: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    rejection: str | None = None
    num_tokens_lost: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.token_times_s[0] - self.request.arrival_s


def no_failures(batch: Batch, duration_s: float) -> Completed:
    """The end of a batch in which no sampled token was a stop token and nothing failed."""
    return Completed(batch_id=batch.batch_id, duration_s=duration_s)


class SimRuntime:
    """A Runtime in virtual time over one replica: a heap of events, and a pipeline that batches run through.

    arrivals: requests in order of arrival; the next one is asked for when the last has come.
    outcome: what to report when a batch has taken so many seconds.
    api_server_s: from a request's arrival until the scheduler learns of it: HTTP, tokenizer.
    """

    def __init__(
        self,
        arrivals: Iterable[Request],
        pipeline: Pipeline,
        outcome: Callable[[Batch, float], Completed] = no_failures,
        api_server_s: float = 0.0,
    ) -> None:
        self._api_server_s = api_server_s
        self._arrivals = iter(arrivals)
        self._next_arrival = next(self._arrivals, None)
        self._outcome = outcome
        self._heap: list[tuple[float, int, Event]] = []
        self._num_pushed = 0
        self._now_s = 0.0
        self._num_in_flight = 0
        self.pipeline = pipeline

    def push(self, at_s: float, event: Event) -> None:
        """Let an event happen at a moment; events of the same moment happen in the order they were pushed."""
        heappush(self._heap, (at_s, self._num_pushed, event))
        self._num_pushed += 1

    def abort(self, at_s: float, request_id: str) -> None:
        """Let a client go away at a moment."""
        self.push(at_s, Aborted(request_id))

    def lose_ranks(self, at_s: float) -> None:
        """Let the ranks fail, and come back empty, at a moment; batches in flight never complete."""
        self.push(at_s, RanksLost("simulated"))

    def now_s(self) -> float:
        """See Runtime."""
        return self._now_s

    @property
    def next_event_s(self) -> float:
        """When the next event happens, arrivals aside; infinity if there is none."""
        return self._heap[0][0] if self._heap else inf

    def next_event(self) -> Event | None:
        """See Runtime."""
        request = self._next_arrival
        if request is not None and (not self._heap or request.arrival_s + self._api_server_s <= self._heap[0][0]):
            self._next_arrival = next(self._arrivals, None)
            self._now_s = request.arrival_s + self._api_server_s
            return Arrived(request)
        if not self._heap:
            return None
        self._now_s, _, event = heappop(self._heap)
        if isinstance(event, Completed):
            self._num_in_flight -= 1
        elif isinstance(event, RanksLost):
            self._heap = [entry for entry in self._heap if not isinstance(entry[2], Completed | FirstStageDone)]
            heapify(self._heap)
            self.pipeline.clear(self._now_s)
            self._num_in_flight = 0
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        return self._num_in_flight < self.pipeline.spp and self.pipeline.first_stage_free_s <= self._now_s

    def enter(self, batch: Batch, times: StepTimes) -> None:
        """Send a batch through the pipeline."""
        done_s = self.pipeline.run(batch.batch_id, times, self._now_s)
        if self.pipeline.spp > 1:
            self.push(self.pipeline.first_stage_free_s, FirstStageDone(batch.batch_id))
        self.push(done_s, self._outcome(batch, times.duration_s))
        self._num_in_flight += 1


class RecordingSimRuntime(SimRuntime):
    """A world that remembers every token of every request: for tests, and for small runs.

    truth: maps a batch to its seconds over all stages; stages share it evenly.
    """

    def __init__(
        self,
        arrivals: Iterable[Request],
        truth: Callable[[Batch], float],
        spp: int = 1,
        outcome: Callable[[Batch, float], Completed] = no_failures,
    ) -> None:
        super().__init__((), Pipeline(spp), outcome)
        self._truth = truth
        self.records: dict[str, RequestRecord] = {}
        for request in arrivals:
            self.records.setdefault(request.request_id, RequestRecord(request))
            self.push(request.arrival_s, Arrived(request))

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        spp = self.pipeline.spp
        self.enter(batch, StepTimes(((self._truth(batch) / spp,) * spp,)))

    def emit(self, output: Output) -> None:
        """See Runtime."""
        record = self.records[output.request_id]
        match output:
            case TokenOut():
                record.token_times_s.append(self._now_s)
                record.finish_reason = output.finish_reason
            case Rejected():
                record.rejection = output.why
            case Preempted():
                record.num_tokens_lost += output.num_tokens_lost


def true_step_s(cost: CostModel, kvp: int = 1, shard_tokens: int = 1 << 60) -> Callable[[Batch], float]:
    """The truth of a world whose steps take exactly what a cost model says, on the slowest of the KVP ranks.

    shard_tokens: of a sequence on one KVP rank, at most.
    """

    def duration_s(batch: Batch) -> float:
        loads = [StepLoad() for _ in range(kvp)]
        for chunk in batch.chunks:
            for index, rank in enumerate(chunk.kvp_ranks):
                context = context_in(index, chunk.start, shard_tokens)
                if chunk.num_tokens == 1 and chunk.start:
                    loads[rank].add_decodes(1, context + 1, cost.decode_attention_s(context + 1))
                else:
                    loads[rank].add_chunk(context, chunk.num_tokens, cost.attention_s(context, chunk.num_tokens))
        return max(step_s(cost, load) for load in loads)

    return duration_s
