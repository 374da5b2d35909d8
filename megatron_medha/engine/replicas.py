"""Several independent replicas as one engine: each its own scheduler, thread and ranks; requests are placed here."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.ports import (
    Delivery,
    EngineFacts,
    EngineLoad,
    EnginePhase,
    EngineStatus,
    ErrorDelivery,
    ReplicaState,
    Sink,
)
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.placement import choose_replica
from megatron_medha.engine.engine import Engine

# The phase of all together is the first of these that any replica is in: one that is up serves for all.
_PRECEDENCE = (
    EnginePhase.LOADING, EnginePhase.READY, EnginePhase.RECOVERING, EnginePhase.FAILED, EnginePhase.STOPPED,
)  # fmt: skip


class Replicas:
    """Implements EngineClient over several engines."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._lock = threading.Lock()  # between requests that are placed at the same time
        self._places: dict[str, Engine] = {}  # of live requests
        self._sink: Sink | None = None
        self._has_been_up = False

    @property
    def status(self) -> EngineStatus:
        """See EngineClient. Until all have been up, one that fails fails all; later the others serve on."""
        statuses = [engine.status for engine in self._engines]
        phases = [status.phase for status in statuses]
        if EnginePhase.FAILED in phases and not self._has_been_up:
            phase = EnginePhase.FAILED
        else:
            phase = next(phase for phase in _PRECEDENCE if phase in phases)
        self._has_been_up |= phase is EnginePhase.READY
        return EngineStatus(
            phase,
            _detail(statuses, phase),
            min((status.fraction for status in statuses if status.phase is phase), default=0.0),
            sum(status.num_failures for status in statuses),
            sum(status.num_recoveries for status in statuses),
        )

    def on_status(self, on_change: Callable[[], None]) -> None:
        """See EngineClient; called on the threads of all replicas."""
        for engine in self._engines:
            engine.on_status(on_change)

    @property
    def facts(self) -> EngineFacts | None:
        """See EngineClient: what holds on every replica."""
        facts = [engine.facts for engine in self._engines]
        first = facts[0]
        known = [entry for entry in facts if entry is not None]
        if first is None or len(known) < len(facts):
            return None
        return replace(
            first,
            num_blocks=min(entry.num_blocks for entry in known),
            max_request_tokens=min(entry.max_request_tokens for entry in known),
            device=f"{len(known)} replicas of {first.device}",
        )

    @property
    def load(self) -> EngineLoad:
        """See EngineClient: of all replicas together."""
        loads = [engine.load for engine in self._engines]
        names = [count.name for count in fields(EngineLoad)]
        return EngineLoad(**{name: sum(getattr(load, name) for load in loads) for name in names})

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """See EngineClient."""
        return tuple(ReplicaState(engine.status, engine.load) for engine in self._engines)

    def now_s(self) -> float:
        """See EngineClient."""
        return self._engines[0].now_s()

    def start(self, sink: Sink) -> None:
        """See EngineClient; called on the threads of all replicas."""
        self._sink = sink
        for engine in self._engines:
            engine.start(self._deliver)

    def submit(
        self, request: Request, token_ids: array[int], sampling: Sampling, keys: GranuleKeys | None = None
    ) -> None:
        """See EngineClient."""
        with self._lock:
            engine = self._place(request)
            self._places[request.request_id] = engine
            engine.submit(request, token_ids, sampling, keys)

    def abort(self, request_id: str) -> None:
        """See EngineClient."""
        engine = self._places.pop(request_id, None)
        if engine is not None:  # None: it has ended
            engine.abort(request_id)

    def stop(self, timeout_s: float) -> None:
        """See EngineClient; all at the same time."""
        threads = [threading.Thread(target=engine.stop, args=(timeout_s,)) for engine in self._engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _place(self, request: Request) -> Engine:
        alive = [
            engine for engine in self._engines
            if engine.status.phase in (EnginePhase.READY, EnginePhase.RECOVERING)
        ] or self._engines  # that say themselves why they take nothing
        return alive[choose_replica([engine.load_for(request) for engine in alive])]

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        assert self._sink is not None
        for delivery in deliveries:
            if isinstance(delivery, ErrorDelivery) or delivery.finish_reason is not None:
                self._places.pop(delivery.request_id, None)
        self._sink(deliveries)


def _detail(statuses: Sequence[EngineStatus], phase: EnginePhase) -> str:
    """Words of the first replica in this phase; and of those that are worse off."""
    words = [next((status.detail for status in statuses if status.phase is phase), "")]
    for index, status in enumerate(statuses):
        if phase is EnginePhase.READY and status.phase is not phase:
            words.append(f"replica {index} is {status.phase.value}: {status.detail}")
    return "; ".join(words)
