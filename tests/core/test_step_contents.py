"""How much goes into a step: chunks, tiles and the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_bench import COST, HARDWARE, SHAPE, Bench, request

from megatron_medha.core.cost.step_cost import RooflineCost
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig


def test_chunks_of_a_long_prompt_are_whole_tiles_within_the_budget() -> None:
    bench = Bench(tile_tokens=16)
    bench.arrive(request("a", num_tokens=1001))
    batches = []
    while not batches or not batches[-1].chunks[0].samples_token:
        batches.append(bench.step()[0])
    sizes = [batch.chunks[0].num_tokens for batch in batches]
    assert sum(sizes) == 1001 and all(size % 16 == 0 for size in sizes[:-1]) and len(sizes) > 3
    assert all(batch.predicted_s <= batch.budget_s == 0.05 for batch in batches)
    assert sizes == sorted(sizes, reverse=True)


def test_a_prefill_whose_tile_exceeds_the_budget_runs_tile_by_tile() -> None:
    # Also with slack to give away: what nobody takes must come back to it, or the machine would stand still.
    bench = Bench(num_blocks=20_000, step_budget_s=0.01)
    bench.arrive(request("a", num_tokens=50_000, ttft_slo_s=1e6))
    sizes: list[int] = []
    while sum(sizes) < 50_000:
        batch = bench.step()[0]
        sizes.append(batch.chunks[0].num_tokens)
    assert sizes[-2] == 32 and batch.predicted_s > batch.budget_s


def test_a_step_full_of_decodes_still_takes_one_tile() -> None:
    bench = Bench(num_blocks=20_000, step_budget_s=0.02)
    bench.arrive(*(request(f"d{index}", num_tokens=200, num_out=500) for index in range(100)))
    while any(seq.is_prefill for seq in bench.scheduler.sequences):
        bench.step()
    bench.arrive(request("a", num_tokens=100, at_s=bench.now_s))
    batch = bench.schedule()
    assert batch.predicted_s > batch.budget_s
    assert [chunk.num_tokens for chunk in batch.chunks if chunk.request_id == "a"] == [32]


def decoding_beside(bench: Bench, context: int) -> list[int]:
    """Sizes of a long prompt's chunks from `context` tokens on, the first three of them beside an answer."""
    bench.arrive(request("long", num_tokens=context + 500))
    while (seq := bench.scheduler.sequence("long")) and seq.num_scheduled_tokens < context:
        bench.step()
    bench.arrive(request("short", num_tokens=1, num_out=4, at_s=bench.now_s, min_deadline_s=0.0))
    sizes = []
    while len(sizes) < 5:
        batch = bench.step()[0]
        if bench.scheduler.sequence("short") is None or batch.chunks[0].request_id == "short" and batch.chunks[0].start:
            sizes.append(sum(chunk.num_tokens for chunk in batch.chunks if chunk.request_id == "long"))
    return sizes


@pytest.mark.parametrize(("context", "cut"), [(1_000, 32), (1_600, 16), (50_000, 8)])
def test_a_tile_that_breaks_the_budget_is_cut_while_an_answer_waits_for_the_step(context: int, cut: int) -> None:
    bench = Bench(num_blocks=20_000, step_budget_s=0.05, has_space_sharing=False, max_skips=0)
    sizes = decoding_beside(bench, context)
    assert sizes == [cut, cut, cut, 32, 32]


class ReadingTheContext(RooflineCost):
    """A machine on which a chunk's attention takes as long as reading what is before it."""

    def attention_s(self, start: int, num_tokens: int) -> float:
        return 1e-5 * start


def test_a_tile_is_not_cut_where_half_of_it_would_take_as_long() -> None:
    cost = ReadingTheContext(shape=COST.shape, hardware=COST.hardware)
    bench = Bench(cost=cost, num_blocks=20_000, step_budget_s=0.05, has_space_sharing=False, max_skips=0)
    assert decoding_beside(bench, 10_000) == [32] * 5


def test_a_tpot_target_lowers_the_budget_while_its_request_decodes() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=3, tpot_slo_s=0.02))
    assert [bench.step()[0].budget_s for _ in range(3)] == [0.05, 0.02, 0.02]
    bench.arrive(request("b", at_s=bench.now_s))
    assert bench.step()[0].budget_s == 0.05


@pytest.mark.parametrize("tpot_slo_s", [1e-6, 1e-3, 0.01, 0.03, 0.05, 1.0])
def test_a_clients_tpot_target_costs_the_prefills_of_others_two_percent_at_most(tpot_slo_s: float) -> None:
    taken_s = {}
    for target_s in (None, tpot_slo_s):
        bench = Bench(num_blocks=20_000, max_num_sequences=64)
        bench.arrive(request("eager", num_out=5_000, tpot_slo_s=target_s))
        bench.step()
        bench.arrive(*(request(f"long{place}", 5_000, num_out=1, at_s=bench.now_s) for place in range(4)))
        bench.run_until(lambda bench=bench: bench.scheduler.num_sequences == 1)
        taken_s[target_s] = bench.now_s
    assert taken_s[tpot_slo_s] <= 1.03 * taken_s[None]  # 2%, and chunks are whole tiles


def test_a_clients_tpot_target_shortens_steps_where_that_costs_others_little() -> None:
    cost = RooflineCost(shape=SHAPE, hardware=replace(HARDWARE, step_overhead_s=1e-4))
    bench = Bench(cost=cost)
    bench.arrive(request("eager", num_out=50, tpot_slo_s=0.02))
    bench.step()
    bench.arrive(request("long", 2_000, at_s=bench.now_s))
    fixed_s = cost.linear_s(1, 1)
    budget_s = bench.schedule().budget_s
    assert budget_s < 0.03
    assert 1 - fixed_s / budget_s >= 0.979 * (1 - fixed_s / 0.05)


def test_a_budget_below_the_fixed_costs_of_a_step_is_raised_to_twice_them() -> None:
    bench = Bench(step_budget_s=1e-4)
    bench.arrive(request("a"))
    assert bench.schedule().budget_s == 2 * COST.linear_s(1, 1)


def test_decodes_never_overfill_a_step() -> None:
    with pytest.raises(ConfigError, match="scheduler.max_num_sequences=9 .* scheduler.max_batch_tokens=8"):
        SchedulerConfig(max_num_sequences=9, max_batch_tokens=8, tile_tokens=8)


@pytest.mark.parametrize(("chunking", "sizes"), [(Chunking.FIXED, [100, 100, 50]), (Chunking.WHOLE, [250])])
def test_the_baselines_chunk_as_they_are_known_to(chunking: Chunking, sizes: list[int]) -> None:
    bench = Bench(chunking=chunking, fixed_chunk_tokens=100)
    bench.arrive(request("a", num_tokens=250, num_out=1))
    assert [bench.step()[0].chunks[0].num_tokens for _ in sizes] == sizes
