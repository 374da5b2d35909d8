"""The native passes between products against torch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_pointwise import NativePointwise

# One rounding to the output's dtype, and for fp32 the rounding of some sums and of the exponential.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [(0, 1, 64), (1, 1, 512), (3, 1, 17), (40, 2, 100), (300, 1, 512)])
def test_an_rms_norm_is_the_plain_one(native: NativeAttention, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = NativePointwise(native.target).rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    assert out.dtype == dtype and out.shape == x.shape
    assert ((out.double() - expected).abs() <= RELATIVE[dtype] * expected.abs()).all()


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [(0, 1, 8), (1, 1, 3072), (5, 1, 34), (300, 1, 1024)])
def test_a_gated_silu_is_the_plain_one(native: NativeAttention, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    out = NativePointwise(native.target).gated_silu(x)
    gate, up = x.double().chunk(2, dim=-1)
    expected = F.silu(gate) * up
    assert out.dtype == dtype and out.shape == expected.shape
    # e^-x of x = 80 takes x with it: its relative error is that of the product x * log2(e).
    assert ((out.double() - expected).abs() <= (RELATIVE[dtype] + 1e-5) * expected.abs() + 1e-30).all()


def test_extremes_and_what_is_not_a_number_come_out_as_in_torch(native: NativeAttention) -> None:
    gate = torch.tensor([0.0, -1e30, 1e30, -200.0, 200.0, torch.inf, torch.nan, -88.0])
    out = NativePointwise(native.target).gated_silu(torch.cat((gate, torch.ones(8))))
    assert torch.equal(out.isnan(), F.silu(gate).isnan())
    assert torch.allclose(out, F.silu(gate), rtol=1e-5, atol=1e-36, equal_nan=True)
    norm = NativePointwise(native.target).rms_norm(torch.tensor([[1.0, torch.nan]]), torch.ones(2), 1e-5)
    assert norm.isnan().all()


def test_weights_that_do_not_fit_are_refused(native: NativeAttention) -> None:
    pointwise = NativePointwise(native.target)
    for weight in (torch.ones(3), torch.ones(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="width 4"):
            pointwise.rms_norm(torch.ones(2, 4), weight, 1e-5)
    with pytest.raises(ValueError, match="neither"):
        pointwise.gated_silu(torch.ones(2, 4, dtype=torch.float64))
