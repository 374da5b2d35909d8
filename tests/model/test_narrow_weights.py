"""Weights rounded to int8 and int4, and where that is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.native_build import NativeUnavailable, native_library
from megatron_medha.model import narrow_weights
from megatron_medha.model.narrow_weights import check_weight_dtype, int4_linear, int8_linear


@pytest.fixture(autouse=True)
def _native() -> None:
    try:
        native_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def weight_of(linear: narrow_weights.NativeLinear) -> torch.Tensor:
    """What the layer multiplies by, column by column."""
    return linear(torch.eye(linear.num_inputs).bfloat16()).float().T


def test_a_rounded_weight_is_within_half_a_step_of_its_outputs_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "_SLICE_OUTPUTS", 8)  # several slices
    torch.manual_seed(0)
    weight_OI = (torch.randn(20, 64) * torch.logspace(-20, 20, 20, base=2)[:, None]).bfloat16()
    weight_OI[3] = 0.0
    step_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True) / 127
    error = (weight_of(int8_linear(weight_OI, None)) - weight_OI.float()).abs()
    assert (error <= step_O1 / 2 + weight_OI.float().abs() * 2**-8).all()  # and its outputs are bf16


def test_parts_of_a_row_parallel_weight_round_as_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(20, 64).bfloat16()
    parts = weight_OI.split(32, dim=1)
    largest_of_all = weight_OI.abs().amax(dim=1).float()
    monkeypatch.setattr(narrow_weights.dist, "all_reduce", lambda largest, op, group: largest.copy_(largest_of_all))
    rounded = [weight_of(int8_linear(part.contiguous(), None, group=object())) for part in parts]
    assert torch.equal(torch.cat(rounded, dim=1), weight_of(int8_linear(weight_OI, None)))


def test_a_weight_in_int4_is_within_a_step_of_its_groups_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "_INT4_SLICE_OUTPUTS", 8)
    torch.manual_seed(0)
    weight_OI = (torch.randn(20, 100) * torch.logspace(-20, 20, 20, base=2)[:, None]).bfloat16()
    weight_OI[3], weight_OI[5, 32:64] = 0.0, 0.0
    parts = weight_OI.float().split(32, dim=1)
    step_OI = torch.cat([part.abs().amax(dim=1, keepdim=True).expand(part.shape) / 7 for part in parts], dim=1)
    rounded_OI = weight_of(int4_linear(weight_OI, None))
    assert ((rounded_OI - weight_OI.float()).abs() <= step_OI).all()
    assert not rounded_OI[3].any() and not rounded_OI[5, 32:64].any()
    error = (rounded_OI - weight_OI.float())[10].norm() / weight_OI[10].float().norm()
    assert error < 0.09  # of a normal distribution; a scale of the largest alone gives 0.095


def test_what_int4_can_hold_is_kept_exactly() -> None:
    weight_OI = torch.arange(-8, 8).repeat(4, 4).bfloat16() * torch.tensor([[1.0], [2.0**-9], [-4.0], [0.0]])
    weight_OI = weight_OI.bfloat16()
    assert torch.equal(weight_of(int4_linear(weight_OI, None)), weight_OI.float())


def test_parts_of_an_int4_weight_round_as_the_whole_does() -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(20, 128).bfloat16()
    rounded = [weight_of(int4_linear(part.contiguous(), None)) for part in weight_OI.split(64, dim=1)]
    assert torch.equal(torch.cat(rounded, dim=1), weight_of(int4_linear(weight_OI, None)))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_model_in_another_dtype_than_bfloat16_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"weight_dtype={name}: needs model.dtype=bfloat16, not float32"):
        check_weight_dtype(name, dtype=torch.float32)


def test_a_machine_without_the_native_library_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NativeUnavailable("there is no C++ compiler")

    monkeypatch.setattr(narrow_weights, "native_library", fail)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        check_weight_dtype("int8", dtype=torch.bfloat16)
