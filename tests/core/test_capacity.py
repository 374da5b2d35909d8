"""What fits on a device, by hand and by law, and what is said where it does not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_medha.core.cost.capacity import (
    MemoryBudget,
    check_devices,
    check_layout,
    cluster_for,
    num_blocks_in,
    num_kv_blocks,
    stage_footprint,
)
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

# One layer: attention weights 8 * 4 * (2*2 + 2*2) = 256, MLP 3 * 8 * 16 = 384; head and embedding 8 * 10 = 80 each.
HAND = ModelShape(
    name="hand", num_layers=4, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=4,
    vocab_size=10, max_context_len=1000,
)  # fmt: skip
DEVICES = Hardware(
    name="devices", flops_per_s=1e6, memory_bytes_per_s=1e5, memory_bytes=20_000.0, num_devices=16, devices_per_node=4
)
RESERVE = MemoryBudget(block_size=2, utilisation=0.5, max_batch_tokens=3, max_num_sequences=2)
LLAMA_70B = ModelShape(
    name="llama3_70b", num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
H100S = Hardware(
    name="h100_x128", flops_per_s=989e12, memory_bytes_per_s=3.35e12, memory_bytes=8.49e10, num_devices=128,
    devices_per_node=8,
)  # fmt: skip


def test_a_rank_holds_its_layers_and_the_ends_hold_embedding_and_head() -> None:
    layout = ParallelLayout(spp=3)  # 2, 1 and 1 layers
    first, middle, last = (stage_footprint(HAND, DEVICES, layout, stage, RESERVE) for stage in range(3))
    assert first.weights == (2 * 640 + 80) * 2
    assert middle.weights == 640 * 2
    assert last.weights == (640 + 80) * 2
    assert first.block == 2 * middle.block == 2 * (2 * 2 * 4) * 2 * 2
    # 3 tokens * (4*8 + (2*2+2*2)*4 + 3*16) values of 2 bytes; 2 rows of 10 logits of 4 bytes on the last stage.
    assert middle.activations == 3 * 112 * 2
    assert last.activations == 3 * 112 * 2 + 2 * 10 * 4
    assert first.budget == 10_000


def test_kv_in_one_byte_takes_half_the_memory_and_weights_stay_as_they_are() -> None:
    fp8_kv = replace(HAND, kv_bytes_per_element=1)
    half, whole = (stage_footprint(shape, DEVICES, ParallelLayout(), 0, RESERVE) for shape in (fp8_kv, HAND))
    assert (2 * half.block, half.weights) == (whole.block, whole.weights)
    assert 2 * fp8_kv.kv_bytes_per_token == HAND.kv_bytes_per_token
    assert num_blocks_in(fp8_kv, ParallelLayout(), 1.0, 2) == 2 * num_blocks_in(HAND, ParallelLayout(), 1.0, 2)


def test_blocks_are_what_the_fullest_stage_has_left() -> None:
    # All on one rank: 10,000 - (4*640 + 160) * 2 - (672 + 80) bytes, by blocks of 4 layers * 16 values * 2 * 2 bytes.
    assert num_kv_blocks(HAND, DEVICES, ParallelLayout(), RESERVE) == (10_000 - 5440 - 752) // 256


def test_tied_embeddings_are_held_once_where_both_ends_are_one_rank() -> None:
    tied = replace(HAND, has_tied_embeddings=True)
    assert stage_footprint(tied, DEVICES, ParallelLayout(), 0, RESERVE).weights == (4 * 640 + 80) * 2
    assert stage_footprint(tied, DEVICES, ParallelLayout(spp=2), 1, RESERVE).weights == (2 * 640 + 80) * 2


def test_tensor_parallel_ranks_cut_weights_and_kv_heads_but_no_head_in_two() -> None:
    shape = replace(HAND, num_heads=4)
    one, two, four = (stage_footprint(shape, DEVICES, ParallelLayout(tp=tp), 0, RESERVE) for tp in (1, 2, 4))
    assert two.weights == one.weights / 2 and four.weights == one.weights / 4
    assert two.block == one.block / 2 and four.block == two.block


def test_all_experts_are_held_though_few_are_used() -> None:
    experts = replace(HAND, num_experts=4, num_experts_per_token=2)
    weights = stage_footprint(experts, DEVICES, ParallelLayout(), 0, RESERVE).weights
    assert weights == (4 * (256 + 8 * 4 + 4 * 384) + 160) * 2


def test_a_70b_model_fits_eight_h100_with_a_million_tokens_to_spare_but_not_one() -> None:
    # 70.6B weights of 2 bytes over 8 devices: 17.6 GB each; 40 KiB of KV per token and rank.
    num_blocks = num_kv_blocks(LLAMA_70B, H100S, ParallelLayout(tp=8), MemoryBudget())
    assert 1_300_000 < num_blocks * 16 < 1_450_000
    with pytest.raises(ConfigError, match="no room for a KV block"):
        num_kv_blocks(LLAMA_70B, H100S, ParallelLayout(), MemoryBudget())


def test_weights_that_do_not_fit_are_refused_with_the_numbers_and_the_smallest_layout_that_does() -> None:
    with pytest.raises(ConfigError) as error:
        num_kv_blocks(LLAMA_70B, H100S, ParallelLayout(), MemoryBudget())
    message = str(error.value)
    assert "llama3_70b on h100_x128 with tp=1 spp=1 kvp=1 does not fit" in message
    assert "may use 71.2 GiB; weights take 131.4, activations of 8192 tokens" in message
    assert message.endswith("parallel.tp=2 parallel.spp=1 parallel.kvp=1 would fit")


def test_a_prompt_that_does_not_fit_is_refused_with_what_would_hold_it() -> None:
    with pytest.raises(ConfigError) as error:
        num_kv_blocks(LLAMA_70B, H100S, ParallelLayout(tp=8), MemoryBudget(), num_tokens=4_000_000)
    message = str(error.value)
    assert "not 4,000,000" in message
    assert message.endswith("would fit")


def test_a_cluster_that_is_too_small_is_told_how_large_it_would_have_to_be() -> None:
    with pytest.raises(ConfigError, match=r"on 32 devices instead of the 8 there are"):
        num_kv_blocks(
            LLAMA_70B, replace(H100S, num_devices=8), ParallelLayout(tp=8), MemoryBudget(), num_tokens=4_000_000
        )


def test_kvp_ranks_are_given_up_only_where_the_cluster_is_too_small_for_them() -> None:
    asked = ParallelLayout(tp=1, kvp=4)
    with pytest.raises(ConfigError, match=r"parallel.tp=2 parallel.spp=1 parallel.kvp=4 would fit$"):
        num_kv_blocks(LLAMA_70B, replace(H100S, num_devices=16), asked, MemoryBudget())
    with pytest.raises(ConfigError, match=r"parallel.tp=2 parallel.spp=1 parallel.kvp=2 would fit$"):
        num_kv_blocks(LLAMA_70B, replace(H100S, num_devices=4), asked, MemoryBudget())


def test_a_model_that_no_layout_holds_is_refused_with_that() -> None:
    why = r"\. No layout of such devices holds it; take a smaller model or larger devices$"
    with pytest.raises(ConfigError, match=why):
        num_kv_blocks(HAND, replace(DEVICES, memory_bytes=1_000.0), ParallelLayout(), RESERVE)


def test_devices_of_unknown_memory_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        num_kv_blocks(HAND, replace(DEVICES, memory_bytes=None), ParallelLayout(), RESERVE)
    assert str(error.value) == (
        "hardware.memory_bytes=null of devices: nothing can be laid out on a device of unknown memory; "
        "give bytes, or take another hardware"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("utilisation", 0.0), ("utilisation", 1.5), ("block_size", 0), ("max_batch_tokens", 0)]
)
def test_a_reserve_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"memory.{key}={value:g}"):
        replace(RESERVE, **{key: value})


LAYOUTS = st.builds(
    ParallelLayout,
    tp=st.sampled_from([1, 2, 4, 8]),
    spp=st.sampled_from([1, 2, 3, 5, 8]),
    kvp=st.sampled_from([1, 2, 4]),
)


@given(layout=LAYOUTS, num_tokens=st.sampled_from([1, 1_000_000, 8_000_000]), gigabytes=st.integers(10, 200))
def test_the_way_out_fits_indeed(layout: ParallelLayout, num_tokens: int, gigabytes: int) -> None:
    hardware = replace(H100S, memory_bytes=gigabytes * 1e9, num_devices=1024)
    try:
        num_blocks = num_kv_blocks(LLAMA_70B, hardware, layout, MemoryBudget(), num_tokens=num_tokens)
    except ConfigError as error:
        found = re.search(r"parallel.tp=(\d+) parallel.spp=(\d+) parallel.kvp=(\d+) would fit", str(error))
        assume(found is not None)
        assert found is not None
        tp, spp, kvp = map(int, found.groups())
        larger = replace(hardware, num_devices=1 << 20)
        way_out = ParallelLayout(tp=tp, spp=spp, kvp=kvp)
        assert way_out != layout
        assert num_kv_blocks(LLAMA_70B, larger, way_out, MemoryBudget(), num_tokens=num_tokens) >= 1
    else:
        assert num_blocks * 16 * layout.kvp >= num_tokens
        for stage in range(layout.spp):
            footprint = stage_footprint(LLAMA_70B, hardware, layout, stage, MemoryBudget())
            assert footprint.weights + footprint.activations + num_blocks * footprint.block <= footprint.budget


@given(layout=LAYOUTS)
def test_the_stages_of_a_layout_hold_every_weight_once(layout: ParallelLayout) -> None:
    total = sum(
        stage_footprint(LLAMA_70B, H100S, layout, stage, MemoryBudget()).weights * layout.tp
        for stage in range(layout.spp)
    )
    assert total == pytest.approx(LLAMA_70B.num_params * 2)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ParallelLayout(tp=16), "tp=16 must divide model.num_kv_heads=8"),
        (ParallelLayout(spp=3), "spp=3 must divide model.num_layers=80"),
        (ParallelLayout(tp=16, spp=3), "num_kv_heads=8.*; parallel.spp=3 must divide"),
        (ParallelLayout(tp=128), "model.num_heads=64, model.num_kv_heads=8"),
    ],
)
def test_degrees_that_do_not_divide_a_model_are_refused_with_every_reason(layout: ParallelLayout, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_layout(LLAMA_70B, replace(DEVICES, num_devices=1 << 20), layout)


GIB = 1 << 30


def test_kv_memory_in_gib_holds_the_blocks_of_the_stage_with_the_most_layers() -> None:
    # A token's KV: 4 layers * 2 heads * 4 values * 2 (K and V) * 2 bytes = 128 bytes; a block of 2 tokens 256.
    assert num_blocks_in(HAND, ParallelLayout(), 1.0, 2) == GIB // 256
    assert num_blocks_in(HAND, ParallelLayout(), 0.5, 4) == GIB // 2 // 512
    assert num_blocks_in(HAND, ParallelLayout(spp=2), 1.0, 2) == GIB // 128
    assert num_blocks_in(HAND, ParallelLayout(spp=3), 1.0, 2) == GIB // 128, "2, 1 and 1 layers"
    assert num_blocks_in(HAND, ParallelLayout(kvp=2), 1.0, 2) == GIB // 256, "of each KVP rank"


def test_kv_memory_in_gib_is_cut_by_tensor_ranks_up_to_the_number_of_kv_heads() -> None:
    shape = replace(HAND, num_heads=8)
    blocks = [num_blocks_in(shape, ParallelLayout(tp=tp), 1.0, 2) for tp in (1, 2, 4, 8)]
    assert blocks == [GIB // 256, GIB // 128, GIB // 128, GIB // 128]


@given(
    tp=st.sampled_from([1, 2, 4, 8]), spp=st.sampled_from([1, 2, 3, 4]), num_kv_heads=st.sampled_from([1, 2, 4]),
    block_size=st.sampled_from([1, 16]),
)  # fmt: skip
def test_blocks_are_as_large_on_a_server_as_in_a_plan(tp: int, spp: int, num_kv_heads: int, block_size: int) -> None:
    shape = replace(HAND, num_heads=8, num_kv_heads=num_kv_heads, ffn_hidden_size=64)
    layout = ParallelLayout(tp=tp, spp=spp)
    reserve = replace(RESERVE, block_size=block_size)
    largest = max(stage_footprint(shape, DEVICES, layout, stage, reserve).block for stage in range(spp))
    assert num_blocks_in(shape, layout, 1.0, block_size) == GIB // largest


def test_kv_memory_for_one_block_is_enough_and_less_is_refused_with_what_a_block_takes() -> None:
    assert num_blocks_in(HAND, ParallelLayout(), 256 / GIB, 2) == 1
    with pytest.raises(ConfigError) as error:
        num_blocks_in(LLAMA_70B, ParallelLayout(tp=8), 0.0005, 16)
    assert str(error.value) == (
        "model.kv_memory_gib=0.0005: too small for one block of 16 tokens, which takes 0.00061 GiB on each device"
    )


def test_a_single_device_stands_for_as_many_as_are_needed_and_a_cluster_for_itself() -> None:
    layout = ParallelLayout(tp=2, spp=3, dp=2)
    assert cluster_for(replace(DEVICES, num_devices=1), layout).num_devices == 12
    assert cluster_for(replace(DEVICES, num_devices=2), layout).num_devices == 2


def test_a_layout_may_take_all_devices_and_not_one_more() -> None:
    check_devices(replace(DEVICES, num_devices=8), ParallelLayout(tp=2, spp=2, kvp=2))
    with pytest.raises(ConfigError) as error:
        check_devices(replace(DEVICES, num_devices=7), ParallelLayout(tp=2, spp=2, kvp=2))
    assert str(error.value) == (
        "hardware.num_devices=7 of devices: tp=2 x spp=2 x kvp=2 x dp=1 needs 8; "
        "take a larger cluster or smaller degrees"
    )


def test_degrees_that_do_not_divide_are_named_with_those_that_would() -> None:
    shape = replace(HAND, num_heads=12, num_kv_heads=4, ffn_hidden_size=18)
    with pytest.raises(ConfigError) as error:
        check_layout(shape, DEVICES, ParallelLayout(tp=3, spp=3))
    assert str(error.value) == (
        "parallel.tp=3 must divide model.num_kv_heads=4 of hand; tp=2 and its divisors divide all that tp shares out; "
        "parallel.spp=3 must divide model.num_layers=4 of hand"
    )
    with pytest.raises(ConfigError, match=r"^parallel.tp=4 must divide model.ffn_hidden_size=18 of hand; tp=2 and "):
        check_layout(shape, DEVICES, ParallelLayout(tp=4))


def budget_for(num_blocks: int) -> Hardware:
    """Devices that have room for exactly so many blocks."""
    footprint = stage_footprint(HAND, DEVICES, ParallelLayout(), 0, RESERVE)
    needed = footprint.weights + footprint.activations + num_blocks * footprint.block
    return replace(DEVICES, memory_bytes=needed / RESERVE.utilisation)


def test_one_block_is_enough_to_run_and_one_byte_less_is_not() -> None:
    assert num_kv_blocks(HAND, budget_for(1), ParallelLayout(), RESERVE) == 1
    less = budget_for(1)
    assert less.memory_bytes is not None
    with pytest.raises(ConfigError, match="no room for a KV block"):
        num_kv_blocks(HAND, replace(less, memory_bytes=less.memory_bytes - 2), ParallelLayout(), RESERVE)


def test_a_prompt_may_take_all_blocks_of_all_kvp_ranks_and_is_refused_by_the_numbers_if_it_needs_more() -> None:
    layout = ParallelLayout(kvp=3)
    hardware = budget_for(5)
    assert num_kv_blocks(HAND, hardware, layout, RESERVE, num_tokens=5 * 2 * 3) == 5
    with pytest.raises(ConfigError) as error:
        num_kv_blocks(HAND, replace(hardware, devices_per_node=1), layout, RESERVE, num_tokens=5 * 2 * 3 + 1)
    assert str(error.value) == (
        "hand on devices with tp=1 spp=1 kvp=3 does not fit: a rank of stage 0 may use 0.0 GiB; weights take 0.0, "
        "activations of 3 tokens 0.0; the rest holds 30 tokens on 3 KVP rank(s), not 31. "
        "parallel.tp=1 parallel.spp=1 parallel.kvp=4 would fit"
    )


def test_the_fullest_stage_is_named_with_what_it_holds() -> None:
    large = replace(LLAMA_70B, vocab_size=1 << 21, num_layers=4)  # the head's logits, beside little else
    with pytest.raises(ConfigError) as error:
        num_kv_blocks(large, replace(H100S, memory_bytes=2.5e10), ParallelLayout(spp=2), MemoryBudget(utilisation=0.5))
    message = str(error.value)
    assert "a rank of stage 1 may use 11.6 GiB; weights take 35.2, activations of 8192 tokens 4.1" in message


def test_the_way_out_changes_as_little_as_it_can() -> None:
    # Two devices hold it, cut by tp or by stages: the one that changes fewer degrees, then the one with fewer stages.
    hardware = replace(H100S, memory_bytes=1.7e11, devices_per_node=8)
    with pytest.raises(ConfigError, match=r"parallel.tp=2 parallel.spp=1 parallel.kvp=1 would fit$"):
        num_kv_blocks(LLAMA_70B, replace(hardware, memory_bytes=8.5e10), ParallelLayout(), MemoryBudget())
    with pytest.raises(ConfigError, match=r"parallel.tp=1 parallel.spp=2 parallel.kvp=1 would fit$"):
        num_kv_blocks(
            LLAMA_70B, replace(hardware, memory_bytes=8.5e10, devices_per_node=1), ParallelLayout(), MemoryBudget()
        )


def test_a_larger_node_than_there_is_is_no_way_out_but_one_that_was_asked_for_is() -> None:
    lone = replace(H100S, devices_per_node=1)
    with pytest.raises(ConfigError, match=r"parallel.tp=4 parallel.spp=1 parallel.kvp=2 would fit$"):
        num_kv_blocks(LLAMA_70B, lone, ParallelLayout(tp=4), MemoryBudget(), num_tokens=700_000)


POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def best_layout(hardware: Hardware, asked: ParallelLayout, num_tokens: int) -> ParallelLayout | None:
    """By trying all: within the cluster, with the KVP ranks asked for, few devices, little changed, few stages."""
    found = []
    for tp in (tp for tp in POWERS if tp <= max(hardware.devices_per_node, asked.tp) and not WIDE.num_kv_heads % tp):
        for spp in (1, 2, 4):
            for kvp in sorted({*POWERS, asked.kvp}):
                layout = replace(asked, tp=tp, spp=spp, kvp=kvp)
                stages = [stage_footprint(WIDE, hardware, layout, stage, RESERVE).num_blocks for stage in range(spp)]
                if min(stages) >= 1 and min(stages) * RESERVE.block_size * kvp >= num_tokens:
                    is_larger = layout.world_size > hardware.num_devices
                    num_changed = (tp != asked.tp) + (spp != asked.spp) + (kvp != asked.kvp)
                    order = (is_larger, max(0, asked.kvp - kvp), layout.world_size, num_changed, spp, kvp)
                    found.append((order, layout))
    return min(found, key=lambda pair: pair[0])[1] if found else None


WIDE = replace(HAND, num_heads=8, num_kv_heads=8)


@settings(max_examples=60)
@given(
    tp=st.sampled_from([1, 2, 4, 8]), spp=st.sampled_from([1, 2, 4]), kvp=st.sampled_from([1, 2, 3, 6]),
    dp=st.sampled_from([1, 2]), memory=st.sampled_from([3_000, 6_000, 9_000, 15_000, 30_000]),
    num_devices=st.sampled_from([48, 64]), node=st.sampled_from([1, 2, 8]),
    num_tokens=st.sampled_from([1, 30, 100, 500, 4_000]),
)  # fmt: skip
def test_the_layout_that_is_suggested_is_the_best_of_all(
    tp: int, spp: int, kvp: int, dp: int, memory: int, num_devices: int, node: int, num_tokens: int
) -> None:
    hardware = replace(DEVICES, memory_bytes=float(memory), num_devices=num_devices, devices_per_node=node)
    asked = ParallelLayout(tp=tp, spp=spp, kvp=kvp, dp=dp)
    assume(asked.world_size <= num_devices)
    try:
        num_kv_blocks(WIDE, hardware, asked, RESERVE, num_tokens=num_tokens)
    except ConfigError as error:
        best = best_layout(hardware, asked, num_tokens)
        if best is None:
            assert str(error).endswith(". No layout of such devices holds it; take a smaller model or larger devices")
            return
        more = f", on {best.world_size} devices instead of the {num_devices} there are"
        assert str(error).endswith(
            f". parallel.tp={best.tp} parallel.spp={best.spp} parallel.kvp={best.kvp} would fit"
            + more * (best.world_size > num_devices)
        )
