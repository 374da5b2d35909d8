"""The engine as the server sees it: a thread that runs the loop in a world, real or simulated."""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_medha.core.batch import Aborted, Arrived
from megatron_medha.core.errors import MedhaError
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.loop import serve
from megatron_medha.core.ports import (
    EngineFacts,
    EngineLoad,
    EnginePhase,
    EngineStatus,
    ErrorDelivery,
    Observer,
    ReplicaState,
    Sink,
    WakingRuntime,
)
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.placement import ReplicaLoad
from megatron_medha.core.scheduling.policies import is_user_policy
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestState, RequestStates
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.status_board import StatusBoard
from megatron_medha.stats.decision_log import DecisionLog
from megatron_medha.stats.snapshot import NO_LOAD, NO_WORK, Snapshot, SnapshotObserver, SnapshotReader

_log = logging.getLogger(__name__)


ObserverFactory = Callable[[Scheduler], Observer]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBackend:
    """A world that is up: what runs batches, and what a scheduler for it is made from."""

    runtime: WakingRuntime
    setup: SchedulerSetup
    stop_token_ids: tuple[int, ...]
    device: str
    watchers: tuple[ObserverFactory, ...] = ()  # of its own


# Brings a world up when entered, writing on the board meanwhile, and takes it down when left. Entering gives None if
# the inbox asked to stop first, and raises MedhaError if the world cannot come up.
OpenBackend = Callable[[Inbox, RequestStates, StatusBoard], AbstractContextManager[EngineBackend | None]]


class Engine:
    """Runs one scheduler over one world. Implements EngineClient."""

    def __init__(
        self,
        open_backend: OpenBackend,
        *,
        watchers: tuple[ObserverFactory, ...] = (),
        decision_log: Path | None = None,
    ) -> None:
        """watchers: make observers that look at the scheduler itself, on the engine's thread."""
        self._open_backend = open_backend
        self._watchers = watchers
        self._decision_log = decision_log
        self._board = StatusBoard()
        self._facts: EngineFacts | None = None
        self._load = NO_LOAD
        self._work = NO_WORK
        self._unseen: dict[str, float] = {}  # predicted work by request id, of requests that self._work does not know
        self._scheduler: Scheduler | None = None
        self._inbox = Inbox()
        self._lock = threading.Lock()  # between a request coming in and the engine ending
        self._sink: Sink | None = None
        self._streams: RequestStates | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def status(self) -> EngineStatus:
        """See EngineClient."""
        return self._board.status

    def on_status(self, on_change: Callable[[], None]) -> None:
        """See EngineClient."""
        self._board.subscribe(on_change)

    @property
    def facts(self) -> EngineFacts | None:
        """See EngineClient."""
        return self._facts

    @property
    def load(self) -> EngineLoad:
        """See EngineClient; a few tenths of a second behind at most."""
        return self._load

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """See EngineClient."""
        return (ReplicaState(self.status, self.load),)

    def load_for(self, request: Request) -> ReplicaLoad:
        """What a request would find before it, and in the prefix cache; from any thread; as old as `load`."""
        scheduler, work = self._scheduler, self._work
        if scheduler is None:
            return ReplicaLoad(False, 0.0, 0.0, 0.0)
        return ReplicaLoad(
            is_ready=self.status.phase is EnginePhase.READY,
            remaining_prefill_s=work.prefill_s + sum(list(self._unseen.values())),
            prompt_s=_work_s(scheduler, request),
            decode_share=work.decode_share,
        )

    def now_s(self) -> float:
        """See EngineClient."""
        return time.monotonic()

    def start(self, sink: Sink) -> None:
        """See EngineClient."""
        self._sink = sink
        self._streams = RequestStates(sink)
        self._thread.start()

    def submit(
        self, request: Request, token_ids: array[int], sampling: Sampling, keys: GranuleKeys | None = None
    ) -> None:
        """See EngineClient."""
        assert self._streams is not None and self._sink is not None, "submit() before start()"
        with self._lock:
            phase = self.status.phase
            if phase in (EnginePhase.READY, EnginePhase.RECOVERING):
                self._streams.add(request.request_id, RequestState(token_ids, sampling, keys))
                assert self._scheduler is not None, "it takes requests"
                self._unseen[request.request_id] = _work_s(self._scheduler, request)
                self._inbox.put(Arrived(request))
                return
        self._sink([ErrorDelivery(request.request_id, f"the engine is {phase.value}", False)])

    def abort(self, request_id: str) -> None:
        """See EngineClient."""
        self._inbox.put(Aborted(request_id))

    def stop(self, timeout_s: float) -> None:
        """See EngineClient."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(timeout_s)

    # ---- on the engine's thread ----

    def _run(self) -> None:
        assert self._streams is not None
        try:
            with self._open_backend(self._inbox, self._streams, self._board) as world:
                if world is not None:
                    self._serve(world, self._streams)
        except MedhaError as error:
            _log.debug("engine_failed error=%r", str(error))  # the status says it to what runs the engine
            self._end(EnginePhase.FAILED, str(error), f"the engine failed: {error}")
        except BaseException as error:
            _log.exception("engine_failed")
            self._end(EnginePhase.FAILED, repr(error), "the engine failed")
        else:
            self._end(EnginePhase.STOPPED, "", "the server is shutting down")

    def _serve(self, world: EngineBackend, streams: RequestStates) -> None:
        scheduler = self._scheduler = world.setup.build()
        world.runtime.wakes_at_s = scheduler.wakes_at_s
        if is_user_policy(world.setup.config.policy):
            _log.info("user_policy", extra={"fields": {"policy": world.setup.config.policy}})
        watching = [watch(scheduler) for watch in (*world.watchers, *self._watchers)]
        readers = [self, *(observer for observer in watching if isinstance(observer, SnapshotReader))]
        observers: tuple[Observer, ...] = (*watching, SnapshotObserver(scheduler, readers))
        if self._decision_log is not None:
            observers = (*observers, DecisionLog.open(self._decision_log, world.setup.header()))
        kv = world.setup.kv
        self._facts = EngineFacts(
            shape=world.setup.shape,
            num_blocks=world.setup.num_blocks,
            block_size=world.setup.block_size,
            max_request_tokens=scheduler.memory.max_request_tokens,
            stop_token_ids=world.stop_token_ids,
            device=world.device,
            granule_tokens=kv.tokens_per_granule(world.setup.block_size) if kv.prefix_cache else None,
        )
        self._board.show(EnginePhase.READY, world.device, 1.0)
        serve(scheduler, world.runtime, observers)

    def read(self, snapshot: Snapshot, now_s: float) -> None:
        """See SnapshotReader."""
        self._load, self._work = snapshot.load, snapshot.work
        for request_id in snapshot.arrived:
            self._unseen.pop(request_id, None)

    def _end(self, phase: EnginePhase, detail: str, why: str) -> None:
        assert self._streams is not None
        with self._lock:
            self._board.end(phase, detail)
        self._load = NO_LOAD
        self._streams.end_all(why)
        self._board.notify()


def _work_s(scheduler: Scheduler, request: Request) -> float:
    """Predicted time of its prefill, behind what is cached now."""
    return scheduler.predicted_work_s(request.num_prompt_tokens, scheduler.num_cached_tokens(request))
