"""A server over the real scheduler and a simulated replica, with an audit of its KV memory after every event."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_medha.cluster.kv_audit import check_pools
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.engine import Engine
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.request_log import RequestLog
from megatron_medha.sim.live import live_engine

WAIT_S = 120.0  # for what comes at once unless the machine is busy
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
        self.released: list[str] = []   # what ranks have to forget
        self.num_checks = 0
        self._changed = threading.Condition()
        self._stop_at: Callable[[Scheduler], bool] | None = None
        self._is_stopped = False
        self._awaited: Callable[[Scheduler], bool] | None = None

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
        """The engine stands still when this becomes true, until go_on(); from where it stands now, if it does."""
        with self._changed:
            self._stop_at, self._is_stopped = is_moment, False
            self._changed.notify_all()

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
        """Until this has been true of the scheduler, looked at now and after every event, however soon it passes."""
        with self._changed:
            self._awaited = is_true
            self._look()
            assert self._changed.wait_for(lambda: self._awaited is None, WAIT_S), "it never became true"

    def _look(self) -> None:
        assert self.scheduler is not None
        if self._awaited is not None and self._awaited(self.scheduler):
            self._awaited = None

    def _check(self) -> None:
        assert self.scheduler is not None
        check_pools(self.scheduler.memory)
        self.num_checks += 1
        with self._changed:
            self._look()
            if self._stop_at is not None and not self._is_stopped and self._stop_at(self.scheduler):
                self._is_stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_stopped, WAIT_S)


class LiveEngine:
    """The engine, with a record of what it began and aborted.

    step_s: what a step takes, of the wall clock; long for what must still run when a busy machine comes to look.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 600,
        step_s: float = 1e-3,
        metrics: Metrics | None = None,
        kv: KVConfig = NO_PREFIX_CACHE,
        decision_log: Path | None = None,
        **scheduler: Any,
    ) -> None:
        self.audit = Audit()
        self.journal = RequestLog(metrics or Metrics())
        self._submitted: list[str] = []
        self._aborted: list[str] = []
        self._changed = threading.Condition()
        self.engine: Engine = live_engine(
            setup=SchedulerSetup(
                config=SchedulerConfig(**{"max_batch_tokens": 64, "max_num_sequences": 32, **scheduler}),
                shape=SHAPE,
                hardware=FAST,
                engine=replace(NO_LAUNCHES, step_s=step_s),
                layout=ParallelLayout(),
                num_blocks=num_blocks,
                block_size=16,
                kv=kv,
            ),
            watchers=(self.journal.watch, self.audit.watch),
            decision_log=decision_log,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(
        self, request: Request, token_ids: array[int], sampling: Sampling, keys: GranuleKeys | None = None
    ) -> None:
        """As the engine's."""
        self.engine.submit(request, token_ids, sampling, keys)
        with self._changed:
            self._submitted.append(request.request_id)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """As the engine's."""
        self.engine.abort(request_id)
        with self._changed:
            self._aborted.append(request_id)
            self._changed.notify_all()

    def wait_for_submitted(self, num_requests: int) -> None:
        """Until the server has handed so many over; the scheduler hears of them with its next event."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._submitted) >= num_requests, WAIT_S)

    def wait_for_aborts(self, num_aborts: int) -> None:
        """Until the server has asked for so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._aborted) >= num_aborts, WAIT_S)

    def wait_until_idle(self) -> None:
        """Until no request is alive and every block is free."""

        def is_idle(scheduler: Scheduler) -> bool:
            memory = scheduler.memory
            return not (scheduler.num_sequences or memory.owners) and memory.num_free_blocks == memory.num_blocks

        self.audit.wait_for(is_idle)
