"""Checks of the KV accounting for tests and soaks: of the scheduler's pools, and of what each rank has been sent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from megatron_medha.cluster.messages import HeldKV
from megatron_medha.core.batch import Batch, Completed, Event, Output, RanksLost
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import KVOp, is_for
from megatron_medha.core.kv.prefix_cache import PrefixCache
from megatron_medha.core.kv.sequence import Sequence as KVSequence
from megatron_medha.core.scheduling.scheduler import Scheduler

_log = logging.getLogger(__name__)

_REPORT_INTERVAL = 10_000  # completed batches


class SentBlocks:
    """The blocks of each request on the ranks of one KVP index, from the steps alone."""

    def __init__(self, kvp_rank: int) -> None:
        self._kvp_rank = kvp_rank
        self.extents: dict[str, list[Extent]] = {}

    def note(self, released: Iterable[str], kv_ops: Iterable[KVOp]) -> HeldKV:
        """Add a step; what these ranks hold with it."""
        for request_id in released:
            self.extents.pop(request_id, None)
        for op in kv_ops:
            if not is_for(op, self._kvp_rank):
                continue
            if op.kind == "append":
                self.extents.setdefault(op.request_id, []).extend(op.extents)
            elif op.kind == "drop" and op.request_id in self.extents:
                self.extents[op.request_id].clear()
        sums = [_sums(extents) for extents in self.extents.values()]
        return HeldKV(len(sums), sum(count for count, _ in sums), sum(numbers for _, numbers in sums))


class KVAudit:
    """An Observer that stops the engine (AssertionError) at the first mismatch.

    After every event and batch each block is free, cached, or owned by one sequence. What the batches have sent of each
    owner is what it has. What each rank holds after each of its steps is what it was sent. Each check walks over
    everything that is owned.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        memory = scheduler.memory
        self._scheduler = scheduler
        self._sent = [SentBlocks(rank) for rank in range(memory.kvp)]
        self._expected: dict[int, list[HeldKV]] = {}  # by batch and KVP index
        self._num_answers = 0
        self._num_steps = 0

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        check_pools(self._scheduler.memory)
        if isinstance(event, Completed):
            self._expected.pop(event.batch_id, None)
            self._num_steps += 1
            if self._num_steps % _REPORT_INTERVAL == 0:
                self.report()
        elif isinstance(event, RanksLost):
            self._expected.clear()
            self._sent = [SentBlocks(rank) for rank in range(len(self._sent))]

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        check_pools(self._scheduler.memory)
        self._expected[batch.batch_id] = [sent.note(batch.released, batch.kv_ops) for sent in self._sent]
        self._check_sent()

    def answered(self, batch_id: int, kvp_rank: int, audit_counts: HeldKV | None) -> None:
        """A rank has done its part of a batch."""
        expected = self._expected[batch_id][kvp_rank]
        assert audit_counts == expected, (
            f"batch {batch_id}: a rank of KVP index {kvp_rank} has {audit_counts}, expected {expected}"
        )
        self._num_answers += 1

    def report(self) -> None:
        """Log how much has been checked."""
        _log.info("kv_audit num_steps=%d num_rank_answers=%d", self._num_steps, self._num_answers)

    def _check_sent(self) -> None:
        """All that a sequence takes when it begins is sent with that batch, later blocks with its next chunk."""
        for request_id, seq in self._scheduler.memory.owners.items():
            table = seq.block_table
            for shard in table.shards:
                rank = shard.kvp_rank
                unsent = [extent for op in table.unsent if op.kvp_rank == rank for extent in op.extents]
                sent = _sums([*self._sent[rank].extents.get(request_id, ()), *unsent])
                owned = _sums(shard.extents)
                assert sent == owned, (
                    f"{request_id} owns on KVP rank {rank} (blocks, sum of their numbers) {owned}; "
                    f"sent or about to be sent are {sent}"
                )


def check_pools(memory: KVMemory) -> None:
    """AssertionError where a block is lost or owned twice."""
    if memory.cache is not None:
        _check_cache(memory.cache, memory.owners.values())
        return
    runs = [[(start, count, "nobody") for start, count in pool.free_extents] for pool in memory.pools]
    for request_id, seq in memory.owners.items():
        for shard in seq.block_table.shards:
            runs[shard.kvp_rank].extend((start, count, request_id) for start, count in shard.extents)
    for kvp_rank, of_pool in enumerate(runs):
        end = 0
        for start, count, owner in sorted(of_pool):
            assert start >= end, f"KVP rank {kvp_rank}: block {start} of {owner} has another owner too"
            assert start == end, f"KVP rank {kvp_rank}: blocks [{end}, {start}) are lost"
            end = start + count
        assert end == memory.num_blocks, f"KVP rank {kvp_rank}: blocks [{end}, {memory.num_blocks}) are lost"


def _check_cache(cache: PrefixCache, owners: Iterable[KVSequence]) -> None:
    tables = [
        (shard, holding)
        for seq in owners
        for shard, holding in zip(seq.block_table.shards, seq.block_table.holdings, strict=True)
    ]
    owned = [(0, shard.kvp_rank, cache.index.own_extents(holding, shard.extents)) for shard, holding in tables]
    check(cache.index, [holding for _, holding in tables], owned)


def _sums(extents: Iterable[Extent]) -> tuple[int, int]:
    """How many blocks, and the sum of their numbers."""
    num_blocks = numbers = 0
    for first, count in extents:
        num_blocks += count
        numbers += count * (2 * first + count - 1) // 2
    return num_blocks, numbers
