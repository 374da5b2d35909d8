"""Weights rounded to int8, and where that is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.native_build import NativeUnavailable, native_library
from megatron_medha.model import int8_weights
from megatron_medha.model.int8_weights import check_weight_dtype, int8_linear


@pytest.fixture(autouse=True)
def _native() -> None:
    try:
        native_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def weight_of(linear: int8_weights.NativeLinear) -> torch.Tensor:
    """What the layer multiplies by, column by column."""
    return linear(torch.eye(linear.num_inputs).bfloat16()).float().T


def test_a_rounded_weight_is_within_half_a_step_of_its_outputs_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_weights, "_SLICE_OUTPUTS", 8)  # several slices
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
    monkeypatch.setattr(int8_weights.dist, "all_reduce", lambda largest, op, group: largest.copy_(largest_of_all))
    rounded = [weight_of(int8_linear(part.contiguous(), None, group=object())) for part in parts]
    assert torch.equal(torch.cat(rounded, dim=1), weight_of(int8_linear(weight_OI, None)))


def test_a_model_in_another_dtype_than_bfloat16_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs model.dtype=bfloat16, not float32"):
        check_weight_dtype("int8", dtype=torch.float32)


def test_a_machine_without_the_native_library_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NativeUnavailable("there is no C++ compiler")

    monkeypatch.setattr(int8_weights, "native_library", fail)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        check_weight_dtype("int8", dtype=torch.bfloat16)
