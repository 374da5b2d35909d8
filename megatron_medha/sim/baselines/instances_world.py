"""A simulated cluster of instances on which several batches run at the same time, each on instances of its own."""

from __future__ import annotations

from megatron_medha.core.batch import Batch
from megatron_medha.sim.measured_world import MeasuredSimRuntime
from megatron_medha.sim.pipeline import StepTimes
from megatron_medha.sim.truth import ComputedWork


class PredictedTruth:
    """Batches take what they are predicted to: a baseline loses nothing by mispredicting."""

    def __init__(self) -> None:
        self.work = ComputedWork()  # without parameters read: how many instances share a decode's, batches do not say

    def __call__(self, batch: Batch) -> StepTimes:
        """The seconds of a batch, as a single stage."""
        self.work.num_batches += 1
        for chunk in batch.chunks:
            self.work.add(chunk)
        return StepTimes(((batch.predicted_s,),))


class InstancesSimRuntime(MeasuredSimRuntime):
    """A Runtime whose batches name the instances they occupy (Chunk.kvp_ranks), which must be free.

    pipeline: of one stage with a rank per instance, which notes who is busy.
    """

    def has_room(self) -> bool:
        """Always: who decides knows which instances are free."""
        return True

    def enter(self, batch: Batch, times: StepTimes) -> None:
        """Run a batch on its instances."""
        instances = batch.chunks[0].kvp_ranks
        assert all(chunk.kvp_ranks == instances for chunk in batch.chunks)
        end_s = self.pipeline.occupy(batch.batch_id, instances, self._now_s, times.duration_s)
        self.push(end_s, self.completed(batch, times.duration_s))
