"""Packed linear layers against plain ones, and what packing leaves of a model's memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.native_build import NativeUnavailable, native_library
from megatron_medha.model import packed_linear
from megatron_medha.model.build import build_model
from megatron_medha.model.native_parts import use_native_parts
from megatron_medha.model.packed_linear import (
    OneDnnLinear,
    PackedLinear,
    _operators_exist,
    linear_kernel,
    pack_linears,
)
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import build_groups, init_distributed

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not _operators_exist(), reason="this torch has no packed linear operators")


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 300])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_is_the_plain_one(num_tokens: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight_OI, bias_O = torch.randn(96, 200).to(dtype), torch.randn(96).to(dtype) if has_bias else None
    input_T1I = torch.randn(num_tokens, 1, 200).to(dtype)
    with torch.inference_mode():
        output, bias = PackedLinear(OneDnnLinear, weight_OI, bias_O)(input_T1I)
    expected = F.linear(input_T1I, weight_OI, bias_O)
    assert bias is None and output.shape == expected.shape and output.dtype == dtype
    # Sums of 200 products of size 1; bf16 outputs of size 14 keep 8 bits.
    assert torch.allclose(output, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.13)


@pytest.mark.parametrize("is_tied", [False, True])
def test_packing_gives_up_row_major_weights_but_never_an_embedding(is_tied: bool) -> None:
    init_distributed(ParallelLayout(), 0, device=CPU)
    config = ModelConfig(
        name="packed",
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=128,
        max_context_len=64,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        has_tied_embeddings=is_tied,
    )
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=build_groups(ParallelLayout()))
    token_ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(token_ids, None, None)
        pack_linears(model)
        after = model(token_ids, None, None)
    assert torch.allclose(before, after, rtol=0, atol=1e-5)
    assert {name for name, weight in model.named_parameters() if weight.dim() == 2 and weight.numel()} == {
        "embedding.word_embeddings.weight"
    }


def test_every_weight_has_the_dtype_asked_for() -> None:
    init_distributed(ParallelLayout(), 0, device=CPU)
    config = ModelConfig(
        name="dtype",
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=128,
        max_context_len=64,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        has_qk_norm=True,
    )
    model = build_model(config, dtype=torch.bfloat16, device=CPU, pgs=build_groups(ParallelLayout()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_bf16_layers_are_native_and_fp32_ones_are_onednns() -> None:
    try:
        native_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    assert linear_kernel("auto", torch.bfloat16) is linear_kernel("native", torch.bfloat16) is NativeLinear
    assert linear_kernel("onednn", torch.bfloat16) is OneDnnLinear
    assert linear_kernel("auto", torch.float32) is linear_kernel("onednn", torch.float32) is OneDnnLinear
    with pytest.raises(ConfigError, match="linear_backend=native: needs model.dtype=bfloat16, not float32"):
        linear_kernel("native", torch.float32)


def test_without_a_native_library_bf16_layers_take_onednn_and_say_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise NativeUnavailable("there is no C++ compiler")

    monkeypatch.setattr(packed_linear, "native_library", fail)
    assert linear_kernel("auto", torch.bfloat16) is OneDnnLinear
    assert "there is no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="linear_backend=native: cannot be had here: there is no C\\+\\+ compiler"):
        linear_kernel("native", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_native_passes_computes_what_it_did_before(dtype: torch.dtype) -> None:
    init_distributed(ParallelLayout(), 0, device=CPU)
    config = ModelConfig(
        name="passes",
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=128,
        max_context_len=64,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        has_qk_norm=True,
    )
    model = build_model(config, dtype=dtype, device=CPU, pgs=build_groups(ParallelLayout()))
    layer, hidden_T1C = model.decoder.layers[0], torch.randn(5, 1, 64).to(dtype)

    def computed() -> list[torch.Tensor]:
        normed_T1C = layer.pre_mlp_layernorm(hidden_T1C)
        return [normed_T1C, layer._mlp(normed_T1C), layer.self_attention.q_layernorm(hidden_T1C[..., :16])]

    with torch.inference_mode():
        before = computed()
        use_native_parts(model)
        after = computed()
    for plain, native in zip(before, after, strict=True):
        # Torch's bf16 activation rounds twice, the native one once; sums of 96 such products cancel in part.
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * plain.abs().max()
        assert (plain.float() - native.float()).abs().max() <= tolerance


@pytest.mark.parametrize("num_inputs", [64, 1000, 1024, 1025, 1376, 2048, 5000])
def test_in_fp32_a_row_has_the_same_bits_whatever_rows_are_beside_it(num_inputs: int) -> None:
    linear, input_T1I = OneDnnLinear(torch.randn(130, num_inputs), None), torch.randn(70, 1, num_inputs)
    whole = linear(input_T1I)
    for num_rows in (1, 2, 3, 8, 33, 64):
        assert torch.equal(linear(input_T1I[5 : 5 + num_rows]), whole[5 : 5 + num_rows]), num_rows
    assert linear(input_T1I[0, 0]).shape == (130,)
