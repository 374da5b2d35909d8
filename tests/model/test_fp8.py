"""FP8 linear layers as torch computes them; Transformer Engine's need a GPU."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.model.fp8 import ScaledLinear, check_fp8, quantise_linears, quantised_rows, why_fp8_fails
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import build_groups, init_distributed


def test_quantised_rows_are_within_a_sixteenth_whatever_the_rows_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 64) * torch.logspace(-20, 20, 20, base=2)[:, None]
    values, scales = quantised_rows(x)
    error = (values.float() * scales - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scales * 2.0**-9)).all()


@pytest.mark.parametrize("shape", [(1, 1, 64), (7, 1, 64)])
def test_a_scaled_linear_layer_is_the_product_to_fp8s_accuracy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16(), torch.randn(shape).bfloat16()
    found, no_bias = ScaledLinear(weight, bias)(x)
    expected = x.float() @ weight.float().t() + bias.float()
    assert no_bias is None
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    # Two operands, each off by 1/16 at most and 1/40 in the mean square, errors independent over 64 terms.
    assert (found.float() - expected).norm() < 0.06 * expected.norm()


def test_every_linear_layer_of_the_decoder_is_replaced_and_said_so(caplog: Any) -> None:
    config = ModelConfig(
        name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=128, max_context_len=64, norm_epsilon=1e-5, rope_theta=1e4,
    )  # fmt: skip
    device = torch.device("cpu")
    init_distributed(ParallelLayout(), 0, device=device)
    model = build_model(config, dtype=torch.bfloat16, device=device, pgs=build_groups(ParallelLayout()))
    with caplog.at_level(logging.WARNING):
        quantise_linears(model, "tensorwise", False)
    linears = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    replaced = [m for m in linears if isinstance(vars(m).get("forward"), ScaledLinear)]
    assert len(replaced) == 8
    assert len(linears) == 9  # the output layer stays
    assert "fp8_backend library=torch_scaled_mm" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("tensorwise", torch.float32, True, 1), "needs model.dtype=bfloat16"),
        (("blockwise", torch.bfloat16, False, 1), "needs Transformer Engine"),
        (("tensorwise", torch.bfloat16, False, 2), "only with parallel.tp=1"),
    ],
)
def test_a_recipe_that_cannot_be_had_is_refused(arguments: tuple[str, torch.dtype, bool, int], why: str) -> None:
    recipe, dtype, has_transformer_engine, tp = arguments
    with pytest.raises(ConfigError, match=why):
        check_fp8(recipe, dtype=dtype, has_transformer_engine=has_transformer_engine, tp=tp)


class TELinear(torch.nn.Module):
    """Named as Megatron names Transformer Engine's layers, of a library that lacks a kernel."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.fails = 32, 16, fails
        self.weight = torch.nn.Parameter(torch.ones(16, 32, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.fails:
            raise OSError("no kernel image is available")
        return x @ self.weight.t(), None


@pytest.mark.parametrize("fails", [False, True])
def test_an_fp8_layer_without_a_kernel_is_found_before_the_first_request(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config, layer: contextlib.nullcontext())
    model = SimpleNamespace(decoder=torch.nn.Sequential(TELinear(False), TELinear(fails)), config=None)
    model.decoder[1].out_features = 48  # another kind
    reason = why_fp8_fails(model)
    assert reason == ("TELinear: OSError: no kernel image is available" if fails else None)
