"""The state of a scheduler at one moment, from one walk over its sequences, for all who want to know it."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol, runtime_checkable

from megatron_medha.core.batch import Aborted, Arrived, Batch, Event, Output
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.ports import EngineLoad
from megatron_medha.core.scheduling.scheduler import Scheduler

INTERVAL_S = 0.1
COST_SHARE = 20  # snapshots and their readers take a twentieth of the engine's time at most, however long the queue


class PendingWork(NamedTuple):
    """What a scheduler has before it, by its cost model."""

    prefill_s: float      # of the prompts it has
    decode_share: float   # of each step's time budget that decodes take


NO_LOAD, NO_WORK = EngineLoad(), PendingWork(0.0, 0.0)


class Snapshot(NamedTuple):
    """Load and work may be kept; the sequences go on to change, and belong to the scheduler's thread."""

    scheduler: Scheduler
    load: EngineLoad
    work: PendingWork
    prefills: list[Sequence]
    decodes: list[Sequence]
    arrived: tuple[str, ...] = ()  # requests that have come, or were aborted, since the snapshot before


@runtime_checkable
class SnapshotReader(Protocol):
    """An Observer that is also shown snapshots."""

    def read(self, snapshot: Snapshot, now_s: float) -> None:
        """A snapshot was taken; on the scheduler's thread."""


def take_snapshot(scheduler: Scheduler, arrived: tuple[str, ...] = ()) -> Snapshot:
    """Counts and predictions; O(live sequences)."""
    prefills: list[Sequence] = []
    decodes: list[Sequence] = []
    num_waiting, num_waiting_tokens, prefill_s, context = 0, 0, 0.0, 0
    for seq in scheduler.sequences:
        status = seq.status
        if status is Status.DECODING:
            decodes.append(seq)
            context += seq.num_known_tokens
        elif status is Status.WAITING or status is Status.PREFILLING:
            prefills.append(seq)
            num_waiting += status is Status.WAITING
            num_waiting_tokens += seq.num_unscheduled_tokens
            prefill_s += seq.remaining_work_s
    memory = scheduler.memory
    load = EngineLoad(
        num_waiting=num_waiting,
        num_prefilling=len(prefills) - num_waiting,
        num_decoding=len(decodes),
        num_free_blocks=memory.num_free_blocks,
        num_cached_blocks=memory.num_cached_blocks,
        num_blocks=memory.num_blocks * memory.kvp,
        num_waiting_tokens=num_waiting_tokens,
    )
    decode_s = 0.0
    if decodes:
        num_decodes = -(-len(decodes) // memory.kvp)
        decode_s = scheduler.cost.linear_s(num_decodes, num_decodes)
        decode_s += scheduler.cost.decode_attention_s(context // memory.kvp)
    work = PendingWork(prefill_s, decode_s / scheduler.config.step_budget_s)
    return Snapshot(scheduler, load, work, prefills, decodes, arrived)


class SnapshotObserver:
    """Takes a snapshot now and then, and whenever the scheduler runs out of work; the last of the observers."""

    def __init__(self, scheduler: Scheduler, readers: Items[SnapshotReader]) -> None:
        """The first snapshot is taken at once."""
        self._scheduler = scheduler
        self._readers = tuple(readers)
        self._arrived: list[str] = []
        self._next_s = 0.0
        self._take(0.0)

    def handled(self, event: Event, outputs: Items[Output], now_s: float) -> None:
        """See Observer."""
        match event:
            case Arrived():
                self._arrived.append(event.request.request_id)
            case Aborted():  # it may have been on its way still
                self._arrived.append(event.request_id)
            case _:
                pass
        # While batches are formed, snapshots are taken there, when what is in flight is known.
        if now_s >= self._next_s + INTERVAL_S or not self._scheduler.num_sequences:
            self._take(now_s)

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        if now_s >= self._next_s:
            self._take(now_s)

    def _take(self, now_s: float) -> None:
        began_s = time.perf_counter()
        snapshot = take_snapshot(self._scheduler, tuple(self._arrived))
        self._arrived.clear()
        for reader in self._readers:
            reader.read(snapshot, now_s)
        cost_s = time.perf_counter() - began_s
        self._next_s = now_s + max(INTERVAL_S, COST_SHARE * cost_s)
