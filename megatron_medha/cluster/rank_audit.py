"""A check that every rank's own books of KV agree with the scheduler's, after every step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from megatron_medha.cluster.messages import StepDone
from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.stats.kv_audit import KVAudit

_log = logging.getLogger(__name__)

_REPORT_INTERVAL = 10_000  # checked steps


class RankAudit:
    """Stops the engine (AssertionError) where a rank holds other blocks, or other requests, than it should.

    An Observer of the scheduler's side through watch(); the runtime tells it of the ranks' side. What ranks have been
    told of each request is written down here from the batches alone. For all who own blocks it must be what they own,
    and each rank's own book (worker/kv_ledger.py) must come to the same sums. A request that lost its KV stays in all
    books with its old blocks until its first chunk comes again: ranks are not told, as they do not read them.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._scheduler: Scheduler | None = None
        self._pools: KVAudit | None = None
        self._told: list[dict[str, list[Extent]]] = [{} for _ in range(layout.kvp)]
        self._expected: dict[int, list[tuple[int, int]]] = {}  # requests and blocks, by batch and KVP index
        self._num_unanswered: dict[int, int] = {}
        self._num_answers = 0
        self._num_steps = 0

    def watch(self, scheduler: Scheduler) -> RankAudit:
        """For Engine(watchers=...)."""
        self._scheduler, self._pools = scheduler, KVAudit(scheduler)
        return self

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        assert self._pools is not None
        self._pools.check()

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        assert self._pools is not None
        self._pools.check()
        for told in self._told:
            for request_id in batch.released:
                told.pop(request_id, None)
        assert self._scheduler is not None
        for chunk in batch.chunks:
            seq = self._scheduler.sequence(chunk.request_id)
            assert seq is not None, f"batch {batch.batch_id} has a chunk of {chunk.request_id}, which is unknown"
            told = self._told[chunk.kvp_ranks[-1]]
            if chunk.start == seq.block_table.shards[len(chunk.kvp_ranks) - 1].start:
                told[chunk.request_id] = []
            told[chunk.request_id].extend(chunk.new_extents)
        self._check_told(self._scheduler)

    def submitted(self, batch_id: int, num_known: Iterable[int]) -> None:
        """The batch goes out; num_known: requests that the ranks of each KVP index know with it."""
        num_blocks = (sum(map(_num_blocks, told.values())) for told in self._told)
        self._expected[batch_id] = list(zip(num_known, num_blocks, strict=True))
        self._num_unanswered[batch_id] = self._layout.kvp * self._layout.spp

    def answered(self, done: StepDone) -> None:
        """A rank has done a step."""
        expected = self._expected[done.batch_id][self._layout.coord_of(done.rank).kvp]
        assert done.held == expected, (
            f"batch {done.batch_id}: rank {done.rank} holds (requests, blocks) {done.held}, "
            f"the scheduler says {expected}"
        )
        self._num_answers += 1
        self._num_unanswered[done.batch_id] -= 1
        if not self._num_unanswered[done.batch_id]:
            del self._expected[done.batch_id], self._num_unanswered[done.batch_id]
            self._num_steps += 1
            if self._num_steps % _REPORT_INTERVAL == 0:
                self.report()

    def clear(self) -> None:
        """The ranks are gone; nothing in flight will be answered."""
        self._expected.clear()
        self._num_unanswered.clear()
        for told in self._told:
            told.clear()

    def report(self) -> None:
        """Say how much has been found right."""
        num_checks = self._pools.num_checks if self._pools is not None else 0
        _log.info(
            "kv_audit num_steps=%d num_rank_answers=%d num_scheduler_checks=%d",
            self._num_steps, self._num_answers, num_checks,
        )  # fmt: skip

    def _check_told(self, scheduler: Scheduler) -> None:
        """A shard is told of with the first chunk that is written to it, later blocks with the chunk after."""
        for request_id, seq in scheduler.memory.owners.items():
            table = seq.block_table
            for shard in table.shards:
                if seq.num_scheduled_tokens <= shard.start:
                    continue
                told = _num_blocks(self._told[shard.kvp_rank][request_id])
                untold = sum(count for _, count in table.unsent_extents) if shard is table.shards[-1] else 0
                assert told == shard.num_blocks - untold, (
                    f"{request_id} owns {shard.num_blocks} blocks on KVP rank {shard.kvp_rank}, {untold} of them new; "
                    f"its ranks were told of {told}"
                )


def _num_blocks(extents: Iterable[Extent]) -> int:
    return sum(count for _, count in extents)
