"""A server over the real scheduler and a simulated replica, with an audit of its KV memory after every event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware
from megatron_medha.core.engine_costs import EngineCosts
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduler import Scheduler
from megatron_medha.engine.engine import Engine
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.server.journal import Journal
from megatron_medha.server.metrics import Metrics
from megatron_medha.sim.live import live_engine

WAIT_S = 20.0
SHAPE = ModelShape(
    name="sim", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=300, max_context_len=4096,
)  # fmt: skip
FAST = Hardware(name="fast", flops_per_s=1e15, memory_bytes_per_s=1e13, step_overhead_s=1e-3, layer_overhead_s=0.0)
NO_LAUNCHES = EngineCosts(
    name="fast", step_s=1e-3, sequence_s=0.0, stage_entry_s=0.0, layer_launch_s=0.0, request_s=0.0
)


class Audit:
    """An observer that checks the accounting, and can stop the engine at a moment the test waits for."""

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.released: list[str] = []   # what ranks were told to forget
        self.num_checks = 0
        self._changed = threading.Condition()
        self._stop_at: Callable[[Scheduler], bool] | None = None
        self._is_stopped = False

    def watch(self, scheduler: Scheduler) -> Audit:
        """For Engine(watchers=...)."""
        self.scheduler = scheduler
        return self

    def handled(self, event: object, outputs: object, now_s: float) -> None:
        """See Observer."""
        self._check()

    def scheduled(self, batch: Any, now_s: float) -> None:
        """See Observer."""
        self.released += batch.released
        self._check()

    def stop_at(self, is_moment: Callable[[Scheduler], bool]) -> None:
        """The engine stands still when this becomes true, until go_on()."""
        with self._changed:
            self._stop_at = is_moment

    def wait_until_stopped(self) -> None:
        """Until that moment has come."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_stopped, WAIT_S), "the moment never came"

    def go_on(self) -> None:
        """The engine runs again, and stops no more."""
        with self._changed:
            self._stop_at, self._is_stopped = None, False
            self._changed.notify_all()

    def wait_for(self, is_true: Callable[[Scheduler], bool]) -> None:
        """Until this is true of the scheduler, looked at after every event."""
        assert self.scheduler is not None
        scheduler = self.scheduler
        with self._changed:
            assert self._changed.wait_for(lambda: is_true(scheduler), WAIT_S), "it never became true"

    def _check(self) -> None:
        assert self.scheduler is not None
        memory = self.scheduler.memory
        owned: dict[int, list[int]] = {rank: [] for rank in range(memory.kvp)}
        for seq in memory.owners.values():
            for shard in seq.block_table.shards:
                for extent in shard.extents:
                    owned[shard.kvp_rank] += range(extent.first_block, extent.first_block + extent.num_blocks)
        for rank, blocks in owned.items():
            assert len(set(blocks)) == len(blocks), "a block has two owners"
            assert len(blocks) + memory.pools[rank].num_free_blocks == memory.num_blocks, "blocks are lost"
        self.num_checks += 1
        with self._changed:
            if self._stop_at is not None and not self._is_stopped and self._stop_at(self.scheduler):
                self._is_stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_stopped, WAIT_S)


class LiveEngine:
    """The engine, with what it is told to abort on record."""

    def __init__(self, *, num_blocks: int = 600, metrics: Metrics | None = None, **scheduler: Any) -> None:
        self.audit = Audit()
        self.journal = Journal(metrics or Metrics())
        self._aborted: list[str] = []
        self._changed = threading.Condition()
        self.engine: Engine = live_engine(
            setup=SchedulerSetup(
                config=SchedulerConfig(**{"max_batch_tokens": 64, "max_num_sequences": 32, **scheduler}),
                shape=SHAPE,
                hardware=FAST,
                engine=NO_LAUNCHES,
                layout=ParallelLayout(),
                num_blocks=num_blocks,
                block_size=16,
            ),
            observers=(self.journal.metrics,),
            watchers=(self.journal.watch, self.audit.watch),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def abort(self, request_id: str) -> None:
        """As the engine's."""
        self.engine.abort(request_id)
        with self._changed:
            self._aborted.append(request_id)
            self._changed.notify_all()

    def wait_for_aborts(self, num_aborts: int) -> None:
        """Until the server has asked for so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._aborted) >= num_aborts, WAIT_S)

    def wait_until_idle(self) -> None:
        """Until no request is alive; then every block must be free."""
        self.audit.wait_for(lambda scheduler: not scheduler.num_sequences)
        assert self.audit.scheduler is not None
        memory = self.audit.scheduler.memory
        assert memory.num_free_blocks == memory.num_blocks and not memory.owners
