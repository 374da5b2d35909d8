"""The native passes between products against torch's own in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_pointwise import NativeActivation, NativeNorm
from megatron_medha.model.megatron_config import ACTIVATIONS

# One rounding to the output's dtype, and for fp32 the rounding of some sums and of the exponential.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [(0, 1, 64), (1, 1, 512), (3, 1, 17), (40, 2, 100), (300, 1, 512)])
def test_an_rms_norm_is_the_plain_one(native: NativeAttention, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = NativeNorm(weight, 1e-5, target=native.target)(x)
    expected = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    assert out.dtype == dtype and out.shape == x.shape
    assert ((out.double() - expected).abs() <= RELATIVE[dtype] * expected.abs()).all()


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [(0, 1, 8), (1, 1, 3072), (5, 1, 34), (300, 1, 1024)])
def test_a_gated_silu_is_the_plain_one(native: NativeAttention, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    out = NativeActivation(target=native.target)(x)
    gate, up = x.double().chunk(2, dim=-1)
    expected = F.silu(gate) * up
    assert out.dtype == dtype and out.shape == expected.shape
    # e^-x of x = 80 takes x with it: its relative error is that of the product x * log2(e).
    assert ((out.double() - expected).abs() <= (RELATIVE[dtype] + 1e-5) * expected.abs() + 1e-30).all()


def test_extremes_and_what_is_not_a_number_come_out_as_in_torch(native: NativeAttention) -> None:
    gate = torch.tensor([0.0, -1e30, 1e30, -200.0, 200.0, torch.inf, torch.nan, -88.0])
    out = NativeActivation(target=native.target)(torch.cat((gate, torch.ones(8))))
    assert torch.equal(out.isnan(), F.silu(gate).isnan())
    assert torch.allclose(out, F.silu(gate), rtol=1e-5, atol=1e-36, equal_nan=True)
    norm = NativeNorm(torch.ones(2), 1e-5, target=native.target)(torch.tensor([[1.0, torch.nan]]))
    assert norm.isnan().all()


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("shape", [(0, 1, 64), (1, 1, 512), (3, 1, 17), (300, 1, 100)])
def test_a_layer_norm_is_the_plain_one(native: NativeAttention, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    out = NativeNorm(weight, 1e-5, bias, is_centred=True, target=native.target)(x)
    expected = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    assert out.dtype == dtype and out.shape == x.shape
    assert ((out.double() - expected).abs() <= RELATIVE[dtype] * expected.abs() + 1e-5).all()


PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {**ACTIVATIONS, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(("kind", "has_gate"), [(kind, has_gate) for kind in PLAIN for has_gate in (False, True)])
def test_every_activation_is_the_plain_one(
    native: NativeAttention, kind: str, has_gate: bool, dtype: torch.dtype
) -> None:
    x = torch.cat((torch.linspace(-12.0, 12.0, 4001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]))).to(dtype)
    out = NativeActivation(kind, has_gate=has_gate, target=native.target)(torch.cat((x, x)) if has_gate else x)
    expected = PLAIN[kind](x.double()) * (x.double() if has_gate else 1.0)
    # Far below 0 torch's own differences of nearly equal numbers are off by 1e-16 times x.
    assert ((out.double() - expected).abs() <= (RELATIVE[dtype] + 2e-5) * expected.abs() + 1e-12).all()


def test_a_gate_may_be_cut_off_and_moved(native: NativeAttention) -> None:
    gate, up = torch.randn(2, 7, 50) * 3
    activation = NativeActivation("quick_gelu", clamp=2.0, gate_offset=1.0, target=native.target)
    expected = ACTIVATIONS["quick_gelu"](gate.clamp(max=2.0)) * (up.clamp(-2.0, 2.0) + 1.0)
    assert torch.allclose(activation(torch.cat((gate, up), dim=-1)), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(native: NativeAttention) -> None:
    with pytest.raises(ValueError, match="width 3"):
        NativeNorm(torch.ones(3), 1e-5, target=native.target)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="neither"):
        NativeActivation(target=native.target)(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="known are silu, gelu"):
        NativeActivation("tanh", target=native.target)
