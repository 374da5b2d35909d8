"""Steps on a cluster by hand-computed numbers, and the laws that any constants must keep."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware, Link, all_gather_s, all_reduce_s, send_s
from megatron_medha.core.cost.step_cost import StepLoad, step_s
from megatron_medha.core.cost.utilisation import batch_flops, mbu, mfu
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

# One layer: attention weights 8 * 4 * (2*2 + 2*2) = 256, MLP 3 * 8 * 16 = 384; head 8 * 10 = 80.
HAND = ModelShape(
    name="hand", num_layers=4, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=4,
    vocab_size=10, max_context_len=1000,
)  # fmt: skip
SLOW = Hardware(
    name="slow", flops_per_s=1e6, memory_bytes_per_s=1e5, linear_efficiency=0.5, attention_efficiency=0.25,
    lone_tile_efficiency=0.5, memory_efficiency=0.5, kernel_overhead_s=0.001, num_sms=4, num_devices=16,
    devices_per_node=2, intra_node=Link(bytes_per_s=1e4, latency_s=0.01),
    inter_node=Link(bytes_per_s=1e3, latency_s=0.1),
)  # fmt: skip
IDLE_HOST = EngineCosts(
    name="idle", step_s=0.0, sequence_s=0.0, stage_entry_s=0.0, layer_launch_s=0.0, request_s=0.0
)
BUSY_HOST = EngineCosts(
    name="busy", step_s=1.0, sequence_s=0.1, stage_entry_s=0.5, layer_launch_s=2.0, request_s=0.0, graph_max_context=64
)
LLAMA_70B = ModelShape(
    name="llama3_70b", num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
MIXTURE = ModelShape(
    name="mixture", num_layers=48, hidden_size=2048, ffn_hidden_size=768, num_heads=32, num_kv_heads=4, head_dim=128,
    vocab_size=151936, max_context_len=1 << 20, num_experts=128, num_experts_per_token=8,
)  # fmt: skip
FAST = Hardware(
    name="fast", flops_per_s=989e12, memory_bytes_per_s=3.35e12, kernel_overhead_s=3e-6, num_sms=132,
    num_devices=1024, devices_per_node=8, intra_node=Link(bytes_per_s=3e11, latency_s=3e-5),
    inter_node=Link(bytes_per_s=5e10, latency_s=2e-5),
)  # fmt: skip
TILED = replace(IDLE_HOST, name="tiled", attention_tile_rows=64, layer_launch_s=1e-3)


def cost_of(
    shape: ModelShape = HAND, hardware: Hardware = SLOW, engine: EngineCosts = IDLE_HOST, **degrees: int
) -> ClusterCost:
    return ClusterCost(shape=shape, hardware=hardware, engine=engine, layout=ParallelLayout(**degrees))


def load_of(cost: ClusterCost, start: int, num_tokens: int) -> StepLoad:
    load = StepLoad()
    load.add_chunk(start, num_tokens, cost.attention_s(start, num_tokens))
    return load


def test_a_layer_joins_compute_and_weights_and_adds_what_is_beside() -> None:
    # 10 tokens: 10 * 2 * 640 FLOPs at 5e5; 640 * 2 bytes at 5e4; widths 10*8 + 3*16 + 4*2*4 = 160 of 2 bytes each.
    compute_s, read_s, beside_s = 12800 / 5e5, 1280 / 5e4, 10 * 160 * 2 / 5e4
    assert cost_of().layer_s(10) == pytest.approx(sqrt(compute_s**2 + read_s**2) + beside_s + 10 * 0.001)


def test_the_head_counts_a_row_per_sequence() -> None:
    assert cost_of().head_s(3) == pytest.approx(sqrt((3 * 160 / 5e5) ** 2 + (160 / 5e4 + 0.001) ** 2))


def test_a_mixture_multiplies_with_few_experts_and_reads_those_that_a_batch_touches() -> None:
    experts = replace(HAND, num_experts=4, num_experts_per_token=2)
    # Two tokens touch 3 of 4 experts: router 32, attention 256, 3 * 384 read; 2 * 384 multiplied with.
    compute_s, read_s = 2 * 2 * (256 + 32 + 768) / 5e5, (256 + 32 + 3 * 384) * 2 / 5e4
    beside_s = 2 * (10 * 8 + 3 * 16 * 2 + 4 * 2 * 4 + 4 * 8 * 2) * 2 / 5e4
    expected_s = sqrt(compute_s**2 + read_s**2) + beside_s + 14 * 0.001
    assert cost_of(experts).layer_s(2) == pytest.approx(expected_s)


def test_attention_of_a_chunk_counts_its_causal_pairs_and_its_keys() -> None:
    # 10 queries after 90 keys: 955 pairs * 4 * head_dim * heads * layers FLOPs; 100 keys * 2*4*2*4*2 bytes.
    compute_s, read_s = 955 * 4 * 4 * 2 * 4 / 2.5e5, 100 * 128 / 5e4
    assert cost_of().attention_s(90, 10) == pytest.approx(sqrt(compute_s**2 + read_s**2))


def test_attention_of_decodes_is_the_reading_of_their_keys() -> None:
    assert cost_of().decode_attention_s(1000) == pytest.approx(1000 * 128 / 5e4)


def test_tiles_that_do_not_split_keys_take_as_long_as_their_fullest_processor() -> None:
    hardware = replace(SLOW, attention_efficiency=0.5)
    tiled = cost_of(hardware=hardware, engine=replace(IDLE_HOST, attention_tile_rows=4))
    # 8 queries of 2 heads are 4 tiles, one on each processor: 4 rows * 95-odd keys at half of a quarter of the peak.
    one_round_s = 4 * (90 + 4.5) * 4 * 4 * 4 / (1e6 / 4 * 0.5)
    assert tiled.attention_s(90, 8) == pytest.approx(sqrt(one_round_s**2 + (98 * 128 / 5e4) ** 2))
    # A ninth query makes six tiles of them: a second round.
    two_rounds_s = 2 * 4 * (90 + 5) * 4 * 4 * 4 / (1e6 / 4 * 0.5)
    assert tiled.attention_s(90, 9) == pytest.approx(sqrt(two_rounds_s**2 + (99 * 128 / 5e4) ** 2))


def test_a_device_full_of_tiles_is_no_faster_than_it_gets() -> None:
    split, tiled = (cost_of(LLAMA_70B, FAST, engine) for engine in (IDLE_HOST, TILED))
    assert tiled.attention_s(1 << 20, 8192) >= split.attention_s(1 << 20, 8192)


def test_an_eighth_of_a_chunk_takes_as_long_as_all_of_it_where_one_round_of_tiles_does() -> None:
    tiled = cost_of(LLAMA_70B, FAST, TILED, tp=8)
    assert tiled.attention_s(1 << 20, 64) == pytest.approx(tiled.attention_s(1 << 20, 512), rel=1e-3)


def test_tensor_parallel_ranks_share_products_and_heads_and_pay_two_all_reduces_a_layer() -> None:
    alone, halved = cost_of(), cost_of(tp=2)
    compute_s, read_s = 6400 / 5e5, 640 / 5e4
    beside_s = 10 * (10 * 8 + (3 * 16 + 4 * 2 * 4) / 2) * 2 / 5e4
    reduce_s = 2 * (0.01 + 2 * 0.5 * 10 * 8 * 2 / 1e4)
    expected_s = sqrt(compute_s**2 + read_s**2) + beside_s + 0.01 + reduce_s
    assert halved.layer_s(10) == pytest.approx(expected_s)
    assert halved.attention_s(90, 10) == pytest.approx(alone.attention_s(90, 10) / 2)
    assert halved.decode_attention_s(100) == pytest.approx(alone.decode_attention_s(100) / 2)


def test_more_ranks_than_kv_heads_repeat_them() -> None:
    shape = replace(HAND, num_heads=4, num_kv_heads=2)
    two, four = (cost_of(shape, tp=tp) for tp in (2, 4))
    assert four.decode_attention_s(100) == pytest.approx(two.decode_attention_s(100))


def test_all_reduces_of_ranks_on_several_nodes_take_the_slower_link() -> None:
    shape = replace(HAND, num_heads=4)
    cost = cost_of(shape, tp=4)
    reduce_s = 2 * (0.1 + 2 * 0.75 * 10 * 8 * 2 / 1e3)
    without_link = replace(SLOW, inter_node=Link(bytes_per_s=1e21, latency_s=0.0))
    assert cost.layer_s(10) - cost_of(shape, without_link, tp=4).layer_s(10) == pytest.approx(reduce_s)


def test_collectives_move_what_they_must() -> None:
    link = Link(bytes_per_s=100.0, latency_s=1.0)
    assert all_reduce_s(link, 4, 200.0) == pytest.approx(1.0 + 2 * 0.75 * 2.0)
    assert all_gather_s(link, 3, 200.0) == pytest.approx(1.0 + 2 * 2.0)
    assert all_reduce_s(link, 1, 200.0) == all_gather_s(link, 1, 200.0) == 0.0


def test_a_hop_inside_a_node_takes_the_faster_link_and_between_nodes_the_slower() -> None:
    cost = cost_of(spp=4)  # two stages per node of two devices
    sent_bytes = 10 * 8 * 2
    assert cost.hop_s(10, 0) == cost.hop_s(10, 2) == pytest.approx(0.01 + sent_bytes / 1e4)
    assert cost.hop_s(10, 1) == pytest.approx(0.1 + sent_bytes / 1e3)


def test_tensor_parallel_ranks_send_a_share_each_and_gather_it_behind_the_hop() -> None:
    share_bytes = 10 * 8 * 2 / 2
    assert cost_of(tp=2, spp=2).hop_s(10, 0) == pytest.approx((0.1 + share_bytes / 1e3) + (0.01 + share_bytes / 1e4))


def test_a_merge_gathers_outputs_and_sums_of_every_layer_and_no_context() -> None:
    # 2 heads * (4 values * 2 bytes + 4 bytes) per token; one other rank, then two, in other nodes.
    assert cost_of(kvp=2).merge_s(10, 2) == pytest.approx(4 * (0.01 + 10 * 24 / 1e4))
    assert cost_of(kvp=4).merge_s(10, 3) == pytest.approx(4 * (0.1 + 2 * 10 * 24 / 1e3))
    assert cost_of(kvp=2).merge_s(10, 1) == 0.0
    # With tp 2 a rank has one head, and the next KVP rank is in the next node.
    assert cost_of(tp=2, kvp=2).merge_s(10, 2) == pytest.approx(4 * (0.1 + 10 * 12 / 1e3))


def test_a_merge_of_512_tokens_of_a_70b_model_is_cheap_inside_a_node_and_dear_across() -> None:
    # 8.5 MB a layer: 1.5 ms over NVLink, 13.6 ms over 50 GB/s for 80 layers (all heads on one link).
    no_latency = replace(
        FAST, intra_node=Link(bytes_per_s=4.5e11, latency_s=0.0), inter_node=Link(bytes_per_s=5e10, latency_s=0.0)
    )
    inside = cost_of(LLAMA_70B, no_latency, kvp=2)
    across = cost_of(LLAMA_70B, replace(no_latency, devices_per_node=1), kvp=2)
    assert inside.merge_s(512, 2) == pytest.approx(1.5e-3, rel=0.02)
    assert across.merge_s(512, 2) == pytest.approx(13.6e-3, rel=0.02)


def test_a_step_alone_is_all_stages_and_hops_one_after_the_other() -> None:
    cost = cost_of(spp=4)
    load = load_of(cost, 90, 10)
    hops_s = sum(cost.hop_s(10, stage) for stage in range(3))
    expected_s = 4 * cost.layer_s(10) + cost.attention_s(90, 10) + cost.head_s(1) + hops_s
    assert cost.step_s(load) == pytest.approx(expected_s)
    assert step_s(cost, load) == pytest.approx(expected_s)


def test_stages_take_layers_as_they_have_them_and_the_last_the_head() -> None:
    cost = cost_of(replace(HAND, num_layers=5), spp=2)
    load = load_of(cost, 90, 10)
    one_layer_s = cost.layer_s(10) + cost.attention_s(90, 10) / 5
    assert cost.stage_s(load, 0) == pytest.approx(3 * one_layer_s)
    assert cost.stage_s(load, 1) == pytest.approx(2 * one_layer_s + cost.head_s(1))


def test_the_host_comes_before_the_first_stage_and_launches_beside_the_device() -> None:
    cost = cost_of(engine=BUSY_HOST, spp=2)
    small, large = load_of(cost, 0, 2), load_of(cost, 100_000, 100)
    assert cost.stage_s(small, 0) == pytest.approx(1.0 + 0.1 + 2 * 2.0)
    assert cost.stage_s(small, 1) == pytest.approx(0.5 + 2 * 2.0)
    assert large.attention_s > 100.0
    assert cost.stage_s(large, 0) == pytest.approx(1.1 + 2 * cost.layer_s(100) + large.attention_s / 2)


def test_decodes_of_short_contexts_launch_as_one_graph_and_others_do_not() -> None:
    cost = cost_of(engine=BUSY_HOST)

    def decodes_s(count: int, context: int) -> float:
        load = StepLoad()
        load.add_decodes(count, count * context, cost.decode_attention_s(count * context))
        return cost.step_s(load)

    device_s = 4 * cost.layer_s(2) + cost.head_s(2)
    assert decodes_s(2, 64) == pytest.approx(1.2 + device_s + cost.decode_attention_s(128))
    assert decodes_s(2, 65) == pytest.approx(1.2 + max(8.0, device_s + cost.decode_attention_s(130)))
    always = cost_of(engine=replace(BUSY_HOST, graph_max_context=None))
    load = StepLoad()
    load.add_decodes(2, 130, 0.0)
    assert always.step_s(load) < 8.0


def test_what_a_scheduler_adds_up_is_never_less_than_the_step_takes() -> None:
    cost = cost_of(engine=BUSY_HOST, spp=2)
    for start, num_tokens in ((0, 2), (90, 10), (100_000, 100)):
        load = load_of(cost, start, num_tokens)
        assert step_s(cost, load) >= cost.step_s(load) - 1e-9


SHAPES = st.sampled_from([(LLAMA_70B, 8), (LLAMA_70B, 1), (MIXTURE, 4)])
ENGINES = st.sampled_from([IDLE_HOST, TILED, replace(BUSY_HOST, name="graphs")])
TOKENS = st.integers(1, 8192)


@given(case=SHAPES, engine=ENGINES, start=st.integers(0, 10_000_000), count=TOKENS, more=TOKENS)
def test_more_tokens_or_more_context_never_take_less_time(
    case: tuple[ModelShape, int], engine: EngineCosts, start: int, count: int, more: int
) -> None:
    shape, tp = case
    cost = cost_of(shape, FAST, engine, tp=tp, spp=4)
    assert cost.linear_s(count, 1) <= cost.linear_s(count + more, 1) <= cost.linear_s(count + more, 2)
    assert cost.attention_s(start, count) <= cost.attention_s(start, count + more)
    assert cost.attention_s(start, count) <= cost.attention_s(start + more, count)
    assert cost.decode_attention_s(start) <= cost.decode_attention_s(start + more)
    assert cost.merge_s(count, 2) <= cost.merge_s(count + more, 2)
    assert cost.step_s(load_of(cost, start, count)) <= cost.step_s(load_of(cost, start, count + more)) + 1e-12


@given(case=SHAPES, engine=ENGINES, start=st.integers(0, 10_000_000), count=TOKENS, decodes=st.integers(0, 256))
def test_no_step_is_faster_than_the_data_sheet(
    case: tuple[ModelShape, int], engine: EngineCosts, start: int, count: int, decodes: int
) -> None:
    shape, tp = case
    cost = cost_of(shape, FAST, engine, tp=tp)
    load = load_of(cost, start, count)
    load.add_decodes(decodes, 1000 * decodes, cost.decode_attention_s(1000 * decodes))
    chunks = [(start, count), *[(999, 1)] * decodes]
    step_s = cost.step_s(load)
    assert mfu(batch_flops(shape, chunks, decodes + 1), FAST, tp, step_s) < 1.0
    keys_read = start + count + 1000 * decodes
    weights = shape.num_layers * shape.num_touched_layer_params(load.num_tokens) * shape.bytes_per_element
    assert mbu(weights + keys_read * shape.kv_bytes_per_token, FAST, tp, step_s) < 1.0


@given(case=SHAPES, start=st.integers(0, 10_000_000), count=TOKENS, spp=st.sampled_from([1, 2, 3, 4, 8]))
def test_stages_divide_the_work_but_none_is_lost(
    case: tuple[ModelShape, int], start: int, count: int, spp: int
) -> None:
    shape, tp = case
    whole, cut = cost_of(shape, FAST, tp=tp), cost_of(shape, FAST, tp=tp, spp=spp)
    load = load_of(whole, start, count)
    stages_s = [cut.stage_s(load, stage) for stage in range(spp)]
    assert sum(stages_s) == pytest.approx(whole.step_s(load))
    layer_s = whole.layer_s(count) + load.attention_s / shape.num_layers
    assert max(stages_s) <= whole.step_s(load) / spp + layer_s + whole.head_s(1)


@given(context=st.integers(1, 10_000_000), kvp=st.sampled_from([2, 4, 8]))
def test_kvp_ranks_divide_the_reading_and_pay_a_merge_that_does_not_grow_with_context(context: int, kvp: int) -> None:
    cost = cost_of(LLAMA_70B, FAST, tp=8, kvp=kvp)
    shard_s = cost.decode_attention_s(context) / kvp
    assert cost.decode_attention_s(context // kvp) <= shard_s + 1e-12
    assert cost.merge_s(1, kvp) < 80 * 5e-5


def test_fp8_weights_halve_reading_and_products_where_the_hardware_multiplies_them() -> None:
    hardware = replace(SLOW, fp8_flops_per_s=2e6, kernel_overhead_s=0.0)
    half = replace(HAND, bytes_per_element=1)
    sixteen_bit, eight_bit = cost_of(HAND, hardware), cost_of(half, hardware)
    beside_s = 10 * 160 * 2 / 5e4  # activations stay as they are
    assert eight_bit.layer_s(10) - beside_s == pytest.approx((sixteen_bit.layer_s(10) - beside_s) / 2)
    assert eight_bit.decode_attention_s(100) == pytest.approx(sixteen_bit.decode_attention_s(100) / 2)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 3}, "parallel.tp=3 must divide model.num_heads=2 of hand"),
        ({"spp": 5}, "parallel.spp=5 must not exceed model.num_layers=4 of hand"),
        ({"spp": 4, "kvp": 8}, "hardware.num_devices=16 of slow: tp=1 x spp=4 x kvp=8 x dp=1 needs 32"),
    ],
)
def test_a_layout_that_model_or_cluster_cannot_have_is_refused(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cost_of(**degrees)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("step_s", -1.0), ("layer_launch_s", float("nan")), ("graph_max_context", -1),
                       ("attention_tile_rows", 0)],
)  # fmt: skip
def test_an_engine_with_a_value_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}={value:g}"):
        replace(BUSY_HOST, **{key: value})


@pytest.mark.parametrize(("key", "value"), [("num_sms", 0), ("memory_bytes", -1.0), ("lone_tile_efficiency", 1.5)])
def test_hardware_with_a_value_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"hardware.{key}={value:g}"):
        replace(SLOW, **{key: value})


def test_a_link_without_bandwidth_is_refused() -> None:
    with pytest.raises(ConfigError, match="hardware.inter_node.bytes_per_s=0"):
        replace(SLOW, inter_node=Link(bytes_per_s=0.0))


def test_neighbours_within_a_node_have_its_links_and_one_device_more_has_not() -> None:
    assert SLOW.link(2) is SLOW.intra_node and SLOW.link(3) is SLOW.inter_node


def test_only_types_of_one_byte_are_multiplied_at_the_speed_of_fp8_and_only_where_it_is_known() -> None:
    fp8 = replace(SLOW, fp8_flops_per_s=3e6)
    assert [fp8.matmul_flops_per_s(num_bytes) for num_bytes in (1, 2, 4)] == [3e6, 1e6, 1e6]
    assert SLOW.matmul_flops_per_s(1) == 1e6


def test_two_ranks_pay_for_a_collective_and_a_message_costs_its_latency_and_its_bytes() -> None:
    link = Link(bytes_per_s=100.0, latency_s=1.0)
    assert all_reduce_s(link, 2, 200.0) == 1.0 + 2 * 0.5 * 2.0
    assert all_gather_s(link, 2, 200.0) == 1.0 + 2.0
    assert send_s(link, 200.0) == 3.0


@pytest.mark.parametrize(
    ("shape", "degrees", "message"),
    [
        (HAND, {"tp": 3}, "parallel.tp=3 must divide model.num_heads=2 of hand"),
        (
            replace(HAND, num_heads=6, num_kv_heads=2), {"tp": 3},
            "parallel.tp=3 must divide, or be a multiple of, model.num_kv_heads=2 of hand",
        ),
        (
            replace(HAND, num_heads=6, num_kv_heads=3), {"tp": 2},
            "parallel.tp=2 must divide, or be a multiple of, model.num_kv_heads=3 of hand",
        ),
        (HAND, {"spp": 5}, "parallel.spp=5 must not exceed model.num_layers=4 of hand"),
    ],
)  # fmt: skip
def test_a_cut_that_no_engine_makes_is_refused_in_full(
    shape: ModelShape, degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        cost_of(shape, **degrees)
    assert str(error.value) == message


def test_ranks_may_hold_several_kv_heads_or_repeat_one_and_a_stage_may_be_one_layer() -> None:
    shape = replace(HAND, num_heads=8, num_kv_heads=4)
    for degrees in ({"tp": 1}, {"tp": 2}, {"tp": 4}, {"tp": 8}, {"spp": 4}):
        assert cost_of(shape, **degrees).revision == 0
