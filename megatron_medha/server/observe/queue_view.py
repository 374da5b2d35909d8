"""A view of a scheduler at one moment: waiting requests with the reason, in-flight batches. Made on its thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from heapq import nsmallest
from itertools import islice

import msgspec

from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.policies import relative_slack, slack_s
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.server.observe.steps import InFlightBatch, StepRecord
from megatron_medha.stats.snapshot import Snapshot

MAX_QUEUED = 200    # shown of the queue, most urgent first
MAX_DECODING = 100  # shown of the decodes
MAX_AHEAD = 3       # named of those that run while a request waits
# Why a policy prefers a request.
_ORDERS = {
    "fcfs": "they came earlier",
    "edf": "their deadlines are earlier",
    "sjf": "their prompts are shorter",
    "srpt": "they have less left to compute",
    "hrrn": "they have waited longer for their length",
    "lrs": "they have less slack for their length",
    "lars": "they have less slack for their length",
}


class QueuedRequest(msgspec.Struct, frozen=True):
    """A prompt that is not computed yet."""

    request_id: str
    status: str
    why: str                 # it is not running right now, or "running"
    ahead: tuple[str, ...]   # requests whose prompts are computed meanwhile, most tokens first
    slo_class: str
    priority: int
    num_prompt_tokens: int
    num_scheduled_tokens: int
    age_s: float
    deadline_in_s: float
    slack_s: float
    relative_slack: float
    remaining_work_s: float
    total_work_s: float
    kvp_ranks: tuple[int, ...]
    num_preemptions: int
    replica: int


class DecodingRequest(msgspec.Struct, frozen=True):
    """A request in decode."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    max_output_tokens: int
    kvp_ranks: tuple[int, ...]
    replica: int


class QueueView(msgspec.Struct, frozen=True):
    """All of it, of one replica or of several."""

    at_s: float
    policy: str
    num_replicas: int
    num_stages: int
    num_kvp_ranks: int
    num_waiting: int
    num_prefilling: int
    num_decoding: int
    num_blocks: int                   # of each KVP rank
    num_free_blocks: tuple[int, ...]  # by KVP rank, replica after replica
    queue: tuple[QueuedRequest, ...]
    decoding: tuple[DecodingRequest, ...]
    in_flight: tuple[InFlightBatch, ...]


def merge_views(views: Items[QueueView]) -> QueueView | None:
    """The views of several replicas as one, as of the latest; None without any."""
    if len(views) < 2:
        return views[0] if views else None
    queue = (queued for view in views for queued in view.queue)
    return msgspec.structs.replace(
        views[0],
        at_s=max(view.at_s for view in views),
        num_replicas=len(views),
        num_waiting=sum(view.num_waiting for view in views),
        num_prefilling=sum(view.num_prefilling for view in views),
        num_decoding=sum(view.num_decoding for view in views),
        num_free_blocks=tuple(count for view in views for count in view.num_free_blocks),
        queue=tuple(
            nsmallest(MAX_QUEUED, queue, key=lambda one: (one.priority, one.relative_slack, one.request_id))
        ),
        decoding=tuple(islice((one for view in views for one in view.decoding), MAX_DECODING)),
        in_flight=tuple(flying for view in views for flying in view.in_flight),
    )


def take_view(snapshot: Snapshot, steps: tuple[StepRecord, ...], now_s: float, replica: int) -> QueueView:
    """With a list of the most urgent requests; O(live prefills)."""
    scheduler, load = snapshot.scheduler, snapshot.load
    most_urgent = nsmallest(
        MAX_QUEUED,
        snapshot.prefills,
        key=lambda seq: (seq.request.priority, relative_slack(seq, now_s), seq.request_id),
    )
    memory = scheduler.memory
    running: Counter[str] = Counter()  # prompt tokens in flight
    for step in steps:
        running.update({chunk.request_id: chunk.num_tokens for chunk in step.chunks})
    has_decodes = any(step.num_decodes for step in steps)
    return QueueView(
        at_s=now_s,
        policy=scheduler.config.policy,
        num_replicas=1,
        num_stages=scheduler.spp,
        num_kvp_ranks=memory.kvp,
        num_waiting=load.num_waiting,
        num_prefilling=load.num_prefilling,
        num_decoding=load.num_decoding,
        num_blocks=memory.num_blocks,
        num_free_blocks=tuple(memory.num_available_blocks(rank) for rank in range(memory.kvp)),
        queue=tuple(_queued(scheduler, seq, running, has_decodes, now_s, replica) for seq in most_urgent),
        decoding=tuple(
            DecodingRequest(
                seq.request_id, seq.request.num_prompt_tokens, seq.num_output_tokens, seq.request.max_output_tokens,
                seq.block_table.kvp_ranks, replica,
            )
            for seq in snapshot.decodes[:MAX_DECODING]
        ),  # fmt: skip
        in_flight=tuple(InFlightBatch(**msgspec.structs.asdict(step), age_s=now_s - step.at_s) for step in steps),
    )


def _queued(
    scheduler: Scheduler, seq: Sequence, running: Counter[str], has_decodes: bool, now_s: float, replica: int
) -> QueuedRequest:
    request = seq.request
    ahead = () if seq.num_batches_in_flight else _ahead(scheduler, seq, running)
    return QueuedRequest(
        request_id=seq.request_id,
        status=seq.status.value,
        why=_why(scheduler, seq, ahead, has_decodes, now_s),
        ahead=ahead,
        slo_class=request.slo_class,
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        num_scheduled_tokens=seq.num_scheduled_tokens,
        age_s=now_s - request.arrival_s,
        deadline_in_s=seq.deadline_s - now_s,
        slack_s=slack_s(seq, now_s),
        relative_slack=relative_slack(seq, now_s),
        remaining_work_s=seq.remaining_work_s,
        total_work_s=seq.total_work_s,
        kvp_ranks=seq.block_table.kvp_ranks,
        num_preemptions=seq.num_preemptions,
        replica=replica,
    )


def _ahead(scheduler: Scheduler, seq: Sequence, running: Counter[str]) -> tuple[str, ...]:
    if seq.is_waiting and (other := scheduler.awaited(seq)) is not None:
        return (other.request_id,)
    return tuple(one for one, _ in running.most_common(MAX_AHEAD + 1) if one != seq.request_id)[:MAX_AHEAD]


def _why(scheduler: Scheduler, seq: Sequence, ahead: Items[str], has_decodes: bool, now_s: float) -> str:
    """Why it is not running, in a few words; the requests that run instead are named in `ahead`."""
    if seq.num_batches_in_flight:
        return "running"
    if seq.is_waiting:
        if (other := scheduler.awaited(seq)) is not None:
            return f"{other.request_id} computes a prefix that it shares"
        if scheduler.memory.num_owners >= scheduler.config.max_num_sequences:
            return f"all {scheduler.config.max_num_sequences} places (scheduler.max_num_sequences) are taken"
        if scheduler.memory.plan(seq) is None:
            return "not enough free KV memory"
    if not ahead:
        return "decodes fill the step" if has_decodes else "its turn is in the next step"
    first = scheduler.sequence(ahead[0])
    if first is not None and first.request.priority < seq.request.priority:
        return "a request of higher priority goes first"
    if scheduler.is_deprioritized(seq, now_s):
        return "it can no longer meet its deadline: others that can go first"
    return f"others go first: {_ORDERS.get(scheduler.config.policy, f'chosen by {scheduler.config.policy}')}"
