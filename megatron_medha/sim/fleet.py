"""Several replicas behind the server's router, as one system in one simulated world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from math import inf

from megatron_medha.core.batch import Arrived, Batch, Event, Output
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.placement import ReplicaLoad, choose_replica
from megatron_medha.sim.measured_world import MeasuredSimRuntime
from megatron_medha.workload.request_feed import RequestFeed


class Fleet:
    """SchedulerProtocol and Runtime at once: events happen in order of time over all replicas, each handled by its own.

    feed: the requests; each goes where the router of `medha serve` would put it.
    worlds: one per system, of the same feed, without arrivals of their own.
    load_of: what a replica has before it when a request comes in.
    api_server_s: see SimRuntime. on_sample: see MeasuredSimRuntime; of all replicas together.
    """

    def __init__(
        self,
        feed: RequestFeed,
        systems: Sequence[SchedulerProtocol],
        worlds: Sequence[MeasuredSimRuntime],
        load_of: Callable[[int, Request], ReplicaLoad],
        api_server_s: float,
        sample_s: float,
        on_sample: Callable[[float], None],
    ) -> None:
        self._feed = feed
        self._systems, self._worlds = tuple(systems), tuple(worlds)
        self._load_of, self._api_server_s = load_of, api_server_s
        self._sample_s, self._on_sample, self._next_sample_s = sample_s, on_sample, 0.0
        self._replica = 0  # of the latest event
        self.replica_of: dict[str, int] = {}  # by request id

    def now_s(self) -> float:
        """See Runtime."""
        return self._worlds[self._replica].now_s()

    def next_event(self) -> Event | None:
        """See Runtime."""
        self._replica = self._next_replica()
        event = self._worlds[self._replica].next_event()
        if event is None:
            for world in self._worlds:  # the run is cut off: each counts what it has in flight
                world.next_event()
        elif (now_s := self.now_s()) >= self._next_sample_s:
            self._next_sample_s = now_s + self._sample_s
            self._on_sample(now_s)
        return event

    def _next_replica(self) -> int:
        """Whose event is next; an arrival is placed first."""
        next_s = [world.next_event_s for world in self._worlds]
        earliest = min(range(len(next_s)), key=next_s.__getitem__)
        at_s = self._feed.next_s + self._api_server_s
        if at_s == inf or at_s > next_s[earliest]:
            return earliest
        request = self._feed.pop()
        replica = choose_replica(list(map(self._load_of, range(len(self._worlds)), repeat(request))))
        self.replica_of[request.request_id] = replica
        self._worlds[replica].push(at_s, Arrived(request))
        return replica

    def has_room(self) -> bool:
        """See Runtime; only the replica whose event it was can have anything new to do."""
        return self._worlds[self._replica].has_room()

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        self._worlds[self._replica].submit(batch)

    def emit(self, output: Output) -> None:
        """See Runtime."""
        self._worlds[self._replica].emit(output)

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See SchedulerProtocol."""
        return self._systems[self._replica].handle(event, now_s)

    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""
        return self._systems[self._replica].schedule(now_s)
