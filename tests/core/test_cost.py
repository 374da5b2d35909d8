"""The roofline by hand-computed numbers."""

from __future__ import annotations

import pytest

from megatron_medha.core.cost.step_cost import Hardware, RooflineCost, StepLoad, step_s
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

# One layer: attention weights 8 * 4 * (2*2 + 2*1) = 192, MLP 3 * 8 * 16 = 384; head 8 * 10 = 80.
SHAPE = ModelShape(
    name="hand", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
    vocab_size=10, max_context_len=1000,
)  # fmt: skip
HARDWARE = Hardware(
    name="hand", flops_per_s=1e6, memory_bytes_per_s=1e5, linear_efficiency=0.5, attention_efficiency=0.25,
    memory_efficiency=0.5, step_overhead_s=1.0, layer_overhead_s=0.1, chunk_overhead_s=0.01,
)  # fmt: skip
COST = RooflineCost(shape=SHAPE, hardware=HARDWARE)


def test_the_shape_counts_its_weights_and_kv_bytes() -> None:
    assert SHAPE.num_layer_params == 576 and SHAPE.num_head_params == 80
    assert SHAPE.num_params == 2 * 576 + 2 * 80
    assert SHAPE.kv_bytes_per_token == 2 * 2 * 1 * 4 * 2


def test_a_small_step_is_bound_by_reading_the_weights() -> None:
    # (2 * 576 + 80) * 2 bytes = 2464 bytes at 5e4 bytes/s; FLOPs of one token: 2 * 1232 / 5e5 = 0.0049 s
    assert COST.linear_s(1, 1) == pytest.approx(1.0 + 0.2 + 0.01 + 2464 / 5e4)


def test_a_large_step_is_bound_by_flops() -> None:
    assert COST.linear_s(100, 3) == pytest.approx(1.2 + 0.03 + 2 * (100 * 1152 + 3 * 80) / 5e5)


def test_attention_of_a_chunk_counts_its_causal_pairs() -> None:
    # 10 queries after 90 keys: 10 * 95.5 pairs * 4 * head_dim * heads * layers FLOPs; 100 keys * 32 bytes
    assert COST.attention_s(90, 10) == pytest.approx(955 * 4 * 4 * 2 * 2 / 2.5e5)
    assert COST.attention_s(999, 1) == pytest.approx(max(1000 * 64 / 2.5e5, 1000 * 32 / 5e4))


def test_attention_of_decodes_is_the_reading_of_their_keys() -> None:
    assert COST.decode_attention_s(1000) == pytest.approx(1000 * 32 / 5e4)


def test_tensor_parallel_ranks_share_weights_and_flops_but_no_kv_head_twice() -> None:
    halved = RooflineCost(shape=SHAPE, hardware=HARDWARE, layout=ParallelLayout(tp=2))
    assert halved.linear_s(100, 0) - 1.2 == pytest.approx((COST.linear_s(100, 0) - 1.2) / 2)
    assert halved.attention_s(90, 10) == pytest.approx(COST.attention_s(90, 10) / 2)
    assert halved.decode_attention_s(1000) == pytest.approx(COST.decode_attention_s(1000))


def test_a_step_is_its_linear_part_and_the_attention_of_its_chunks() -> None:
    load = StepLoad()
    load.add_chunk(90, 10, COST.attention_s(90, 10))
    load.add_decodes(2, 300, COST.decode_attention_s(300))
    assert (load.num_tokens, load.num_sequences, load.decode_context) == (12, 3, 300)
    assert (load.chunk_pairs, load.chunk_context) == (955.0, 100)
    expected_s = COST.linear_s(12, 3) + COST.attention_s(90, 10) + COST.decode_attention_s(300)
    assert step_s(COST, load) == pytest.approx(expected_s)


def test_a_chunk_taken_out_leaves_the_load_as_it_was() -> None:
    load = StepLoad()
    load.add_chunk(5, 7, 0.25)
    load.add_chunk(90, 10, 0.5)
    load.remove_chunk(90, 10, 0.5)
    alone = StepLoad()
    alone.add_chunk(5, 7, 0.25)
    assert load == alone
