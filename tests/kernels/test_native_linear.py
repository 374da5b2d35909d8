"""Native linear layers against plain ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from native_targets import native_of

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear import native_linear
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.sliced_linear import tree_sum


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


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(130, 600), (64, 64), (500, 96)])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_tokens_output_does_not_depend_on_how_many_others_there_are(
    native: NativeAttention, num_outputs: int, num_inputs: int, kind: str
) -> None:
    if kind == "int8":
        weight_OI = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
        linear = NativeLinear(weight_OI, None, native.target, scale=torch.rand(num_outputs))
    elif kind == "int4":
        linear = int4_of(*int4_weight(num_outputs, num_inputs), native.target)
    else:
        linear = NativeLinear(torch.randn(num_outputs, num_inputs).bfloat16(), None, native.target)
    input_TI = torch.randn(300, num_inputs).bfloat16()
    whole = linear(input_TI)
    for num_rows in (*range(1, 51), 63, 64, 65, 95, 96, 97, 128, 255, 256, 257, 299):
        first = num_rows * 7 % (301 - num_rows)
        rows = slice(first, first + num_rows)
        assert torch.equal(linear(input_TI[rows]), whole[rows]), f"{num_rows} rows"


def test_threads_change_no_bit(native: NativeAttention) -> None:
    linear = NativeLinear(torch.randn(1000, 2048).bfloat16(), None, native.target)
    input_TI = torch.randn(200, 2048).bfloat16()
    before = torch.get_num_threads()
    try:
        outputs = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            outputs.append(linear(input_TI))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("num_tokens", [1, 5, 9, 16, 17, 40, 70])
@pytest.mark.parametrize("target", ["AMX", "AVX512_BF16"])
def test_products_of_bf16_and_their_plain_version_give_the_same_bits(target: str, num_tokens: int) -> None:
    tiles, plain = native_of(target).target, native_of(f"{target}_PLAIN").target
    weight_OI, input_TI = torch.randn(130, 333).bfloat16(), torch.randn(num_tokens, 333).bfloat16()
    input_TI[0, :20] *= 1e-38  # denormal products
    assert torch.equal(NativeLinear(weight_OI, None, tiles)(input_TI), NativeLinear(weight_OI, None, plain)(input_TI))


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
    output = NativeLinear(weight_OI, bias_O, native.target, scale=scale_O)(input_TI)
    exact = input_TI.double() @ (weight_OI.double() * scale_O[:, None].double()).T + bias_O.double()
    assert ((output.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def int4_weight(num_outputs: int, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of -8 to 7, and scales [O, groups] of 5 significant bits, of either sign."""
    weight_OI = torch.randint(-8, 8, (num_outputs, num_inputs), dtype=torch.int8)
    fraction_OG = torch.randint(16, 32, (num_outputs, -(-num_inputs // 32))) * (torch.randint(0, 2, (1,)) * 2 - 1)
    return weight_OI, (fraction_OG * 2.0 ** torch.randint(-12, -6, fraction_OG.shape)).bfloat16()


def int4_of(
    weight_OI: torch.Tensor, scale_OG: torch.Tensor, target: str, bias_O: torch.Tensor | None = None
) -> NativeLinear:
    return NativeLinear(weight_OI, bias_O, target, scale=scale_OG)


@pytest.mark.parametrize("num_tokens", [1, 7, 12, 13, 17, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 2), (65, 513), (320, 17), (64, 320)])
def test_an_int4_linear_has_the_bits_of_the_bf16_one_over_the_scaled_weight(
    native: NativeAttention, num_tokens: int, num_outputs: int, num_inputs: int
) -> None:
    weight_OI, scale_OG = int4_weight(num_outputs, num_inputs)
    scaled_OI = weight_OI.bfloat16() * scale_OG.repeat_interleave(32, dim=1)[:, :num_inputs]  # exact
    bias_O, input_TI = torch.randn(num_outputs).bfloat16(), torch.randn(num_tokens, num_inputs).bfloat16()
    output = int4_of(weight_OI, scale_OG, native.target, bias_O)(input_TI)
    assert torch.equal(output, NativeLinear(scaled_OI, bias_O, native.target)(input_TI))


def test_layers_keep_their_weights_while_others_are_made_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    native = native_of("AVX2")
    monkeypatch.setattr(native_linear, "_PIECE_BYTES", 100_000)
    input_TI = torch.randn(3, 70).bfloat16()
    weights = [torch.randn(10 + 90 * i, 70).bfloat16() for i in range(12)]
    layers = [NativeLinear(weight_OI, None, native.target) for weight_OI in weights]
    expected = [layer(input_TI) for layer in layers]
    del layers[::3]
    more = [NativeLinear(torch.randn(200, 70).bfloat16(), None, native.target) for _ in range(9)]
    del expected[::3]
    assert len(more) == 9
    assert all(torch.equal(layer(input_TI), output) for layer, output in zip(layers, expected))
    assert all(layer.weight.values % 64 == 0 for layer in layers)


def sliced_parts(
    kind: str, num_outputs: int, num_inputs: int, num_slices: int, target: str
) -> Callable[[int], list[NativeLinear]]:
    """The same random layer with a bias, shared out among so many ranks, each with its slices."""
    bias_O, scale = torch.randn(num_outputs).bfloat16(), torch.rand(num_outputs) / 100
    weight_OI = torch.randn(num_outputs, num_inputs).bfloat16()
    if kind == "int8":
        weight_OI = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    elif kind == "int4":
        weight_OI, scale = int4_weight(num_outputs, num_inputs)

    def parts(tp: int) -> list[NativeLinear]:
        scales = {"bf16": [None] * tp, "int8": [scale] * tp, "int4": scale.chunk(tp, dim=-1)}[kind]
        return [
            NativeLinear(part_OI, bias_O, target, scale=of_part, num_slices=num_slices // tp)
            for part_OI, of_part in zip(weight_OI.chunk(tp, dim=1), scales, strict=True)
        ]

    return parts


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_sums_of_ranks_slices_added_up_in_a_tree_have_the_bits_of_one_rank(native: NativeAttention, kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(6):
        num_slices, num_outputs = rng.choice((2, 4, 8)), rng.choice((1, 64, 130, 200))
        num_inputs = num_slices * (32 * rng.randint(1, 9) if kind == "int4" else rng.randint(1, 300))
        parts = sliced_parts(kind, num_outputs, num_inputs, num_slices, native.target)
        (whole,) = parts(1)
        input_TI = torch.randn(300, num_inputs).bfloat16()
        expected = whole(input_TI)
        if kind != "int8":  # whose slices are scaled already
            assert torch.equal(whole.finished(tree_sum(whole.slice_sums(input_TI))), expected)
        for tp in (1, 2, 4, 8)[: num_slices.bit_length()]:
            ranks = parts(tp)
            for num_rows in (1, rng.randint(2, 20), rng.randint(21, 299)):
                inputs = input_TI[:num_rows].chunk(tp, dim=1)
                sums = tree_sum([part.sums(x) for part, x in zip(ranks, inputs, strict=True)])
                assert torch.equal(ranks[-1].finished(sums), expected[:num_rows]), (num_inputs, tp, num_rows)


def test_a_number_of_slices_that_does_not_divide_the_inputs_is_refused(native: NativeAttention) -> None:
    with pytest.raises(ValueError, match="4 slices of 34 inputs"):
        NativeLinear(torch.zeros(4, 34, dtype=torch.bfloat16), None, native.target, num_slices=4)
    weight_OI, scale_OG = int4_weight(4, 96)
    with pytest.raises(ValueError, match="2 slices of 96 inputs: each must be a multiple of 32"):
        NativeLinear(weight_OI, None, native.target, scale=scale_OG, num_slices=2)
