"""Chunk sizes against a search of all of them, and whole prefills against a simulation of each chunk."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import CostModel, Hardware, RooflineCost, StepLoad, step_s
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.chunking import Chunking, ChunkRule, PrefillTimes, largest_chunk

LLAMA3_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
H100 = Hardware(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12)
ROOFLINE = RooflineCost(shape=LLAMA3_8B, hardware=H100)
BUDGET_S = 0.05


def rule(chunking: Chunking = Chunking.ADAPTIVE, tile: int = 32, most: int = 8192, fixed: int = 512) -> ChunkRule:
    return ChunkRule(chunking=chunking, tile_tokens=tile, max_tokens=most, fixed_tokens=fixed)


def load_of(num_decodes: int, context: int, cost: CostModel = ROOFLINE) -> StepLoad:
    load = StepLoad()
    load.add_decodes(num_decodes, context, cost.decode_attention_s(context))
    return load


def seconds_with(cost: CostModel, load: StepLoad, start: int, count: int) -> float:
    total_s = cost.linear_s(load.num_tokens + count, load.num_sequences + 1) + load.attention_s
    return total_s + cost.attention_s(start, count)


@settings(max_examples=300, deadline=None)
@given(
    tile=st.sampled_from([1, 8, 32, 128]),
    most=st.integers(1, 2048),
    num_decodes=st.integers(0, 64),
    start=st.integers(0, 1_000_000),
    num_tokens=st.integers(1, 3000),
    budget_s=st.floats(1e-3, 0.2),
    cost=st.sampled_from([ROOFLINE, OnlineCost(ROOFLINE)]),
)
def test_the_adaptive_chunk_is_the_largest_that_fits(
    tile: int, most: int, num_decodes: int, start: int, num_tokens: int, budget_s: float, cost: CostModel
) -> None:
    load = load_of(num_decodes, 1000 * num_decodes, cost)
    got = largest_chunk(rule(tile=tile, most=most), cost, load, start, num_tokens, budget_s)
    room = max(0, min(num_tokens, most - num_decodes))
    sizes = [*range(0, room + 1, tile)] + ([num_tokens] if num_tokens <= room else [])
    # What is within rounding of the budget may go either way.
    fitting = [size for size in sizes if not size or seconds_with(cost, load, start, size) <= budget_s * (1 - 1e-12)]
    almost = [size for size in sizes if not size or seconds_with(cost, load, start, size) <= budget_s * (1 + 1e-12)]
    assert max(fitting) <= got <= max(almost)
    assert got % tile == 0 or got == num_tokens


def test_a_fixed_chunk_fills_the_token_budget_that_decodes_have_left() -> None:
    fixed = rule(Chunking.FIXED)
    assert largest_chunk(fixed, ROOFLINE, load_of(12, 12), 0, 10_000, 1e-9) == 500
    assert largest_chunk(fixed, ROOFLINE, load_of(12, 12), 0, 100, 1e-9) == 100
    assert largest_chunk(fixed, ROOFLINE, load_of(600, 600), 0, 100, 1e-9) == 0


def test_a_whole_chunk_is_bound_by_the_buffers_of_a_step_alone() -> None:
    whole = rule(Chunking.WHOLE)
    assert largest_chunk(whole, ROOFLINE, load_of(0, 0), 0, 5000, 1e-9) == 5000
    assert largest_chunk(whole, ROOFLINE, load_of(2, 2), 0, 10_000, 1e-9) == 8190


def test_chunks_shrink_as_the_context_grows() -> None:
    sizes = [largest_chunk(rule(), ROOFLINE, StepLoad(), start, 8192, BUDGET_S) for start in (0, 10**5, 5 * 10**5)]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def lone_prefill_s(cost: CostModel, chunk_rule: ChunkRule, num_tokens: int) -> float:
    """Step by step, as a machine with nothing else to do would run it."""
    done, total_s = 0, 0.0
    while done < num_tokens:
        count = largest_chunk(chunk_rule, cost, StepLoad(), done, num_tokens - done, BUDGET_S)
        count = count or min(chunk_rule.tile_tokens, num_tokens - done)
        load = StepLoad()
        load.add_chunk(done, count, cost.attention_s(done, count))
        total_s += step_s(cost, load)
        done += count
    return total_s


@pytest.mark.parametrize("chunking", list(Chunking))
@pytest.mark.parametrize("num_tokens", [1, 37, 700, 2_000, 8_000, 33_000, 200_000, 1_000_000])
def test_predicted_prefills_are_near_a_simulation_of_every_chunk(chunking: Chunking, num_tokens: int) -> None:
    chunk_rule = rule(chunking)
    times = PrefillTimes(chunk_rule, ROOFLINE, BUDGET_S, LLAMA3_8B.max_context_len)
    simulated_s = lone_prefill_s(ROOFLINE, chunk_rule, num_tokens)
    # A prompt's last chunk costs a whole step's overhead however small it is: up to one step beside the curve.
    last_step_s = ROOFLINE.linear_s(chunk_rule.tile_tokens, 1)
    assert times.prefill_s(num_tokens) == pytest.approx(simulated_s, rel=0.03, abs=last_step_s)


@pytest.mark.parametrize("cost", [ROOFLINE, OnlineCost(ROOFLINE)])
@pytest.mark.parametrize("max_tokens", [1, 2, 31, 500, 1 << 20])
def test_longer_prefills_take_longer(cost: CostModel, max_tokens: int) -> None:
    times = PrefillTimes(rule(), cost, BUDGET_S, max_tokens)
    lengths = sorted({1, 2, 3, *(int(1.07**power) for power in range(205)), max_tokens})
    seconds = [times.prefill_s(length) for length in lengths if length <= max_tokens]
    assert seconds == sorted(seconds) and seconds[0] > 0.0
    assert times.prefill_s(0) == 0.0


def test_what_is_left_of_a_prefill_falls_to_nothing() -> None:
    times = PrefillTimes(rule(), ROOFLINE, BUDGET_S, 100_000)
    left = [times.remaining_s(done, 100_000) for done in (0, 1, 50_000, 99_999, 100_000)]
    assert left == sorted(left, reverse=True) and left[0] == times.prefill_s(100_000) and left[-1] == 0.0
