"""A simulated cluster of instances on which several batches run at the same time, each on instances of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_medha.core.batch import Batch, Completed, Event
from megatron_medha.core.request import Request
from megatron_medha.sim.ledger import Ledger
from megatron_medha.sim.measured_world import MeasuredSimRuntime
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.sim.truth import ComputedWork


class InstancesSimRuntime(MeasuredSimRuntime):
    """A Runtime whose batches name the instances they occupy (Chunk.kvp_ranks) and take what they are predicted to.

    The system that decides knows the truth: a baseline loses nothing by mispredicting.
    pipeline: of one stage with a rank per instance, which notes who is busy.
    """

    def __init__(
        self,
        arrivals: Iterable[Request],
        pipeline: Pipeline,
        ledger: Ledger,
        until_s: float = float("inf"),
        sample_s: float = float("inf"),
        on_sample: Callable[[float], None] = lambda now_s: None,
        api_server_s: float = 0.0,
    ) -> None:
        super().__init__(arrivals, pipeline, _as_predicted, ledger, until_s, sample_s, on_sample, api_server_s)
        self._busy: dict[int, tuple[int, ...]] = {}
        self.work = ComputedWork()  # without parameters read: how many instances share a decode's, batches do not say

    def has_room(self) -> bool:
        """Always: who decides knows which instances are free."""
        return True

    def enter(self, batch: Batch, times: StepTimes) -> None:
        """Run a batch on its instances, which must be free."""
        instances = batch.chunks[0].kvp_ranks
        assert all(chunk.kvp_ranks == instances for chunk in batch.chunks)
        taken = {instance for others in self._busy.values() for instance in others}
        assert taken.isdisjoint(instances), f"batch {batch.batch_id} on busy instances"
        self._busy[batch.batch_id] = instances
        self.work.num_batches += 1
        for chunk in batch.chunks:
            self.work.add(chunk)
        self.pipeline.occupy(batch.batch_id, instances, self._now_s, batch.predicted_s)
        self.push(self._now_s + batch.predicted_s, Completed(batch_id=batch.batch_id, duration_s=batch.predicted_s))

    def next_event(self) -> Event | None:
        """See Runtime."""
        event = super().next_event()
        if isinstance(event, Completed):
            del self._busy[event.batch_id]
        return event


def _as_predicted(batch: Batch) -> StepTimes:
    return StepTimes(((batch.predicted_s,),))
