"""A simulated replica in wall time behind the real API server: the whole server can be tried without a model."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path

from megatron_medha.core.batch import Aborted, Batch, Completed, Event, Output
from megatron_medha.engine.engine import Engine, EngineBackend, ObserverFactory
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.request_states import RequestStates, TokenSample
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.status_board import StatusBoard
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.sim.sim_world import SimRuntime
from megatron_medha.sim.system import pipeline_for
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.workload.request_feed import OpenLoop


class LiveRuntime(SimRuntime):
    """A simulated replica on the wall clock, whose requests come through an inbox.

    Tokens count up from the prompt's last. truth: what a batch takes on every stage.
    """

    def __init__(
        self,
        inbox: Inbox,
        streams: RequestStates,
        truth: Callable[[Batch], StepTimes],
        pipeline: Pipeline,
        vocab_size: int,
    ) -> None:
        super().__init__(OpenLoop(()), pipeline)
        self._inbox = inbox
        self._streams = streams
        self._truth = truth
        self._vocab_size = vocab_size
        self._events: deque[Event | None] = deque()
        self._in_flight: dict[int, Batch] = {}
        self._last_tokens: dict[str, int] = {}
        self._sampled: dict[str, TokenSample] = {}

    def now_s(self) -> float:
        """See Runtime."""
        return time.monotonic()

    def next_event(self) -> Event | None:
        """See Runtime."""
        self._streams.flush()
        while not self._events:
            wait_s = max(0.0, self.next_event_s - time.monotonic()) if self.next_event_s < inf else None
            if select.select([self._inbox], [], [], wait_s)[0]:
                self._events.extend(self._inbox.drain())
            # One of each kind at a time: clients that never pause do not hold up steps, nor the other way round.
            if self.next_event_s <= time.monotonic():
                self._events.append(super().next_event())
        event = self._events.popleft()
        if isinstance(event, Completed):
            event = self._sample(event)
        elif isinstance(event, Aborted):
            self._streams.drop(event.request_id)
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        self._now_s = time.monotonic()
        return super().has_room()

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        for request_id in batch.released:
            self._last_tokens.pop(request_id, None)
        self._in_flight[batch.batch_id] = batch
        times, self._now_s = self._truth(batch), time.monotonic()
        self.enter(batch, times)

    def emit(self, output: Output) -> None:
        """See Runtime."""
        self._streams.emit(output, self._sampled)

    def _sample(self, completed: Completed) -> Completed:
        self._sampled = {}
        stopped: list[str] = []
        for chunk in self._in_flight.pop(completed.batch_id).chunks:
            stream = self._streams.get(chunk.request_id)
            if chunk.samples_token and stream is not None:
                last = self._last_tokens.get(chunk.request_id, stream.token_ids[-1])
                token_id = self._last_tokens[chunk.request_id] = (last + 1) % self._vocab_size
                self._sampled[chunk.request_id] = TokenSample(token_id)
                if token_id in stream.sampling.stop_token_ids:
                    stopped.append(chunk.request_id)
        return completed._replace(stopped=tuple(stopped), filled_keys=self._streams.filled_keys(self._sampled))


def live_engine(
    *,
    setup: SchedulerSetup,
    stop_token_ids: tuple[int, ...] = (),
    watchers: tuple[ObserverFactory, ...] = (),
    decision_log: Path | None = None,
) -> Engine:
    """An engine whose world is simulated in wall time: one replica, in the layout and with the costs of `setup`."""

    @contextmanager
    def open_backend(inbox: Inbox, streams: RequestStates, board: StatusBoard) -> Iterator[EngineBackend | None]:
        layout, name = setup.layout, setup.hardware.name
        truth = Truth(setup.cluster_cost, setup.shard_tokens, TruthConfig(), seed=0)
        yield EngineBackend(
            runtime=LiveRuntime(inbox, streams, truth, pipeline_for(setup), setup.shape.vocab_size),
            setup=setup,
            stop_token_ids=stop_token_ids,
            device=f"simulated {name}" if layout.world_size == 1 else f"{layout.world_size} simulated {name}",
        )

    return Engine(open_backend, watchers=watchers, decision_log=decision_log)
