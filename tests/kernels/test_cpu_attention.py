"""The ATen backend's own functions: prefixes and chunks with their log-sum-exps."""

from __future__ import annotations

import pytest
import torch
from paged_world import TOLERANCE

from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import LayerKV
from megatron_medha.kernels.attention.cpu_attention import ReadPlan, attend_chunk, attend_prefix


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_an_empty_prefix_has_lse_minus_infinity_and_does_not_kill_the_process(num_tokens: int) -> None:
    layer = LayerKV(torch.empty(2, 64, 8), torch.empty(2, 64, 8))
    out, lse = attend_prefix(torch.randn(num_tokens, 2, 3, 8), layer, ReadPlan(0, num_tokens, (), None), 1.0)
    assert out.shape == (num_tokens, 2, 3, 8)
    assert not out.any()
    assert lse.shape == (num_tokens, 2, 3)
    assert lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [[], [(5, 1)], [(7, 90)], [(0, 40), (100, 60), (200, 9)]])
def test_log_sum_exps_are_those_of_the_scaled_scores(prefix: list[tuple[int, int]], dtype: torch.dtype) -> None:
    layer = LayerKV(*torch.randn(2, 2, 256, 32).to(dtype))
    q_TKGD, k_TKD, v_TKD = torch.randn(7, 2, 3, 32).to(dtype), *torch.randn(2, 7, 2, 32).to(dtype)
    out, lse = attend_chunk(q_TKGD, k_TKD, v_TKD, layer, ReadPlan(0, 7, tuple(prefix), None), 0.2)
    slots = [slot for first, count in prefix for slot in range(first, first + count)]
    expected_THD, expected_lse_TH = reference.attention(
        q_TKGD.flatten(1, 2),
        torch.cat((layer.k[:, slots].transpose(0, 1), k_TKD)),
        torch.cat((layer.v[:, slots].transpose(0, 1), v_TKD)),
        0.2,
        is_causal=True,
    )
    assert lse.dtype == torch.float32
    # The kernel's bf16 path takes its exponentials from a shorter polynomial: 2e-5 seen.
    lse_tolerance = 1e-5 if dtype == torch.float32 else 1e-4
    assert (lse.flatten(1, 2).double() - expected_lse_TH).abs().max() < lse_tolerance
    assert (out.flatten(1, 2).double() - expected_THD).abs().max() < TOLERANCE[dtype]
