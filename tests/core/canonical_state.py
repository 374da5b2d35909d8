"""What makes two states of an exploration the same: of time only order counts, of blocks only who shares them."""

from __future__ import annotations

from typing import Any

from explored_state import TTL_S, State

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.eviction import ClassedOrder
from megatron_medha.core.kv.segment import Segment
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.request import Request


def canonical(state: State) -> tuple[Any, ...]:
    """A state without clocks, batch ids and block ids: blocks by the order in which they are met, times by rank."""
    scheduler = state.scheduler
    memory = scheduler.memory
    names: list[dict[int, int]] = [{}, {}]
    live = [_sequence(seq, names, state.now_s) for _, seq in sorted(scheduler._sequences.items())]
    segments = _segments(state, names)
    prefixes = scheduler._prefixes
    assert prefixes is not None
    waits, siblings = prefixes._waits, prefixes.siblings
    reservation = memory.reservation
    kept = None
    if reservation is not None:
        kept = (reservation.request_id, tuple(memory._num_reserved(rank, _NOBODY) for rank in (0, 1)))
    overdue = scheduler._packer._overdue
    return (
        tuple(state.pending), state.num_aborts, state.num_failures, state.num_losses, state.num_late,
        tuple(scheduler._sequences), tuple(live), segments, _left_by_sessions(state),
        tuple([
            (
                batch.chunks, batch.batch_id in state.left, batch.overtakes is None,
                round(scheduler._in_flight[batch.batch_id].held_s, 6),
            )
            for batch in state.in_flight
        ]),
        tuple([seq.request_id for seq in scheduler._decodes]), tuple([seq.request_id for seq in scheduler._growing]),
        tuple(sorted(scheduler._prefills._bucket_of)), tuple(scheduler._released),
        tuple([(op.kind, op.request_id) for op in scheduler._kv_ops]),
        kept, overdue.request_id if overdue is not None else None, round(scheduler._packer._overdue_credit_s, 6),
        tuple(memory.owners), tuple(memory._pending_work),
        tuple(sorted((name, wait.next_key) for name, wait in waits._waits.items())),
        tuple(sorted((name, prefill.next_key, *prefill.waiters) for name, prefill in siblings._prefills.items())),
        tuple(sorted((name, lead.request_id) for name, lead in siblings.leads.items())),
        tuple(prefixes._moved), tuple(prefixes._freed),
    )  # fmt: skip


_NOBODY = Sequence(request=Request(request_id="", num_prompt_tokens=1, max_output_tokens=1, arrival_s=0.0))


def _blocks(extents: list[Extent], names: dict[int, int]) -> tuple[int, ...]:
    return tuple([
        names.setdefault(block, len(names)) for first, count in extents for block in range(first, first + count)
    ])


def _sequence(seq: Sequence, names: list[dict[int, int]], now_s: float) -> tuple[Any, ...]:
    table = seq.block_table
    return (
        seq.request_id, seq.status.value, seq.num_scheduled_tokens, seq.num_first_stage_tokens,
        seq.num_computed_tokens, seq.num_output_tokens, seq.num_batches_in_flight, seq.keys, seq.num_cached_tokens,
        seq.num_promised_tokens, seq.total_work_s, seq.remaining_work_s, seq.capacity_tokens, seq.grow_tokens,
        len(table.unsent), seq.triage_deadline_s < 1e300,
        seq.deadline_s < now_s,
        tuple([(shard.kvp_rank, _blocks(shard.extents, names[shard.kvp_rank])) for shard in table.shards]),
        tuple([(h.end, h.deepest.first if h.deepest else -1, tuple(h.duplicates)) for h in table.holdings]),
    )  # fmt: skip


def _segments(state: State, names: list[dict[int, int]]) -> tuple[Any, ...]:
    """All that are listed or held, in an order of their own, and what decides in which order they are evicted."""
    cache = state.scheduler.memory.cache
    assert cache is not None
    trees = cache.index.trees[0]
    found = {segment: None for tree in trees for segment in tree.heads.values()}
    for seq in state.scheduler.memory.owners.values():
        for holding in seq.block_table.holdings:
            segment = holding.deepest
            while segment is not None:
                found[segment] = None
                segment = segment.parent
    unused = sorted([s for s in found if not s.pins], key=_recency)
    ranks = {id(segment): rank for rank, segment in enumerate(unused)}
    classes = tuple([tuple(tree.order._numbers) for tree in trees if isinstance(tree.order, ClassedOrder)])
    old_s = state.now_s - TTL_S
    listed = sorted(found, key=lambda s: (s.kvp_rank, s.is_listed, s.first, bytes(s.keys), s.creator, s.pins))
    places = [(ranks.get(id(segment), -1), segment.session != "" and segment.last_use_s < old_s) for segment in listed]
    return tuple([_segment(segment, names) for segment in listed]), tuple(places), classes


def _recency(segment: Segment) -> tuple[float, int, int]:
    return segment.last_use_s, -segment.first, segment.ticket


def _segment(segment: Segment, names: list[dict[int, int]]) -> tuple[Any, ...]:
    return (
        segment.kvp_rank, segment.first, bytes(segment.keys), segment.creator, segment.pins, segment.num_references,
        segment.is_listed, segment.is_proven, segment.session, segment.is_ended, tuple(segment.waiters),
        _blocks(segment.extents, names[segment.kvp_rank]),
    )  # fmt: skip


def _left_by_sessions(state: State) -> tuple[Any, ...]:
    cache = state.scheduler.memory.cache
    assert cache is not None
    left = cache.index._left_by_session
    return tuple([
        (session, name, tuple([(segment.kvp_rank, segment.first, bytes(segment.keys)) for segment in segments]))
        for session, (name, segments) in left.items()
    ])  # fmt: skip
