"""What a linear layer or a router gives a token does not depend on how many tokens are computed with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_medha.model.native_parts import pack_routers, use_native_parts
from megatron_medha.model.packed_linear import OneDnnLinear, _operators_exist, pack_linears
from megatron_medha.parallel.groups import MedhaPGs
from tests.model.test_experts import VARIANTS, hidden_states, pair, pgs  # noqa: F401

NUM_ROWS = 300
# Inputs and outputs of the tiny model, of models of 28 and 135 million parameters, and of their parts at tp=2 and 4;
# odd ones; and those of routers and gates.
SHAPES = [
    (64, 384), (64, 192), (128, 64), (64, 32), (96, 200), (100, 96), (64, 509), (64, 128), (64, 255), (33, 17), (16, 5),
    (512, 768), (512, 384), (256, 512), (512, 1536), (768, 512), (384, 512), (576, 960), (768, 576),
    (64, 8), (512, 64), (64, 1), (576, 1),
]  # fmt: skip


@pytest.mark.skipif(not _operators_exist(), reason="this torch has no packed linear operators")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_linear_layer_of_onednn_in_fp32_gives_a_row_the_same_bits_beside_any_number_of_others(
    num_threads: int,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_inputs, num_outputs in SHAPES:
            generator = torch.Generator().manual_seed(num_inputs * num_outputs)
            layer = OneDnnLinear(torch.randn(num_outputs, num_inputs, generator=generator), None)
            rows = torch.randn(NUM_ROWS, num_inputs, generator=generator)
            whole = layer(rows)
            step = 1 if num_inputs * num_outputs < 50_000 else 13
            for count in (*range(1, 34), *range(34, NUM_ROWS, step)):
                assert torch.equal(layer(rows[:count].clone()), whole[:count]), (num_inputs, num_outputs, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_experts_give_a_token_the_same_bits_beside_any_number_of_others(
    name: str, dtype: torch.dtype, pgs: MedhaPGs  # noqa: F811
) -> None:
    options: dict[str, Any] = VARIANTS[name]
    _, layer = pair(pgs, dtype, **options)
    for put in (pack_linears, use_native_parts, pack_routers):
        put(layer)
    hidden = hidden_states(NUM_ROWS, dtype)
    whole, _bias = layer(hidden)
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129, 255):
        output, _bias = layer(hidden[:count].clone())
        assert torch.equal(output, whole[:count]), count
