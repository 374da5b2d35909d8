"""Why a request waited: replays a decision log and records what happened to one request. cli/explain.py prints it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from megatron_medha.core.batch import Batch, Chunk, Output, TokenOut
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.policies import relative_slack
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.stats.decision_log import Recorded, replay_record
from megatron_medha.stats.request_stats import Ending, RequestStats, RequestTracker
from megatron_medha.stats.shared_prefix import PrefixHistory, SharedPrefix


class WaitReason(Enum):
    """Whether a batch computed a request's prefill, and if not, why."""

    COMPUTED = "computed"                  # it is in the batch
    IN_FLIGHT = "in flight"                # its whole prompt is in the pipeline, or its last chunk is still on stage 0
    HELD = "held"                          # its chunk is in flight, and the batch overtakes it
    PREFIX = "shared prefix"               # another request computes a prefix that they share
    OUTRANKED = "outranked"                # the batch has more urgent prefills instead
    NO_MEMORY = "no KV memory"             # not enough blocks are free for its whole prompt
    NO_SEQUENCE_SLOT = "no sequence slot"  # scheduler.max_num_sequences requests own KV
    MIXED = "mixed"                        # several phases with different reasons, joined
    STEP_FULL = "step full"                # the batch has decodes only


@dataclass(slots=True)
class RequestAhead:
    """Another request, whose prefill was computed while the explained one waited or in the same batch."""

    request: Request
    num_tokens: int = 0
    num_batches: int = 0
    first_slack: float = 0.0  # relative slack, in the first and the last such batch
    last_slack: float = 0.0


@dataclass(slots=True)
class RequestPhase:
    """Consecutive batches with the same reason."""

    why: WaitReason
    start_s: float
    end_s: float
    first_slack: float       # of the explained request: (deadline - now - remaining work) / work
    last_slack: float
    num_batches: int = 0
    num_computed: int = 0    # batches that have a chunk of it
    num_tokens: int = 0      # of the explained request, computed in this phase
    num_decodes: int = 0     # over all batches
    num_overtaking: int = 0  # batches that have a chunk of it and overtake others
    awaited: str = ""        # who computes the prefix that they share
    ahead: dict[str, RequestAhead] = field(default_factory=dict)


@dataclass(slots=True)
class Explanation:
    """The history of one request, from a decision log."""

    stats: RequestStats
    policy: str
    learnt_s: float                # when it reached the scheduler
    deadline_s: float = 0.0        # as predicted before its latest prefill batch
    work_s: float = 0.0            # predicted time of its prefill, alone
    deprioritized_s: float | None = None  # when triage first moved it behind others
    phases: list[RequestPhase] = field(default_factory=list)
    num_ahead_on_arrival: int = 0  # unfinished prefills when it arrived
    num_cached_tokens: int = 0          # known tokens that were in the prefix cache when it was first scheduled
    shared: SharedPrefix | None = None  # None: it took no part in the prefix cache

    @property
    def ahead(self) -> list[RequestAhead]:
        """Requests that were computed while it waited, most tokens first."""
        sums = _added_up(phase for phase in self.phases if phase.why is not WaitReason.COMPUTED)
        return sorted(sums.values(), key=lambda one: -one.num_tokens)

    def at_most(self, num_phases: int) -> list[RequestPhase]:
        """The phases; if there are more, phases are joined within equal intervals of time.

        Phases before and after triage moved the request back are not joined, so there may be one more.
        """
        phases = self.phases
        if len(phases) <= num_phases:
            return phases
        start_s = phases[0].start_s
        window_s = (phases[-1].end_s - start_s) / num_phases
        windows: dict[tuple[bool, int], list[RequestPhase]] = {}
        for phase in phases:
            is_deprioritized = self.deprioritized_s is not None and phase.start_s >= self.deprioritized_s
            window = min(int((phase.start_s - start_s) / window_s), num_phases - 1)
            windows.setdefault((is_deprioritized, window), []).append(phase)
        return [_joined(some) for some in windows.values()]


def _added_up(phases: Iterable[RequestPhase]) -> dict[str, RequestAhead]:
    sums: dict[str, RequestAhead] = {}
    for phase in phases:
        for request_id, one in phase.ahead.items():
            total = sums.setdefault(request_id, RequestAhead(one.request, 0, 0, one.first_slack))
            total.num_tokens += one.num_tokens
            total.num_batches += one.num_batches
            total.last_slack = one.last_slack
    return sums


def _joined(phases: list[RequestPhase]) -> RequestPhase:
    return RequestPhase(
        phases[0].why if len({phase.why for phase in phases}) == 1 else WaitReason.MIXED,
        phases[0].start_s,
        phases[-1].end_s,
        phases[0].first_slack,
        phases[-1].last_slack,
        num_batches=sum(phase.num_batches for phase in phases),
        num_computed=sum(phase.num_computed for phase in phases),
        num_tokens=sum(phase.num_tokens for phase in phases),
        num_decodes=sum(phase.num_decodes for phase in phases),
        num_overtaking=sum(phase.num_overtaking for phase in phases),
        awaited=phases[0].awaited,
        ahead=_added_up(phases),
    )


