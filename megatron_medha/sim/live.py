"""A simulated replica in wall time behind the real front: the whole server can be tried without a model."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from pathlib import Path

from megatron_medha.core.batch import Aborted, Batch, Completed, Event, Output
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware, RooflineCost
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.engine.engine import Engine, Watcher, World
from megatron_medha.engine.inbox import Inbox
from megatron_medha.engine.ports import Observer
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.engine.status_board import StatusBoard
from megatron_medha.engine.streams import Sampled, Streams
from megatron_medha.sim.world import true_step_s


class LiveRuntime:
    """A Runtime whose steps take their predicted time on the wall clock; tokens count up from the prompt's last."""

    def __init__(self, inbox: Inbox, streams: Streams, truth: Callable[[Batch], float], vocab_size: int) -> None:
        self._inbox = inbox
        self._streams = streams
        self._truth = truth
        self._vocab_size = vocab_size
        self._events: deque[Event | None] = deque()
        self._due: list[tuple[float, int, Completed, Batch]] = []
        self._last_tokens: dict[str, int] = {}
        self._sampled: dict[str, Sampled] = {}

    def now_s(self) -> float:
        """See Runtime."""
        return time.monotonic()

    def next_event(self) -> Event | None:
        """See Runtime."""
        self._streams.flush()
        while not self._events:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            if select.select([self._inbox], [], [], wait_s)[0]:
                self._events.extend(self._inbox.drain())
            elif self._due:
                _, _, completed, batch = heappop(self._due)
                self._events.append(self._sample(completed, batch))
        event = self._events.popleft()
        if isinstance(event, Aborted):
            self._streams.drop(event.request_id)
        return event

    def has_room(self) -> bool:
        """See Runtime."""
        return not self._due

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        for request_id in batch.released:
            self._last_tokens.pop(request_id, None)
        duration_s = self._truth(batch)
        completed = Completed(batch_id=batch.batch_id, duration_s=duration_s)
        heappush(self._due, (time.monotonic() + duration_s, batch.batch_id, completed, batch))

    def emit(self, output: Output) -> None:
        """See Runtime."""
        self._streams.emit(output, self._sampled)

    def _sample(self, completed: Completed, batch: Batch) -> Completed:
        self._sampled = {}
        stopped: list[str] = []
        for chunk in batch.chunks:
            stream = self._streams.get(chunk.request_id)
            if chunk.samples_token and stream is not None:
                last = self._last_tokens.get(chunk.request_id, stream.token_ids[-1])
                token_id = self._last_tokens[chunk.request_id] = (last + 1) % self._vocab_size
                self._sampled[chunk.request_id] = Sampled(token_id)
                if token_id in stream.sampling.stop_token_ids:
                    stopped.append(chunk.request_id)
        return Completed(batch_id=completed.batch_id, duration_s=completed.duration_s, stopped=tuple(stopped))


def live_engine(
    *,
    shape: ModelShape,
    hardware: Hardware,
    scheduler_config: SchedulerConfig,
    num_blocks: int,
    block_size: int,
    stop_token_ids: tuple[int, ...] = (),
    observers: tuple[Observer, ...] = (),
    watchers: tuple[Watcher, ...] = (),
    decision_log: Path | None = None,
) -> Engine:
    """An engine whose world is simulated in wall time, one replica of one rank."""

    @contextmanager
    def open_world(inbox: Inbox, streams: Streams, board: StatusBoard) -> Iterator[World | None]:
        truth = true_step_s(RooflineCost(shape=shape, hardware=hardware))
        yield World(
            runtime=LiveRuntime(inbox, streams, truth, shape.vocab_size),
            setup=SchedulerSetup(
                config=scheduler_config,
                shape=shape,
                hardware=hardware,
                layout=ParallelLayout(),
                num_blocks=num_blocks,
                block_size=block_size,
            ),
            stop_token_ids=stop_token_ids,
            device=f"simulated {hardware.name}",
        )

    return Engine(open_world, observers=observers, watchers=watchers, decision_log=decision_log)
