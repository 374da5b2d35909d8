"""What the scheduler did and why, for people: a trace per request, the latest steps, and views of the queue.

Written on the engine's thread by a RequestLogObserver, read on the event loop, under a lock. All of it is bounded. Its
cost per step is proportional to the prefill chunks of that step, never to the queue.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import islice

import msgspec
from msgspec.structs import replace

from megatron_medha.core.batch import Batch, Chunk, Completed, Event, FirstStageDone, Output, RanksLost
from megatron_medha.core.kv.age_counts import AgeCounts
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.server.observe.metrics import Histogram, Metrics, length_class
from megatron_medha.server.observe.queue_view import QueueView, merge_views, take_view
from megatron_medha.server.observe.steps import StepChunk, StepRecord
from megatron_medha.server.ttft_estimate import PendingPrefills, TtftEstimator
from megatron_medha.stats.request_stats import Ending, RequestStats, RequestTracker
from megatron_medha.stats.snapshot import Snapshot

MAX_TRACES = 2048    # requests remembered, of which those that ended first go first; live ones always stay
MAX_STEPS = 4096     # steps remembered: over three minutes of steps of 50 ms
MAX_RUNS = 256       # of one trace; beyond that neighbours are merged
MAX_LOSSES = 64      # of one trace, the latest
VIEW_DEMAND_S = 3.0  # after a view was asked for, further ones are taken for so long


class RunInterval(msgspec.Struct):
    """Chunks of one request in a row of steps, without a step between that it was not part of."""

    from_s: float            # since its arrival
    until_s: float           # when the last of them was scheduled
    batches: tuple[int, int]  # the first and the last
    start: int
    num_tokens: int
    num_chunks: int
    slack_s: float           # before the first of them
    relative_slack: float


class KVLoss(msgspec.Struct, frozen=True):
    """The request lost its KV and starts again."""

    at_s: float              # since its arrival
    num_tokens: int
    why: str


@dataclass(slots=True, kw_only=True)
class RequestTrace(RequestStats):
    """One request in the scheduler, with the scheduler's predictions."""

    deadline_s: float
    total_work_s: float
    remaining_work_s: float
    num_blocks_needed: int
    replica: int = 0                 # whose scheduler has it
    ended_s: float | None = None
    outcome: str = ""
    num_pauses: int = 0              # steps after which others went on while it kept its KV
    runs: list[RunInterval] = field(default_factory=list)
    losses: deque[KVLoss] = field(default_factory=lambda: deque(maxlen=MAX_LOSSES))


class RequestSummary(msgspec.Struct, frozen=True):
    """A line about one request."""

    request_id: str
    slo_class: str
    num_prompt_tokens: int
    num_scheduled_tokens: int
    arrival_s: float
    ttft_s: float | None
    target_s: float
    ended_s: float | None    # since its arrival
    outcome: str
    num_pauses: int

    @classmethod
    def of(cls, trace: RequestTrace) -> RequestSummary:
        """The summary of a trace as of now."""
        request, begin_s = trace.request, trace.request.arrival_s
        return cls(
            request_id=request.request_id,
            slo_class=request.slo_class,
            num_prompt_tokens=request.num_prompt_tokens,
            num_scheduled_tokens=trace.num_scheduled_tokens,
            arrival_s=begin_s,
            ttft_s=None if trace.first_token_s is None else trace.first_token_s - begin_s,
            target_s=trace.deadline_s - begin_s,
            ended_s=None if trace.ended_s is None else trace.ended_s - begin_s,
            outcome=trace.outcome,
            num_pauses=trace.num_pauses,
        )


@dataclass(slots=True, frozen=True)
class PrefillProgress:
    """How far a prompt is."""

    share: float
    eta_s: float
    position: int  # prompts whose first token is due before

    def as_comment(self) -> bytes:
        """As an SSE comment, which clients that do not know it pass over."""
        return b": prefill %.1f%% eta_s=%.1f position=%d\n\n" % (100 * self.share, self.eta_s, self.position)


