"""Consecutive chunks of one prompt fill the stages of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Batch, Completed, Event, Output
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
COST = RooflineCost(
    shape=LLAMA3_8B, hardware=Hardware(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12)
)


class InFlight:
    """Watches how many batches that compute one request are under way at once."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.batches: set[int] = set()
        self.most = 0

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        if isinstance(event, Completed):
            self.batches.discard(event.batch_id)

    def scheduled(self, batch: Batch, now_s: float) -> None:
        if any(chunk.request_id == self.request_id for chunk in batch.chunks):
            self.batches.add(batch.batch_id)
            self.most = max(self.most, len(self.batches))


def prompt(name: str, num_tokens: int, at_s: float = 0.0, num_out: int = 1) -> Request:
    return Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s)


TRUTH = true_step_s(COST)


def simulate(
    requests: list[Request], spp: int, config: SchedulerConfig, truth: Callable[[Batch], float] = TRUTH
) -> tuple[RecordingSimRuntime, InFlight]:
    world = RecordingSimRuntime(requests, truth, spp)
    memory = KVMemory(num_blocks=200_000, block_size=16, max_context_len=LLAMA3_8B.max_context_len)
    watch = InFlight(requests[0].request_id)
    serve(Scheduler(config, COST, memory, spp), world, (watch,))
    return world, watch


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("num_chunks", [1, 5, 40])
def test_equal_chunks_take_as_long_as_the_pipeline_needs_to_fill_and_run(num_stages: int, num_chunks: int) -> None:
    config = SchedulerConfig(chunking=Chunking.FIXED, fixed_chunk_tokens=100)
    stage_s = 0.01
    world, watch = simulate(
        [prompt("a", 100 * num_chunks)], num_stages, config, truth=lambda batch: num_stages * stage_s
    )
    assert world.records["a"].ttft_s == pytest.approx((num_chunks + num_stages - 1) * stage_s)
    assert watch.most == min(num_stages, num_chunks)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_divide_the_time_of_a_long_prefill(num_stages: int) -> None:
    config = SchedulerConfig()
    alone = simulate([prompt("a", 300_000)], 1, config)[0].records["a"].ttft_s
    staged = simulate([prompt("a", 300_000)], num_stages, config)[0].records["a"].ttft_s
    # At least 95% of the ideal; the budget covers all stages, so chunks are as small as on one.
    assert alone / num_stages <= staged <= alone / num_stages / 0.95


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_short_prompt_beside_a_long_one_waits_two_steps_and_the_long_one_hardly_longer(num_stages: int) -> None:
    config = SchedulerConfig()
    long = prompt("long", 300_000)
    alone_s = simulate([long], num_stages, config)[0].records["long"].ttft_s
    shorts = [prompt(f"short-{index}", 200, at_s=0.3 + 0.1 * index, num_out=3) for index in range(20)]
    world, _ = simulate([long, *shorts], num_stages, config)
    assert max(world.records[short.request_id].ttft_s for short in shorts) <= 2.1 * config.step_budget_s
    assert world.records["long"].ttft_s <= 1.1 * alone_s


def test_a_decode_makes_one_token_per_traversal() -> None:
    num_stages, stage_s = 4, 0.01
    world, watch = simulate(
        [prompt("a", 10, num_out=5)], num_stages, SchedulerConfig(), truth=lambda batch: num_stages * stage_s
    )
    gaps_s = [b - a for a, b in zip(world.records["a"].token_times_s, world.records["a"].token_times_s[1:])]
    assert gaps_s == pytest.approx([num_stages * stage_s] * 4) and watch.most == 1
