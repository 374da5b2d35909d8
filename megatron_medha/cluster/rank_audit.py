"""A check that every rank's own books of KV agree with the scheduler's, after every step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_medha.cluster.messages import StepDone
from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduler import Scheduler
from megatron_medha.engine.kv_audit import KVAudit

_log = logging.getLogger(__name__)

_REPORT_INTERVAL = 10_000  # checked steps


class RankAudit:
    """Stops the engine (AssertionError) where a rank holds other blocks, or other requests, than it should.

    An Observer of the scheduler's side through watch(); the runtime tells it of the ranks' side.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._book: KVAudit | None = None
        self._expected: dict[int, list[int]] = {}        # blocks, by batch and KVP index
        self._num_known: dict[int, list[int]] = {}       # requests, by batch and KVP index
        self._num_unanswered: dict[int, int] = {}
        self._num_answers = 0
        self._num_steps = 0

    def watch(self, scheduler: Scheduler) -> RankAudit:
        """For Engine(watchers=...)."""
        self._book = KVAudit(scheduler)
        return self

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        assert self._book is not None
        self._book.check()

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        assert self._book is not None
        self._book.check()
        self._expected[batch.batch_id] = [self._book.num_told_blocks(kvp) for kvp in range(self._layout.kvp)]

    def submitted(self, batch_id: int, num_known: list[int]) -> None:
        """The batch goes out; num_known: requests that the ranks of each KVP index know with it."""
        self._num_known[batch_id] = num_known
        self._num_unanswered[batch_id] = self._layout.kvp * self._layout.spp

    def answered(self, done: StepDone) -> None:
        """A rank has done a step."""
        kvp = self._layout.coord_of(done.rank).kvp
        expected = (self._num_known[done.batch_id][kvp], self._expected[done.batch_id][kvp])
        assert done.held == expected, (
            f"batch {done.batch_id}: rank {done.rank} holds (requests, blocks) {done.held}, "
            f"the scheduler says {expected}"
        )
        self._num_answers += 1
        self._num_unanswered[done.batch_id] -= 1
        if not self._num_unanswered[done.batch_id]:
            for books in (self._expected, self._num_known, self._num_unanswered):
                del books[done.batch_id]
            self._num_steps += 1
            if self._num_steps % _REPORT_INTERVAL == 0:
                self.report()

    def clear(self) -> None:
        """The ranks are gone; nothing in flight will be answered."""
        self._expected.clear()
        self._num_known.clear()
        self._num_unanswered.clear()

    def report(self) -> None:
        """Say how much has been found right."""
        num_checks = self._book.num_checks if self._book is not None else 0
        _log.info(
            "kv_audit num_steps=%d num_rank_answers=%d num_scheduler_checks=%d",
            self._num_steps, self._num_answers, num_checks,
        )  # fmt: skip