class RequestLog:
    """The request traces and steps of one server. watch() makes the observers that write them."""

    def __init__(self, metrics: Metrics) -> None:
        self.forecast = TtftEstimator()
        self.metrics = metrics
        self.lock = threading.Lock()
        self.traces: OrderedDict[str, RequestTrace] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()  # whose requests are over, in that order
        self.steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self.views_wanted_until_s = 0.0
        self.views: dict[int, QueueView] = {}  # by replica
        self._num_observers = 0

    def watch(self, scheduler: Scheduler) -> RequestLogObserver:
        """An observer of this scheduler's loop; for Engine(watchers=...)."""
        with self.lock:
            replica = self._num_observers
            self._num_observers += 1
        return RequestLogObserver(self, scheduler, replica)

    def trace(self, request_id: str) -> RequestTrace | None:
        """A copy of one trace; None if it is unknown or forgotten."""
        with self.lock:
            trace = self.traces.get(request_id)
            return _copy(trace) if trace is not None else None

    def request_ids_of(self, response_id: str) -> list[str]:
        """The remembered sub-requests of a response, or the sub-request of this id."""
        prefix = f"{response_id}-"
        with self.lock:
            ids = list(self.traces)
        return [one for one in ids if one == response_id or one.startswith(prefix)]

    def add(self, trace: RequestTrace) -> None:
        """Remember a live request; the lock is held."""
        request_id = trace.request.request_id
        self._ended.pop(request_id, None)
        self.traces[request_id] = trace
        self._forget_ended()

    def end(self, trace: RequestTrace, outcome: str, now_s: float) -> None:
        """The request is over; the lock is held."""
        trace.ended_s, trace.outcome = now_s, outcome
        self._ended[trace.request.request_id] = None
        self._forget_ended()

    def _forget_ended(self) -> None:
        # Never a live one: the prompt that waits longest is the oldest, and its client asks how far it is.
        while len(self.traces) > MAX_TRACES and self._ended:
            del self.traces[self._ended.popitem(last=False)[0]]

    def num_computed_prompt_tokens(self, request_id: str) -> int:
        """How many tokens of this prompt were given to the ranks, each counted once."""
        with self.lock:
            trace = self.traces.get(request_id)
            return min(trace.num_ever_scheduled, trace.request.num_prompt_tokens) if trace is not None else 0

    def recent(self, limit: int) -> list[RequestSummary]:
        """The newest requests, newest first."""
        with self.lock:  # the engine's thread waits for it: no list of a trace is read
            return [RequestSummary.of(trace) for trace in islice(reversed(self.traces.values()), limit)]

    def steps_between(self, from_s: float, until_s: float) -> list[StepRecord]:
        """Remembered steps that were formed then."""
        with self.lock:
            steps = list(self.steps)
        return [step for step in steps if from_s <= step.at_s <= until_s]

    def progress(self, request_id: str, now_s: float) -> PrefillProgress:
        """How far this prompt is; nothing done while the engine has not taken it up."""
        with self.lock:
            trace = self.traces.get(request_id)
            if trace is None:
                return PrefillProgress(0.0, 0.0, 0)
            share = trace.num_scheduled_tokens / trace.request.num_prompt_tokens
            priority, deadline_s, own_s = trace.request.priority, trace.deadline_s, trace.remaining_work_s
            replica = trace.replica
        before = self.forecast.queued_ahead(priority, deadline_s, own_s, replica)
        return PrefillProgress(share, before.work_s + own_s, before.num_prompts)

    def look(self, now_s: float) -> QueueView | None:
        """The latest view of all replicas' queues; a request for it keeps views being made for VIEW_DEMAND_S."""
        self.views_wanted_until_s = now_s + VIEW_DEMAND_S
        return merge_views([view for _, view in sorted(self.views.copy().items())])


