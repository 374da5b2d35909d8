"""Counts that cost and memory follow from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
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