def explain_request(
    records: Iterable[Recorded], scheduler: Scheduler, request_id: str, granule_tokens: int | None = None
) -> Explanation | None:
    """Replay a recorded run until `request_id` has ended; None if it never arrives.

    granule_tokens: of the prefix cache; None: there was none. Raises ReplayError where a decision differs from the
    recorded one.
    """
    found: Explanation | None = None
    prefixes = None if granule_tokens is None else PrefixHistory(granule_tokens)
    watched: list[RequestStats] = []

    def begin(request: Request) -> RequestStats:
        stats = RequestStats(request=request)
        if request.request_id == request_id:
            watched[:] = [stats]
        return stats

    tracker = RequestTracker(begin)
    for record in records:
        if not isinstance(record.entry, Batch):
            outputs = replay_record(record, scheduler)
            if found is not None:
                _count_tokens(found.stats, outputs, record.now_s)
            tracker.handled(record.entry, outputs, record.now_s)
            if watched and found is None:
                found = _arrived(watched[0], scheduler, record.now_s)
                if prefixes is not None and (keys := watched[0].request.prefix_keys):
                    found.shared = prefixes.shared(keys)
            if found is not None and found.stats.ending is not Ending.UNFINISHED:
                return found
            if prefixes is not None and found is None:
                prefixes.note(record.entry)
            continue
        seq = scheduler.sequence(request_id)
        if found is None or seq is None or not seq.is_prefill:
            replay_record(record, scheduler)
            continue
        slacks = {other.request_id: relative_slack(other, record.now_s) for other in scheduler.sequences
                  if other.is_prefill}  # fmt: skip
        blocked = _blocked(seq, scheduler)
        found.deadline_s, found.work_s = seq.deadline_s, seq.total_work_s
        if found.deprioritized_s is None and scheduler.is_deprioritized(seq, record.now_s):
            found.deprioritized_s = record.now_s
        replay_record(record, scheduler)
        other = scheduler.awaited(seq)
        awaited = "" if other is None else other.request_id
        _note_batch(found, record.entry, record.now_s, slacks, blocked, awaited, tracker.live)
    return found


def _arrived(stats: RequestStats, scheduler: Scheduler, now_s: float) -> Explanation:
    others = [seq for seq in scheduler.sequences if seq.is_prefill and seq.request_id != stats.request.request_id]
    return Explanation(stats, scheduler.config.policy, now_s, num_ahead_on_arrival=len(others))


def _count_tokens(stats: RequestStats, outputs: Iterable[Output], now_s: float) -> None:
    for output in outputs:
        if isinstance(output, TokenOut) and output.request_id == stats.request.request_id:
            stats.num_tokens_out += 1
            stats.last_token_s = now_s


def _blocked(seq: Sequence, scheduler: Scheduler) -> WaitReason | None:
    """Why a request cannot be in the next batch, independent of other requests; None if it can."""
    if not seq.num_unscheduled_tokens or seq.num_first_stage_tokens < seq.num_scheduled_tokens:
        return WaitReason.IN_FLIGHT
    if not seq.is_waiting:
        return None
    if scheduler.memory.num_owners >= scheduler.config.max_num_sequences:
        return WaitReason.NO_SEQUENCE_SLOT
    return WaitReason.NO_MEMORY if scheduler.memory.plan(seq) is None else None


def _note_batch(
    found: Explanation,
    batch: Batch,
    now_s: float,
    slacks: dict[str, float],
    blocked: WaitReason | None,
    awaited: str,
    live: dict[str, RequestStats],
) -> None:
    request_id = found.stats.request.request_id
    prefills: list[Chunk] = [chunk for chunk in batch.chunks if chunk.request_id in slacks]
    own = next((chunk for chunk in prefills if chunk.request_id == request_id), None)
    others = [chunk for chunk in prefills if chunk is not own]
    if own is not None:
        why = WaitReason.COMPUTED
        if not any(phase.num_computed for phase in found.phases):
            found.num_cached_tokens = own.start
    elif blocked is WaitReason.IN_FLIGHT and batch.overtakes is not None:
        why = WaitReason.HELD
    elif awaited:
        why = WaitReason.PREFIX
    elif blocked is not None:
        why = blocked
    else:
        why = WaitReason.OUTRANKED if others else WaitReason.STEP_FULL
    slack = slacks[request_id]
    phase = found.phases[-1] if found.phases else None
    # A phase ends when the reason changes, when other requests are computed instead, or when triage moves it back.
    is_same = phase is not None and phase.why is why and found.deprioritized_s != now_s and (
        why is WaitReason.COMPUTED or {chunk.request_id for chunk in others} <= set(phase.ahead) or not phase.ahead
    )
    if phase is None or not is_same:
        phase = RequestPhase(why, now_s, now_s, slack, slack, awaited=awaited)
        found.phases.append(phase)
    phase.end_s, phase.last_slack = now_s, slack
    phase.num_batches += 1
    phase.num_decodes += len(batch.chunks) - len(prefills)
    if own is not None:
        phase.num_computed += 1
        phase.num_tokens += own.num_tokens
        phase.num_overtaking += batch.overtakes is not None
    for chunk in others:
        one = phase.ahead.setdefault(
            chunk.request_id, RequestAhead(live[chunk.request_id].request, first_slack=slacks[chunk.request_id])
        )
        one.num_tokens += chunk.num_tokens
        one.num_batches += 1
        one.last_slack = slacks[chunk.request_id]