class RequestLogObserver:
    """An Observer of one scheduler's loop, which also counts the metrics of requests and steps."""

    def __init__(self, journal: RequestLog, scheduler: Scheduler, replica: int) -> None:
        self._journal = journal
        self._replica = replica
        self._metrics = journal.metrics
        self._scheduler = scheduler
        self._requests = RequestTracker(
            self._begin, on_chunk=self._record_chunk, on_first_token=self._first_token, on_preempted=self._preempted,
            on_end=self._end,
        )  # fmt: skip
        self._batch_id = 0                  # that is being recorded
        self._parts: list[StepChunk] = []   # of it, the last chunk first
        self._unfinished: set[str] = set()  # prefills of the latest step that have more to compute
        self._in_flight: dict[int, StepRecord] = {}
        self._seen_ages: dict[int, tuple[list[int], float]] = {}  # of counts of the prefix cache
        self._was_idle = True
        self._last_s = 0.0

    def handled(self, event: Event, outputs: Items[Output], now_s: float) -> None:
        """See Observer."""
        with self._journal.lock:
            if not self._was_idle:
                self._metrics.work_present_s += now_s - self._last_s
            self._requests.handled(event, outputs, now_s)
            match event:
                case Completed():
                    self._complete(event)
                case FirstStageDone(batch_id):
                    if (step := self._in_flight.get(batch_id)) is not None:
                        step.stage = 1
                case RanksLost(why):
                    self._note_all_kv_lost(why, now_s)
                case _:
                    pass
        self._last_s = now_s
        self._was_idle = not self._scheduler.num_sequences

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        num_tokens, memory = batch.num_tokens, self._scheduler.memory
        with self._journal.lock:
            self._batch_id, self._parts = batch.batch_id, []
            unfinished, self._unfinished = self._unfinished, set()
            self._requests.scheduled(batch, now_s)
            step = StepRecord(
                batch.batch_id, self._replica, now_s, tuple(reversed(self._parts)),
                len(batch.chunks) - len(self._parts), num_tokens, batch.predicted_s, batch.budget_s,
                memory.num_free_blocks, overtakes=batch.overtakes,
            )  # fmt: skip
            self._journal.steps.append(step)
            self._in_flight[batch.batch_id] = step
            self._metrics.step_tokens.observe(num_tokens)
            if batch.overtakes is not None:
                self._metrics.num_overtaking_steps += 1
                self._unfinished |= unfinished  # their chunk is held, or was not due
            elif unfinished:
                self._count_pauses(unfinished.difference(part.request_id for part in self._parts))

    def read(self, snapshot: Snapshot, now_s: float) -> None:
        """See SnapshotReader."""
        self._journal.forecast.update(PendingPrefills.of(snapshot), self._replica)
        if (cache := self._scheduler.memory.cache) is not None:
            self._count_ages(self._metrics.reuse_gap_s, cache.index.reuse_gaps)
            self._count_ages(self._metrics.eviction_age_s, cache.index.eviction_ages)
        # An empty one is always taken: while others are watched, nothing more comes from a replica without work.
        if now_s < self._journal.views_wanted_until_s or not self._scheduler.num_sequences:
            in_flight = tuple(self._in_flight.values())
            self._journal.views[self._replica] = take_view(snapshot, in_flight, now_s, self._replica)

    def _count_ages(self, histogram: Histogram, ages: AgeCounts) -> None:
        """What has been counted since the snapshot before."""
        counts, total_s = self._seen_ages.get(id(ages), ([0] * len(ages.counts), 0.0))
        new = [count - seen for count, seen in zip(ages.counts, counts, strict=True)]
        histogram.add(new, ages.total_s - total_s)
        self._seen_ages[id(ages)] = list(ages.counts), ages.total_s

    def _begin(self, request: Request) -> RequestTrace | None:
        seq = self._scheduler.sequence(request.request_id)
        if seq is None or seq.request is not request:
            self._metrics.num_rejected += 1
            return None
        trace = RequestTrace(
            request=request, deadline_s=seq.deadline_s, total_work_s=seq.total_work_s,
            remaining_work_s=seq.remaining_work_s, replica=self._replica,
            num_blocks_needed=-(-request.num_prompt_tokens // self._scheduler.memory.block_size),
        )  # fmt: skip
        self._journal.add(trace)
        return trace

    def _record_chunk(self, trace: RequestTrace, chunk: Chunk, now_s: float) -> None:
        seq = self._scheduler.sequence(chunk.request_id)
        assert seq is not None, "it is in a batch"
        slack_s = trace.deadline_s - now_s - trace.remaining_work_s
        relative = slack_s / trace.total_work_s if trace.total_work_s else 0.0
        if trace.first_scheduled_s is None:
            self._metrics.queue_s.observe(now_s - trace.request.arrival_s)
            self._count_hits(trace.request, chunk.start)
        self._metrics.num_recomputed_tokens += trace.num_computed_before(chunk)
        trace.remaining_work_s, trace.total_work_s = seq.remaining_work_s, seq.total_work_s
        trace.deadline_s = seq.deadline_s
        self._parts.append(
            StepChunk(chunk.request_id, chunk.start, chunk.num_tokens, round(relative, 4), chunk.kvp_ranks)
        )
        if not chunk.samples_token:
            self._unfinished.add(chunk.request_id)
        batch_id, age_s = self._batch_id, now_s - trace.request.arrival_s
        last = trace.runs[-1] if trace.runs else None
        if last is not None and last.batches[1] == batch_id - 1 and last.start + last.num_tokens == chunk.start:
            last.until_s, last.batches = age_s, (last.batches[0], batch_id)
            last.num_tokens += chunk.num_tokens
            last.num_chunks += 1
        else:
            run = RunInterval(
                age_s, age_s, (batch_id, batch_id), chunk.start, chunk.num_tokens, 1, slack_s, relative
            )
            trace.runs.append(run)
            if len(trace.runs) > MAX_RUNS:
                trace.runs = _thinned(trace.runs)

    def _count_hits(self, request: Request, num_cached_tokens: int) -> None:
        if not (request.prefix_keys and request.reads_cache):
            return
        metrics, num_hits = self._metrics, min(num_cached_tokens, request.num_prompt_tokens)
        metrics.num_prefix_queries += request.num_prompt_tokens
        metrics.num_prefix_hits += num_hits
        metrics.num_cached_tokens[length_class(request.num_prompt_tokens), request.slo_class] += num_hits
        if num_hits:
            metrics.saved_prefill_s += self._scheduler.predicted_prefill_s(num_hits)

    def _count_pauses(self, absent: Iterable[str]) -> None:
        """absent: prefills that the step before left unfinished, and that are not in this one."""
        for request_id in absent:
            trace = self._requests.live.get(request_id)
            if trace is not None and trace.num_scheduled_tokens:
                trace.num_pauses += 1
                self._metrics.num_paused_prefills += 1

    def _first_token(self, trace: RequestTrace, now_s: float) -> None:
        assert trace.first_scheduled_s is not None
        metrics, request = self._metrics, trace.request
        metrics.prefill_s.observe(now_s - trace.first_scheduled_s)
        slack_s = trace.deadline_s - now_s
        metrics.relative_slack.observe(slack_s / trace.total_work_s if trace.total_work_s else 0.0)
        seq = self._scheduler.sequence(request.request_id)
        metrics.kvp_degree.observe(max(1, len(seq.block_table.kvp_ranks)) if seq is not None else 1)
        counts = metrics.num_deadlines_met if slack_s >= 0 else metrics.num_deadlines_missed
        counts[length_class(request.num_prompt_tokens), request.slo_class] += 1

    def _complete(self, event: Completed) -> None:
        actual_s, metrics = event.duration_s, self._metrics
        metrics.step_actual_s.observe(actual_s)
        metrics.stage_busy_s += actual_s / self._scheduler.spp
        metrics.held_s += event.held_s
        if (step := self._in_flight.pop(event.batch_id, None)) is None:
            return
        step.actual_s, step.held_s = actual_s, event.held_s
        metrics.step_predicted_s.observe(step.predicted_s)
        if actual_s > 0:
            metrics.step_relative_error.observe(abs(step.predicted_s / actual_s - 1))
        if step.predicted_s > 0:
            metrics.step_ratio.observe(actual_s / step.predicted_s)

    def _preempted(self, trace: RequestTrace, num_tokens: int, now_s: float) -> None:
        self._metrics.num_preemptions += 1
        self._metrics.num_preempted_tokens += num_tokens
        self._note_kv_loss(trace, num_tokens, "a decode needed its memory", now_s)

    def _note_kv_loss(self, trace: RequestTrace, num_tokens: int, why: str, now_s: float) -> None:
        trace.losses.append(KVLoss(now_s - trace.request.arrival_s, num_tokens, why))
        if (seq := self._scheduler.sequence(trace.request.request_id)) is not None:
            trace.remaining_work_s = seq.remaining_work_s

    def _note_all_kv_lost(self, why: str, now_s: float) -> None:
        self._in_flight.clear()
        self._unfinished.clear()
        for seq in self._scheduler.sequences:
            if not seq.num_scheduled_tokens and (trace := self._requests.live.get(seq.request_id)) is not None:
                num_computed = seq.num_known_tokens - 1 if seq.num_output_tokens else trace.num_scheduled_tokens
                if num_computed:
                    self._requests.lose(trace, num_computed)
                    self._note_kv_loss(trace, num_computed, f"ranks lost: {why}", now_s)

    def _end(self, trace: RequestTrace, outcome: str, now_s: float) -> None:
        self._metrics.num_rejected += trace.ending is Ending.REJECTED
        self._journal.end(trace, outcome, now_s)


def _thinned(runs: list[RunInterval]) -> list[RunInterval]:
    """Every two neighbours as one; the last stays as it is, since it may still grow."""
    merged = [
        replace(
            first,
            until_s=second.until_s,
            batches=(first.batches[0], second.batches[1]),
            num_tokens=second.num_tokens + (second.start - first.start if second.start >= first.start else 0),
            num_chunks=first.num_chunks + second.num_chunks,
        )
        for first, second in zip(runs[:-1:2], runs[1:-1:2], strict=False)
    ]
    return [*merged, *runs[2 * len(merged) :]]


def _copy(trace: RequestTrace) -> RequestTrace:
    # All but the last run stay as they are.
    runs = [*trace.runs[:-1], *(replace(run) for run in trace.runs[-1:])]
    return dataclasses.replace(trace, runs=runs, losses=trace.losses.copy())
