"""Counts that cost and memory follow from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.cost.capacity import num_blocks_in
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

# Router 8 * 4; an expert 3 * 8 * 16 = 384; attention 8 * 4 * (2*2 + 2*1) = 192.
EXPERTS = ModelShape(
    name="experts", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
    vocab_size=10, max_context_len=1000, num_experts=4, num_experts_per_token=2,
)  # fmt: skip


def test_a_mixture_has_all_its_experts_but_multiplies_with_few() -> None:
    assert EXPERTS.num_layer_params == 192 + 32 + 4 * 384
    assert EXPERTS.num_active_layer_params == 192 + 32 + 2 * 384
    assert EXPERTS.num_active_params == 2 * (192 + 32 + 2 * 384) + 80


def test_the_first_token_touches_its_own_experts_and_the_second_half_of_the_rest() -> None:
    assert EXPERTS.num_experts_touched(1) == pytest.approx(2.0)
    assert EXPERTS.num_experts_touched(2) == pytest.approx(3.0)
    assert EXPERTS.num_touched_layer_params(2) == pytest.approx(192 + 32 + 3 * 384)


@given(num_tokens=st.integers(1, 10_000))
def test_more_tokens_touch_more_experts_but_never_more_than_there_are(num_tokens: int) -> None:
    fewer, more = (EXPERTS.num_experts_touched(count) for count in (num_tokens, num_tokens + 1))
    assert 2.0 <= fewer <= more <= 4.0


@given(num_layers=st.integers(1, 200), spp=st.integers(1, 32))
def test_stages_share_all_layers_and_differ_by_one_at_most(num_layers: int, spp: int) -> None:
    shape = ModelShape(
        name="any", num_layers=num_layers, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
        vocab_size=10, max_context_len=1000,
    )  # fmt: skip
    stages = [shape.num_stage_layers(stage, spp) for stage in range(spp)]
    assert sum(stages) == num_layers
    assert stages == sorted(stages, reverse=True) and stages[0] - stages[-1] <= 1


@pytest.mark.parametrize("per_token", [0, 5])
def test_a_router_that_picks_more_experts_than_there_are_is_refused(per_token: int) -> None:
    with pytest.raises(ConfigError, match=f"num_experts_per_token={per_token} must be between 1 and"):
        ModelShape(
            name="bad", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
            vocab_size=10, max_context_len=1000, num_experts=4, num_experts_per_token=per_token,
        )  # fmt: skip


# DeepSeek's pattern: a dense layer first, then experts beside one that every token goes through.
MIXED = ModelShape(
    name="mixed", num_layers=4, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
    vocab_size=10, max_context_len=1000, num_experts=4, num_experts_per_token=2, shared_ffn_hidden_size=32,
    num_dense_layers=1, dense_ffn_hidden_size=64, num_vector_params=5,
)  # fmt: skip
MIXTURE_LAYER = 192 + 32 + 4 * 384 + 3 * 8 * 32
DENSE_LAYER = 192 + 3 * 8 * 64


def test_layers_with_and_without_experts_are_counted_each() -> None:
    assert MIXED.num_params_of_layers(0, 4) == DENSE_LAYER + 3 * MIXTURE_LAYER + 4 * 5
    assert MIXED.num_params_of_layers(0, 2) == DENSE_LAYER + MIXTURE_LAYER + 2 * 5
    assert MIXED.num_params_of_layers(2, 2) == 2 * (MIXTURE_LAYER + 5)
    assert MIXED.num_params == MIXED.num_params_of_layers(0, 4) + 2 * 80


def test_a_layer_is_the_average_of_all() -> None:
    assert MIXED.num_layer_params == round((DENSE_LAYER + 3 * MIXTURE_LAYER) / 4)
    active = 192 + 32 + 2 * 384 + 3 * 8 * 32
    assert MIXED.num_active_layer_params == round((DENSE_LAYER + 3 * active) / 4)
    assert MIXED.num_touched_layer_params(1) == pytest.approx((DENSE_LAYER + 3 * active) / 4)


def test_the_widest_layer_decides_how_many_numbers_a_token_needs() -> None:
    assert MIXED.num_mlp_numbers == 3 * max(2 * 16 + 32, 64)


def test_an_mlp_without_a_gate_has_two_matrices_and_learned_positions_a_table() -> None:
    shape = ModelShape(
        name="gpt", num_layers=2, hidden_size=8, ffn_hidden_size=32, num_heads=2, num_kv_heads=2, head_dim=4,
        vocab_size=10, max_context_len=100, num_mlp_matrices=2, num_learned_positions=100, has_tied_embeddings=True,
    )  # fmt: skip
    assert shape.num_params == 2 * (256 + 2 * 8 * 32) + 80 + 100 * 8


@pytest.mark.parametrize("num_dense_layers", [-1, 2])
def test_a_mixture_has_a_layer_with_experts(num_dense_layers: int) -> None:
    with pytest.raises(ConfigError, match=f"num_dense_layers={num_dense_layers} must be below"):
        ModelShape(
            name="bad", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
            vocab_size=10, max_context_len=1000, num_experts=4, num_dense_layers=num_dense_layers,
        )  # fmt: skip


def test_latent_attention_caches_one_key_for_all_heads_which_no_rank_shares_out() -> None:
    dense = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 100, "max_context_len": 1000}
    latent = ModelShape(
        name="latent", num_heads=8, num_kv_heads=8, head_dim=24, latent_dim=40, num_latent_params=1000, **dense
    )
    assert latent.kv_bytes_per_token == 2 * 2 * 40 * 2  # keys and values, layers, numbers, bytes
    assert latent.num_attention_params == 1000
    one, eight = (num_blocks_in(latent, ParallelLayout(tp=tp), 1.0, 16) for tp in (1, 8))
    assert one == eight == (1 << 30) // (16 * latent.kv_bytes_per_token)
