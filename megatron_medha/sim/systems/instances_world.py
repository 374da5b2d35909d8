"""A simulated cluster of instances on which several batches run at the same time, each on instances of its own."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_medha.core.batch import Batch, Completed, Event
from megatron_medha.core.request import Request
from megatron_medha.sim.world import SimulatedWorld


class InstancesWorld(SimulatedWorld):
    """A Runtime whose batches name the instances they occupy (Chunk.kvp_ranks) and take what they are predicted to.

    The system that decides knows the truth: a baseline loses nothing by mispredicting.
    """

    def __init__(self, arrivals: Iterable[Request]) -> None:
        super().__init__(arrivals, lambda batch: batch.predicted_s)
        self._busy: dict[int, tuple[int, ...]] = {}

    def has_room(self) -> bool:
        """Always: who decides knows which instances are free."""
        return True

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        instances = batch.chunks[0].kvp_ranks
        taken = {instance for others in self._busy.values() for instance in others}
        assert not taken.intersection(instances), f"batch {batch.batch_id} on busy instances"
        self._busy[batch.batch_id] = instances
        self.push(self._now_s + batch.predicted_s, Completed(batch_id=batch.batch_id, duration_s=batch.predicted_s))

    def next_event(self) -> Event | None:
        """See Runtime."""
        event = super().next_event()
        if isinstance(event, Completed):
            del self._busy[event.batch_id]
        return event
