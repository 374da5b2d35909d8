"""A simulated replica that remembers every token of every request: for tests and small experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    FinishReason,
    Output,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.step_cost import CostModel, StepLoad, step_s
from megatron_medha.core.kv.shards import context_in
from megatron_medha.core.request import Request
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.sim.sim_world import SimRuntime
from megatron_medha.workload.request_feed import OpenLoop


@dataclass(slots=True)
class RequestRecord:
    """What a client would have seen of one request."""

    request: Request
    token_times_s: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    rejection: str | None = None
    num_tokens_lost: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.token_times_s[0] - self.request.arrival_s


class RecordingSimRuntime(SimRuntime):
    """A world that remembers every token of every request: for tests, and for small runs.

    truth: maps a batch to its seconds over all stages; stages share it evenly.
    """

    def __init__(
        self,
        arrivals: Iterable[Request],
        truth: Callable[[Batch], float],
        spp: int = 1,
        outcome: Callable[[Batch, float], Completed] | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        super().__init__(OpenLoop(()), pipeline or Pipeline(spp))
        self._outcome = outcome or super().completed
        self._truth = truth
        self.records: dict[str, RequestRecord] = {}
        for request in arrivals:
            self.records.setdefault(request.request_id, RequestRecord(request))
            self.push(request.arrival_s, Arrived(request))

    def completed(self, batch: Batch, duration_s: float) -> Completed:
        """How a batch ends."""
        return self._outcome(batch, duration_s)

    def abort(self, at_s: float, request_id: str) -> None:
        """Let a client go away at a moment."""
        self.push(at_s, Aborted(request_id))

    def lose_ranks(self, at_s: float) -> None:
        """Let the ranks fail, and come back empty, at a moment; batches in flight never complete."""
        self.push(at_s, RanksLost("simulated"))

    def submit(self, batch: Batch) -> None:
        """See Runtime."""
        spp = self.pipeline.spp
        self.enter(batch, StepTimes(((self._truth(batch) / spp,) * spp,)))

    def emit(self, output: Output) -> None:
        """See Runtime."""
        record = self.records[output.request_id]
        match output:
            case TokenOut():
                record.token_times_s.append(self._now_s)
                record.finish_reason = output.finish_reason
            case Rejected():
                record.rejection = output.why
            case Preempted():
                record.num_tokens_lost += output.num_tokens_lost


def true_step_s(cost: CostModel, kvp: int = 1, shard_tokens: int = 1 << 60) -> Callable[[Batch], float]:
    """The truth of a world whose steps take exactly what a cost model says, on the slowest of the KVP ranks.

    shard_tokens: of a sequence on one KVP rank, at most.
    """

    def duration_s(batch: Batch) -> float:
        loads = [StepLoad() for _ in range(kvp)]
        for chunk in batch.chunks:
            for index, rank in enumerate(chunk.kvp_ranks):
                context = context_in(index, chunk.start, shard_tokens)
                if chunk.num_tokens == 1 and chunk.start:
                    loads[rank].add_decodes(1, context + 1, cost.decode_attention_s(context + 1))
                else:
                    loads[rank].add_chunk(context, chunk.num_tokens, cost.attention_s(context, chunk.num_tokens))
        return max(step_s(cost, load) for load in loads)

    return duration_s


def random_result(draw: Random) -> Callable[[Batch, float], Completed]:
    """Ends batches: a few of their requests stop early, fewer fail."""

    def result(batch: Batch, seconds: float) -> Completed:
        ids = [chunk.request_id for chunk in batch.chunks]
        stopped = tuple(name for name in ids if draw.random() < 0.05)
        failed = tuple((name, "its fault") for name in ids if draw.random() < 0.02)
        return Completed(batch.batch_id, seconds, stopped, failed)

    return result
