"""Options that make our scheduler behave as other systems do: what each rule promises, on small runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Batch
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.baselines.baseline_config import BaselineConfig, OutputLengthSource
from megatron_medha.sim.baselines.predicted_order import OutputLengthPredictor
from megatron_medha.sim.system import build_scheduler

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=200_000,
)  # fmt: skip
SLOW = Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10, step_overhead_s=2e-3)
FIXED = BaselineConfig(
    policy="fcfs", is_preemptive=False, chunking=Chunking.FIXED, fixed_chunk_tokens=256, has_space_sharing=False,
    progress_share=0.0,
)  # fmt: skip


def request(name: str, num_tokens: int, at_s: float = 0.0, num_out: int = 1, slo_s: float | None = None) -> Request:
    return Request(
        request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s, ttft_slo_s=slo_s
    )


class Kept:
    """An observer that keeps all batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def handled(self, *_: object) -> None: ...

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self.batches.append(batch)


def run(config: BaselineConfig, *requests: Request) -> tuple[dict[str, float], list[Batch]]:
    """First-token times by request, and all batches."""
    setup = SchedulerSetup(
        config=config, shape=SHAPE, hardware=SLOW, layout=ParallelLayout(), num_blocks=100_000, block_size=4,
        learns=False,
    )  # fmt: skip
    world, kept = RecordingSimRuntime(requests, true_step_s(RooflineCost(shape=SHAPE, hardware=SLOW))), Kept()
    serve(build_scheduler(setup), world, (kept,))
    return {name: record.ttft_s for name, record in world.records.items()}, kept.batches


def test_no_prompt_gets_more_than_max_chunk_tokens_of_a_step() -> None:
    _, batches = run(replace(FIXED, max_chunk_tokens=64), request("long", 1000), request("short", 50, at_s=1e-6))
    assert max(chunk.num_tokens for batch in batches for chunk in batch.chunks) == 64
    assert {chunk.request_id for chunk in batches[1].chunks} == {"long", "short"}


def test_adaptive_chunks_obey_max_chunk_tokens_too() -> None:
    config = BaselineConfig(max_chunk_tokens=64, min_deadline_s=1e-3)
    _, batches = run(config, request("long", 1000), request("other", 900), request("short", 50, at_s=1e-6))
    assert max(chunk.num_tokens for batch in batches for chunk in batch.chunks) == 64


def test_a_second_long_prompt_waits_for_its_place_and_short_ones_pass_it() -> None:
    config = replace(FIXED, max_partial_prefills=4, max_long_partial_prefills=1, short_prompt_tokens=100)
    requests = (request("first", 2000), request("second", 2000, at_s=1e-6), request("short", 50, at_s=2e-6))
    ttft_s, batches = run(config, *requests)
    beside = [batch for batch in batches if {"first", "second"} <= {chunk.request_id for chunk in batch.chunks}]
    assert len(beside) <= 1  # as in vLLM, a long prompt's last piece is not long
    assert ttft_s["short"] < 0.1 * ttft_s["first"] < 0.1 * ttft_s["second"]


def test_no_more_prompts_are_begun_than_max_partial_prefills() -> None:
    config = replace(FIXED, max_partial_prefills=2)
    _, batches = run(config, *(request(f"r{i}", 500, at_s=1e-6 * i) for i in range(5)))
    assert max(len(batch.chunks) for batch in batches) == 2
    assert {chunk.num_tokens for chunk in batches[1].chunks} == {128}  # even parts of the step


@pytest.mark.parametrize("chunking", [Chunking.FIXED, Chunking.ADAPTIVE])
def test_long_prompts_leave_the_reserved_share_of_every_step_to_short_ones(chunking: Chunking) -> None:
    config = replace(FIXED, chunking=chunking, reserved_share=0.5, short_prompt_tokens=200)
    _, open_batches = run(replace(FIXED, chunking=chunking), request("long", 4000))
    ttft_s, batches = run(config, request("long", 4000), *(request(f"s{i}", 100, at_s=1e-6) for i in range(3)))
    assert batches[0].num_tokens <= 0.55 * open_batches[0].num_tokens
    assert max(ttft_s[f"s{i}"] for i in range(3)) < 0.2 * ttft_s["long"]


def test_ssjf_counts_the_answer_as_well_as_the_prompt() -> None:
    ssjf = replace(FIXED, policy="ssjf", output_lengths=OutputLengthSource.ORACLE)
    requests = (request("first", 256), request("talker", 100, 1e-6, 2000), request("reader", 250, 2e-6, 1))
    ttft_s, _ = run(ssjf, *requests)
    assert ttft_s["reader"] < ttft_s["talker"]
    ttft_s, _ = run(replace(FIXED, policy="sjf"), *requests)
    assert ttft_s["talker"] < ttft_s["reader"]


def test_the_mean_predictor_learns_from_answers_that_have_ended() -> None:
    predictor = OutputLengthPredictor(OutputLengthSource.MEAN, 0.0)
    for _ in range(1000):
        predictor.learn(10)
    assert 10 <= predictor.predict(request("r", 1, num_out=500)) < 11
    assert predictor.predict(request("r", 1, num_out=3)) == 3


def test_the_noisy_predictor_errs_the_same_way_every_time() -> None:
    one, other = (OutputLengthPredictor(OutputLengthSource.NOISY, 0.5) for _ in range(2))
    assert one.predict(request("r", 1, num_out=500)) == other.predict(request("r", 1, num_out=500)) != 500


def test_qlm_puts_those_that_will_miss_their_target_behind_those_that_will_not() -> None:
    qlm = replace(FIXED, policy="qlm")
    # The machine is busy for long with "first"; "late" could only be in time if it came at once.
    first, late = request("first", 8000, slo_s=100.0), request("late", 250, 1e-6, slo_s=1e-3)
    ttft_s, _ = run(qlm, first, late, request("fine", 250, 2e-6, slo_s=50.0))
    assert ttft_s["fine"] < ttft_s["late"]
    ttft_s, _ = run(replace(FIXED, policy="edf"), first, late, request("fine", 250, 2e-6, slo_s=50.0))
    assert ttft_s["late"] < ttft_s["fine"]
