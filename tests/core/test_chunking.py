"""Chunk sizes against a search of all of them, and whole prefills against a simulation of each chunk."""

from __future__ import annotations

from dataclasses import replace

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
    left = [times.prefill_s(100_000) - times.prefill_s(done) for done in (0, 1, 50_000, 99_999, 100_000)]
    assert left == sorted(left, reverse=True) and left[0] == times.prefill_s(100_000) and left[-1] == 0.0


class Counted:
    """A cost of so much a token, in halves of seconds that add up exactly, that counts how often it is asked."""

    revision = 7

    def __init__(self, curve: float = 0.0) -> None:
        self.num_asked = 0
        self._curve = curve

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        self.num_asked += 1
        return 1.0 + 0.5 * num_tokens + 0.25 * num_sequences

    def attention_s(self, start: int, num_tokens: int) -> float:
        return self._curve * num_tokens * (start + num_tokens)

    def decode_attention_s(self, context: int) -> float:
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None: ...


@settings(max_examples=150)
@given(
    tile=st.sampled_from([1, 4]),
    num_tokens=st.integers(0, 60),
    most=st.integers(1, 50),
    max_per_client=st.integers(1, 60),
    decodes=st.integers(0, 3),
    start=st.integers(0, 20),
    budget_s=st.integers(0, 40),
    guess=st.integers(0, 70),
    curve=st.sampled_from([0.0, 0.015625, 0.125]),
)
def test_the_largest_chunk_is_exact_at_its_bounds_and_the_same_whatever_is_guessed(
    tile: int, num_tokens: int, most: int, max_per_client: int, decodes: int, start: int, budget_s: int, guess: int,
    curve: float,
) -> None:  # fmt: skip
    cost, load = Counted(curve), StepLoad()
    load.add_decodes(decodes, 5, 0.5 * decodes)
    chunk_rule = replace(rule(tile=tile, most=most), max_chunk_tokens=max_per_client)
    room = min(num_tokens, most - decodes, max_per_client)
    sizes = [size for size in range(1, room + 1) if size % tile == 0 or size == num_tokens]
    fitting = [size for size in sizes if seconds_with(cost, load, start, size) <= budget_s]
    expected = max(fitting, default=0)
    assert largest_chunk(chunk_rule, cost, load, start, num_tokens, float(budget_s), guess) == expected
    assert largest_chunk(chunk_rule, cost, load, start, num_tokens, float(budget_s)) == expected
    fixed = replace(chunk_rule, chunking=Chunking.FIXED, fixed_tokens=30)
    assert largest_chunk(fixed, cost, load, start, num_tokens, 0.0) == max(0, min(room, 30 - decodes))
    whole = replace(chunk_rule, chunking=Chunking.WHOLE)
    assert largest_chunk(whole, cost, load, start, num_tokens, 0.0) == max(0, room)


@pytest.mark.parametrize(
    ("guess", "most_asked"),
    [
        (24, 2),  # right: what is guessed fits, and a tile more does not
        (27, 2),  # within the same tile
        (28, 2),  # a tile too many
        (20, 4),  # a tile too few
        (0, 4),   # none: both ends, and the line between them
    ],
)
def test_a_good_guess_saves_looks(guess: int, most_asked: int) -> None:
    cost = Counted()
    assert largest_chunk(rule(tile=4), cost, StepLoad(), 0, 1000, 1.25 + 0.5 * 27, guess) == 24
    assert cost.num_asked <= most_asked


def test_a_long_search_ends_after_four_looks_along_the_line_and_as_many_as_halving_takes() -> None:
    cost = Counted(curve=1.0)
    assert largest_chunk(rule(tile=1, most=1 << 20), cost, StepLoad(), 0, 1 << 20, 30.0) == 5
    assert cost.num_asked <= 2 + 4 + 21


def test_the_time_of_a_short_prefill_is_that_of_its_only_step() -> None:
    cost = Counted()
    times = PrefillTimes(rule(tile=4), cost, 1.25 + 0.5 * 64, 64)
    assert (times.num_step_tokens, times.revision) == (64, 7)
    for num_tokens in (1, 2, 3, 7, 40, 63, 64):
        assert times.prefill_s(num_tokens) == 1.25 + 0.5 * num_tokens
    assert times.prefill_s(0) == 0.0


def test_a_prefill_of_several_steps_takes_each_steps_costs_for_each_chunk() -> None:
    chunk_s = 1.25 + 0.5 * 64
    times = PrefillTimes(rule(tile=4), Counted(), chunk_s, 1 << 20)
    for num_chunks in (2, 10, 1000, 1 << 14):
        assert times.prefill_s(64 * num_chunks) == pytest.approx(num_chunks * chunk_s)
    assert times.prefill_s(640) - times.prefill_s(64) == pytest.approx(9 * chunk_s)


def test_a_chunk_is_a_tile_at_least_in_predictions_too() -> None:
    times = PrefillTimes(rule(tile=4), Counted(), 0.0, 1000)
    assert times.num_step_tokens == 4
    assert times.prefill_s(1000) == pytest.approx(250 * (1.25 + 2.0))


def test_the_time_of_a_token_is_that_of_the_chunk_in_whose_middle_it_is() -> None:
    # With attention that costs twice the keys before a chunk: 64 tokens after n take 64 * (n + 64) / 64.
    cost = Counted(curve=1 / 64)
    times = PrefillTimes(rule(Chunking.FIXED, tile=4, fixed=64), cost, 1.0, 100_000)
    chunks = [1.25 + 32.0 + (start + 64) for start in range(0, 6400, 64)]
    assert times.prefill_s(6400) == pytest.approx(sum(chunks), rel=4e-3)
