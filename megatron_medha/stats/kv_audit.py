"""A check of the KV accounting after every event and every batch: each block is free, or owned by one sequence."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.scheduling.scheduler import Scheduler


class KVAudit:
    """An Observer that stops the engine (AssertionError) at the first block that is lost or owned twice.

    For tests and soaks: each check walks over everything that is owned.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.num_checks = 0

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        self.check()

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self.check()

    def check(self) -> None:
        """Of every pool, now."""
        memory = self._scheduler.memory
        runs: list[list[tuple[int, int, str]]] = [
            [(start, count, "nobody") for start, count in pool.free_extents] for pool in memory.pools
        ]
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
        self.num_checks += 1
