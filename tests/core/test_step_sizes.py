"""Steps that are filled up to the size of a CUDA graph: what they cost, what is learnt of them, how they are packed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import CostModel, RooflineCost, StepLoad, step_s
from megatron_medha.core.cost.step_sizes import GRAPH_SIZES, NO_STEP_SIZES, PaddedCost, StepSizes
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.chunking import Chunking, ChunkRule, largest_chunk
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from tests.core.test_cluster_cost import BUSY_HOST, FAST, HAND, IDLE_HOST, SLOW

COUNTS = st.integers(1, 700)
ROOFLINE = RooflineCost(shape=HAND, hardware=SLOW)


@given(COUNTS, COUNTS, st.integers(1, 300))
def test_a_step_is_never_less_than_it_has_and_never_falls_as_it_grows(few: int, more: int, num_sequences: int) -> None:
    few, more = sorted((few, more))
    sizes = GRAPH_SIZES
    assert sizes.padded(few, num_sequences) >= few
    assert sizes.padded(few, num_sequences) <= sizes.padded(more, num_sequences)


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "size"),
    [(1, 1, 1), (3, 3, 4), (33, 33, 64), (130, 130, 192), (257, 257, None), (2, 1, 64), (257, 33, 320), (513, 1, None),
     (300, 257, None)],
)  # fmt: skip
def test_the_smallest_graph_with_room_is_taken(num_tokens: int, num_sequences: int, size: int | None) -> None:
    assert GRAPH_SIZES.fitting(num_tokens, num_sequences) == size


def test_without_graphs_a_step_costs_what_it_has() -> None:
    assert not NO_STEP_SIZES
    assert NO_STEP_SIZES.padded(257, 2) == 257


@given(COUNTS, st.integers(1, 300), st.integers(0, 10_000))
def test_a_step_costs_what_its_size_costs(num_tokens: int, num_sequences: int, start: int) -> None:
    cost = PaddedCost(ROOFLINE, GRAPH_SIZES)
    size = GRAPH_SIZES.padded(num_tokens, num_sequences)
    assert cost.linear_s(num_tokens, num_sequences) == ROOFLINE.linear_s(size, num_sequences)
    assert cost.attention_s(start, num_tokens) == ROOFLINE.attention_s(start, num_tokens)


def test_a_cost_model_that_knows_the_sizes_learns_what_the_others_cannot() -> None:
    def predicted_badly(cost: CostModel) -> float:
        draw, errors = Random(0), []
        for step in range(600):
            num_sequences = draw.randint(1, 40)
            load = StepLoad(num_tokens=num_sequences + draw.randint(1, 450), num_sequences=num_sequences)
            actual_s = 0.004 + 2e-5 * GRAPH_SIZES.padded(load.num_tokens, num_sequences)
            if step >= 300:
                errors.append(abs(1.0 - step_s(cost, load) / actual_s))
            cost.observe(load, actual_s)
        return sum(errors) / len(errors)

    roofline = RooflineCost(shape=HAND, hardware=SLOW)
    assert predicted_badly(PaddedCost(OnlineCost(roofline), GRAPH_SIZES)) < 0.01
    assert predicted_badly(OnlineCost(roofline)) > 0.02


class PerToken:
    """A second for each token, attention included."""

    revision = 0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        return float(num_tokens)

    def attention_s(self, start: int, num_tokens: int) -> float:
        return 0.01 * num_tokens

    def decode_attention_s(self, context: int) -> float:
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None: ...


@given(
    num_decodes=st.integers(0, 300), num_tokens=st.integers(1, 2000), budget_s=st.integers(1, 900),
    tile=st.sampled_from((1, 16, 32)), most=st.integers(64, 1024),
)  # fmt: skip
def test_a_chunk_keeps_its_budget_and_leaves_no_tile_of_its_steps_size_empty(
    num_decodes: int, num_tokens: int, budget_s: int, tile: int, most: int
) -> None:
    rule = ChunkRule(chunking=Chunking.ADAPTIVE, tile_tokens=tile, max_tokens=most, fixed_tokens=512)
    cost = PaddedCost(PerToken(), GRAPH_SIZES)
    load = StepLoad()
    load.add_decodes(num_decodes, num_decodes, 0.0)
    filled = largest_chunk(replace(rule, step_sizes=GRAPH_SIZES), cost, load, 0, num_tokens, float(budget_s))
    whole_tiles = largest_chunk(rule, cost, load, 0, num_tokens, float(budget_s))
    assert whole_tiles <= filled <= num_tokens
    if not filled:
        return
    total = num_decodes + filled
    assert cost.linear_s(total, num_decodes + 1) + cost.attention_s(0, filled) <= budget_s
    assert total <= most
    size = GRAPH_SIZES.fitting(total, num_decodes + 1)
    if size is not None and filled < num_tokens and size <= most and size + 0.01 * (size - num_decodes) <= budget_s:
        assert total == size


def test_a_step_of_40_decodes_is_filled_to_the_graphs_last_token() -> None:
    rule = ChunkRule(chunking=Chunking.ADAPTIVE, tile_tokens=32, max_tokens=8192, fixed_tokens=512)
    load = StepLoad()
    load.add_decodes(40, 40, 0.0)
    cost = PaddedCost(PerToken(), GRAPH_SIZES)
    assert largest_chunk(rule, cost, load, 0, 5000, 330.0) == 256
    assert largest_chunk(replace(rule, step_sizes=GRAPH_SIZES), cost, load, 0, 5000, 330.0) == 320 - 40


def test_a_calculated_cluster_computes_the_size_and_launches_nothing_for_it() -> None:
    plain = ClusterCost(shape=HAND, hardware=SLOW, engine=BUSY_HOST, layout=ParallelLayout())
    graphs = ClusterCost(
        shape=HAND, hardware=SLOW, engine=BUSY_HOST, layout=ParallelLayout(), step_sizes=GRAPH_SIZES
    )
    for num_tokens in (65, 100, 128):
        assert graphs.layer_s(num_tokens) == plain.layer_s(num_tokens)
        assert graphs.linear_s(num_tokens, 2) == graphs.linear_s(128, 2)
        device_s = HAND.num_layers * graphs.layer_s(128) + graphs.head_s(2)
        assert graphs.linear_s(num_tokens, 2) == graphs.host_s(2) + device_s
        load = StepLoad(num_tokens=num_tokens, num_sequences=2, chunk_context=50)
        assert graphs.step_s(load) == pytest.approx(graphs.linear_s(128, 2))
    assert graphs.linear_s(600, 2) == plain.linear_s(600, 2)


def test_an_engine_has_graphs_on_one_gpu_and_with_tp_alone() -> None:
    engine = replace(IDLE_HOST, fills_graphs=True)
    assert engine.step_sizes(ParallelLayout(tp=4)) == GRAPH_SIZES
    assert engine.step_sizes(ParallelLayout(spp=2)) == engine.step_sizes(ParallelLayout(kvp=2)) == NO_STEP_SIZES
    assert IDLE_HOST.step_sizes(ParallelLayout()) == NO_STEP_SIZES


def test_a_decision_log_says_the_sizes_and_one_without_them_has_none() -> None:
    setup = SchedulerSetup(
        config=SchedulerConfig(), shape=HAND, hardware=FAST, layout=ParallelLayout(), num_blocks=100, block_size=16,
        step_sizes=StepSizes((1, 2), (64,), 8),
    )  # fmt: skip
    header = msgspec.json.decode(msgspec.json.encode(setup.header()))
    assert SchedulerSetup.from_header(header).step_sizes == setup.step_sizes
    assert SchedulerSetup.from_header(header).build().cost.linear_s(3, 1) == setup.build().cost.linear_s(64, 1)
    del header["step_sizes"]
    assert SchedulerSetup.from_header(header).step_sizes == NO_STEP_SIZES
