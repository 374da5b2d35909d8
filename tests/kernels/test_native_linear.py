"""Native linear layers against plain ones."""

from __future__ import annotations

import pytest
import torch

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_linear import NativeLinear


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 12, 13, 100, 300])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 64), (1, 2), (200, 300), (65, 513), (320, 17)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_native_linear_is_the_plain_one_rounded_once(
    native: NativeAttention, num_tokens: int, num_outputs: int, num_inputs: int, has_bias: bool
) -> None:
    weight_OI = torch.randn(num_outputs, num_inputs).bfloat16()
    bias_O = torch.randn(num_outputs).bfloat16() if has_bias else None
    input_T1I = torch.randn(num_tokens, 1, num_inputs).bfloat16()
    output = NativeLinear(weight_OI, bias_O, native.target)(input_T1I)
    exact = input_T1I.double() @ weight_OI.double().T + (0.0 if bias_O is None else bias_O.double())
    assert output.shape == exact.shape and output.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, and fp32 sums of up to 513 products of size 1.
    assert ((output.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_a_tokens_output_does_not_depend_on_how_many_others_there_are(native: NativeAttention) -> None:
    linear = NativeLinear(torch.randn(130, 600).bfloat16(), None, native.target)
    input_TI = torch.randn(200, 600).bfloat16()
    whole = linear(input_TI)
    for rows in (slice(0, 1), slice(3, 7), slice(100, 112), slice(50, 190)):
        assert torch.equal(linear(input_TI[rows]), whole[rows])


def test_other_dtypes_and_sizes_are_refused(native: NativeAttention) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        NativeLinear(torch.zeros(4, 4), None, native.target)
    linear = NativeLinear(torch.zeros(4, 4, dtype=torch.bfloat16), None, native.target)
    for wrong in (torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="4 bfloat16 inputs"):
            linear(wrong)


def test_what_is_not_a_number_stays_so(native: NativeAttention) -> None:
    linear = NativeLinear(torch.ones(3, 4, dtype=torch.bfloat16), None, native.target)
    output = linear(torch.tensor([[1.0, torch.nan, 0.0, 0.0], [torch.inf, 0.0, 0.0, 0.0]]).bfloat16())
    assert output[0].isnan().all() and output[1].isposinf().all()


@pytest.mark.parametrize("num_tokens", [1, 7, 12, 13, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 2), (65, 513), (320, 17)])
def test_an_int8_linear_is_the_plain_one_over_the_scaled_weight(
    native: NativeAttention, num_tokens: int, num_outputs: int, num_inputs: int
) -> None:
    weight_OI = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8)
    scale_O, bias_O = torch.rand(num_outputs) / 128, torch.randn(num_outputs).bfloat16()
    input_TI = torch.randn(num_tokens, num_inputs).bfloat16()
    output = NativeLinear(weight_OI, bias_O, native.target, scale_O=scale_O)(input_TI)
    exact = input_TI.double() @ (weight_OI.double() * scale_O[:, None].double()).T + bias_O.double()
    assert ((output.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_an_int8_linears_token_does_not_depend_on_how_many_others_there_are(native: NativeAttention) -> None:
    weight_OI = torch.randint(-127, 128, (130, 600), dtype=torch.int8)
    linear = NativeLinear(weight_OI, None, native.target, scale_O=torch.rand(130))
    input_TI = torch.randn(200, 600).bfloat16()
    whole = linear(input_TI)
    for rows in (slice(0, 1), slice(3, 7), slice(100, 112), slice(50, 190)):
        assert torch.equal(linear(input_TI[rows]), whole[rows])
