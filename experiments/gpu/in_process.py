"""The scheduler over one rank in one process, in real time: arrivals by the clock, steps as they come."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_medha.cluster.messages import NewRequest, Step
from megatron_medha.core.batch import Arrived, Batch, Completed, Preempted, Rejected, TokenOut
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.engine.scheduler_setup import SchedulerSetup

if TYPE_CHECKING:
    from experiments.gpu.model_parts import OneRank

_LONG = "long"


@dataclass(slots=True)
class Outcome:
    """What a run showed."""

    budget_s: float
    long_ttft_s: float = float("nan")
    short_ttft_s: list[float] = field(default_factory=list)
    steps: list[tuple[float, float, bool]] = field(default_factory=list)  # predicted, actual, whether it was mixed


def run_engine(
    world: OneRank,
    hardware: Hardware,
    *,
    long_tokens: int,
    short_tokens: int,
    shorts_per_s: float,
    seconds: float = 0.0,
    num_output_tokens: int = 8,
) -> Outcome:
    """One long prompt at the start (none for 0 tokens) and short ones at a steady rate until it has its first token.

    seconds: how long short ones come where there is no long one. Ends when all requests have.
    """
    config = SchedulerConfig(step_budget_s=0.05)
    scheduler = SchedulerSetup(
        config=config, shape=world.config.shape(2), hardware=hardware, layout=ParallelLayout(),
        num_blocks=world.num_blocks, block_size=world.block_size,
    ).build()  # fmt: skip
    outcome = Outcome(config.step_budget_s)
    started_s = time.monotonic()
    arrival_s: dict[str, float] = {}
    known: set[str] = set()
    live: set[str] = set()
    num_shorts = 0

    def arrive(request_id: str, num_tokens: int, now_s: float) -> None:
        arrival_s[request_id] = now_s
        live.add(request_id)
        request = Request(
            request_id=request_id,
            num_prompt_tokens=num_tokens,
            max_output_tokens=num_output_tokens,
            arrival_s=now_s,
        )
        outputs = scheduler.handle(Arrived(request), now_s)
        assert not outputs, outputs

    def compute(batch: Batch) -> float:
        new = []
        for chunk in batch.chunks:
            if chunk.request_id not in known:
                known.add(chunk.request_id)
                count = long_tokens if chunk.request_id == _LONG else short_tokens
                ids = array("i", [(11 * i + len(known)) % world.config.vocab_size for i in range(count)])
                sampling = Sampling(max_output_tokens=num_output_tokens, temperature=0.0)
                new.append(NewRequest(chunk.request_id, ids.tobytes(), count, sampling))
        begun_s = time.perf_counter()
        world.rank.run(Step(batch.batch_id, batch.chunks, tuple(new), batch.released))
        if world.device.type == "cuda":
            import torch

            torch.cuda.synchronize(world.device)
        return time.perf_counter() - begun_s

    if long_tokens:
        arrive(_LONG, long_tokens, started_s)
    while True:
        now_s = time.monotonic()
        has_more = _LONG in live and outcome.long_ttft_s != outcome.long_ttft_s if long_tokens else (
            now_s - started_s < seconds
        )
        while shorts_per_s and has_more and started_s + num_shorts / shorts_per_s <= now_s:
            arrive(f"short-{num_shorts}", short_tokens, started_s + num_shorts / shorts_per_s)
            num_shorts += 1
        batch = scheduler.schedule(now_s)
        if batch is None:
            if not live and not has_more:
                break
            time.sleep(2e-4)  # nothing to do until the next arrival
            continue
        duration_s = compute(batch)
        is_mixed = len(batch.chunks) > 1
        outcome.steps.append((batch.predicted_s, duration_s, is_mixed))
        done_s = time.monotonic()
        for output in scheduler.handle(Completed(batch_id=batch.batch_id, duration_s=duration_s), done_s):
            match output:
                case TokenOut():
                    request_id = output.request_id
                    if request_id in arrival_s:
                        ttft_s = done_s - arrival_s.pop(request_id)
                        if request_id == _LONG:
                            outcome.long_ttft_s = ttft_s
                        else:
                            outcome.short_ttft_s.append(ttft_s)
                    if output.finish_reason is not None:
                        live.discard(request_id)
                case Rejected():
                    raise AssertionError(f"{output.request_id} was rejected: {output.why}")
                case Preempted():
                    pass  # its tokens are known to the rank; it only computes them again
    final = scheduler.schedule(time.monotonic())
    assert final is None, "work left after the last request"
    return outcome
