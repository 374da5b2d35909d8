"""FLOPs and bytes by hand, and the laws between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.cost.utilisation import (
    attention_flops,
    batch_bytes,
    batch_flops,
    matmul_flops,
    mbu,
    mfu,
    prefill_flops,
)
from megatron_medha.core.model_shape import ModelShape

# One layer: attention weights 8 * 4 * (2*2 + 2*1) = 192, MLP 3 * 8 * 16 = 384; head 8 * 10 = 80.
HAND = ModelShape(
    name="hand", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
    vocab_size=10, max_context_len=1000,
)  # fmt: skip
LLAMA_8B = ModelShape(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128256, max_context_len=1 << 20,
)  # fmt: skip
DEVICE = Hardware(name="device", flops_per_s=1e6, memory_bytes_per_s=1e5, fp8_flops_per_s=2e6)


def test_products_count_every_token_in_every_layer_and_sampled_rows_in_the_head() -> None:
    assert matmul_flops(HAND, num_tokens=10, num_sampled=3) == 2 * (10 * 2 * 576 + 3 * 80)


def test_attention_counts_each_query_with_the_keys_up_to_its_own() -> None:
    # 3 queries after 5 keys: 6 + 7 + 8 pairs; scores and values: 4 FLOPs per pair, value, head and layer.
    assert attention_flops(HAND, 5, 3) == 4 * 2 * 2 * 4 * (6 + 7 + 8)


def test_a_million_tokens_of_8b_take_as_many_flops_as_the_field_counts() -> None:
    assert prefill_flops(LLAMA_8B, 1 << 20) == pytest.approx(3.05e17, rel=0.01)


def test_an_expert_that_is_not_picked_counts_nothing() -> None:
    experts = ModelShape(
        name="experts", num_layers=1, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
        vocab_size=10, max_context_len=1000, num_experts=4, num_experts_per_token=2,
    )  # fmt: skip
    assert matmul_flops(experts, 1, 0) == 2 * (192 + 8 * 4 + 2 * 384)


def test_a_step_reads_weights_once_per_replica_and_reads_and_writes_kv() -> None:
    # A decode after 5 tokens reads 6 keys and writes one; 3 tokens after 5 read 8 and write 3; 32 bytes each.
    weights = (2 * 576 + 80) * 2
    assert batch_bytes(HAND, [(5, 1), (5, 3)], num_sampled=1) == weights + (7 + 11) * 32
    assert batch_bytes(HAND, [(5, 1)], num_sampled=1, num_replicas=2) == 2 * weights + 7 * 32
    assert batch_bytes(HAND, [(5, 3)], num_sampled=0) == 2 * 576 * 2 + 11 * 32


def test_shares_are_of_the_peak_of_all_devices() -> None:
    assert mfu(4e6, DEVICE, num_devices=2, seconds=4.0) == pytest.approx(0.5)
    assert mfu(4e6, DEVICE, num_devices=2, seconds=4.0, bytes_per_element=1) == pytest.approx(0.25)
    assert mbu(4e5, DEVICE, num_devices=2, seconds=4.0) == pytest.approx(0.5)


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_however_a_prompt_is_cut_its_flops_are_the_same(sizes: list[int]) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    chunks = list(zip(starts, sizes))
    assert batch_flops(LLAMA_8B, chunks, num_sampled=1) == prefill_flops(LLAMA_8B, sum(sizes))


@given(sizes=st.lists(st.integers(1, 500), min_size=2, max_size=20))
def test_a_prompt_in_chunks_reads_more_than_in_one(sizes: list[int]) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    cut = sum(batch_bytes(LLAMA_8B, [chunk], num_sampled=0) for chunk in zip(starts, sizes))
    assert cut > batch_bytes(LLAMA_8B, [(0, sum(sizes))], num_sampled=0)
