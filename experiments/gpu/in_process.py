"""The scheduler over one rank in one process, in real time: arrivals by the clock, steps as they come."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.core.batch import Arrived, Batch, Completed, Preempted, Rejected, TokenOut
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup

if TYPE_CHECKING:
    from experiments.gpu.model_parts import OneRank

_NUM_OUTPUT_TOKENS = 8

@dataclass(slots=True)
class Outcome:
    """What a run showed."""

    long_s: float = float("nan")  # from the first step of the long prompt that was computed to its first token
    short_ttft_s: list[float] = field(default_factory=list)
    steps: list[tuple[float, float, bool]] = field(default_factory=list)  # predicted, actual, whether it was mixed


class Engine:
    """One scheduler, whose cost model goes on learning from run to run, over one rank."""

    def __init__(self, world: OneRank, hardware: Hardware, max_chunk_tokens: int | None = None) -> None:
        self.config = SchedulerConfig(step_budget_s=0.05, max_chunk_tokens=max_chunk_tokens)
        self._world = world
        self._scheduler = SchedulerSetup(
            config=self.config, shape=world.config.shape(2), hardware=hardware, layout=ParallelLayout(),
            num_blocks=world.num_blocks, block_size=world.block_size,
        ).build()  # fmt: skip
        self._passed_over_s = 0.0  # by how much the scheduler's clock is ahead, for steps that were not computed
        self._passed_over_ops: tuple[KVOp, ...] = ()
        self._num_runs = 0
        self._lengths: dict[str, int] = {}  # of live requests' prompts
        self._told: set[str] = set()  # of these, those that the rank knows

    def run(
        self,
        *,
        short_tokens: int,
        shorts_per_s: float,
        long_tokens: int = 0,
        long_from: int = 0,
        seconds: float = 0.0,
    ) -> Outcome:
        """One long prompt (none for 0 tokens) and short ones at a steady rate until it has its first token.

        long_from: chunks of the long prompt that end by this token are not computed, the KV there is what the pool
        holds; the scheduler's clock is put forward by what they were predicted to take, and its cost model hears
        nothing of them. Short ones begin to come with the first that is computed.
        seconds: how long short ones come where there is no long one. Ends when all requests have.
        """
        self._num_runs += 1
        outcome = Outcome()
        long_id = f"{self._num_runs}-long"
        arrival_s: dict[str, float] = {}
        num_shorts = 0
        started_s = self._now_s()
        if long_tokens:
            self._arrive(long_id, long_tokens, started_s)
        is_in_window = not long_from
        while True:
            now_s = self._now_s()
            has_more = is_in_window and (
                outcome.long_s != outcome.long_s if long_tokens else now_s - started_s < seconds
            )
            while shorts_per_s and has_more and started_s + num_shorts / shorts_per_s <= now_s:
                request_id = f"{self._num_runs}-short-{num_shorts}"
                arrival_s[request_id] = started_s + num_shorts / shorts_per_s
                self._arrive(request_id, short_tokens, arrival_s[request_id])
                num_shorts += 1
            batch = self._scheduler.schedule(now_s)
            if batch is None:
                if not self._lengths and not has_more:
                    return outcome
                time.sleep(2e-4)  # nothing to do until the next arrival
                continue
            if not is_in_window:
                (chunk,) = batch.chunks
                if chunk.start + chunk.num_tokens <= long_from:
                    self._pass_over(batch)
                    continue
                is_in_window, started_s = True, now_s
            duration_s = self._compute(batch)
            outcome.steps.append((batch.predicted_s, duration_s, len(batch.chunks) > 1))
            done_s = self._now_s()
            for output in self._scheduler.handle(Completed(batch_id=batch.batch_id, duration_s=duration_s), done_s):
                match output:
                    case TokenOut():
                        request_id = output.request_id
                        if request_id in arrival_s:
                            outcome.short_ttft_s.append(done_s - arrival_s.pop(request_id))
                        elif request_id == long_id and outcome.long_s != outcome.long_s:
                            outcome.long_s = done_s - started_s
                        if output.finish_reason is not None:
                            del self._lengths[request_id]
                    case Rejected():
                        raise AssertionError(f"{output.request_id} was rejected: {output.why}")
                    case Preempted():
                        pass  # its tokens are known to the rank; it only computes them again

    def _now_s(self) -> float:
        return time.monotonic() + self._passed_over_s

    def _arrive(self, request_id: str, num_tokens: int, now_s: float) -> None:
        self._lengths[request_id] = num_tokens
        request = Request(
            request_id=request_id, num_prompt_tokens=num_tokens, max_output_tokens=_NUM_OUTPUT_TOKENS, arrival_s=now_s
        )
        outputs = self._scheduler.handle(Arrived(request), now_s)
        assert not outputs, outputs

    def _pass_over(self, batch: Batch) -> None:
        """The rank hears of the chunk's blocks with the first one that is computed."""
        self._passed_over_ops += batch.kv_ops
        self._passed_over_s += batch.predicted_s
        self._scheduler.handle(Completed(batch_id=batch.batch_id, duration_s=0.0), self._now_s())

    def _compute(self, batch: Batch) -> float:
        """Seconds until the step is answered: the rank waits for all of it, not for decodes it has launched ahead."""
        new = []
        for chunk in batch.chunks:
            if chunk.request_id in self._told:
                continue
            self._told.add(chunk.request_id)
            count, first = self._lengths[chunk.request_id], len(self._told)
            ids = array("i", [(11 * i + first) % self._world.config.vocab_size for i in range(count)])
            sampling = Sampling(max_output_tokens=_NUM_OUTPUT_TOKENS, temperature=0.0)
            new.append(NewRequest(chunk.request_id, ids.tobytes(), count, sampling))
        kv_ops, self._passed_over_ops = (*self._passed_over_ops, *batch.kv_ops), ()
        begun_s = time.perf_counter()
        self._world.rank.run(RankStep(batch.batch_id, batch.chunks, tuple(new), batch.released, kv_ops=kv_ops))
        return time.perf_counter() - begun_s
