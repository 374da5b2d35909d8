"""Packed parallel linear layers beside Megatron's own: biases that are returned, sums over ranks, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.fp8 import quantise_linears
from megatron_medha.model.packed_linear import _operators_exist, pack_linears
from megatron_medha.parallel.groups import init_distributed

pytestmark = pytest.mark.skipif(not _operators_exist(), reason="this torch has no packed linear operators")


@dataclass(frozen=True)
class Member:
    """Stands in for the tensor-parallel group of a rank; sums over its ranks are made by the test."""

    number: int
    of: int

    def size(self) -> int:
        """Ranks."""
        return self.of

    def rank(self) -> int:
        """This one."""
        return self.number


ALONE = Member(0, 1)

@pytest.fixture(autouse=True)
def one_process() -> None:
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))


def layer(kind: type, group: Any, *, is_expert: bool = False, skip_bias_add: bool = False) -> Any:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True, perform_initialization=False
    )
    split = {"gather_output": False} if kind is ColumnParallelLinear else {"input_is_parallel": True}
    made = kind(
        32, 48, config=config, init_method=nn.init.zeros_, bias=True, skip_bias_add=skip_bias_add, is_expert=is_expert,
        tp_group=group, **split,
    )  # fmt: skip
    torch.manual_seed(0)
    whole_OI = torch.randn(48, 32)
    with torch.no_grad():
        rank, tp = group.rank(), group.size()
        made.weight.copy_(whole_OI.chunk(tp, dim=0 if kind is ColumnParallelLinear else 1)[rank])
        made.bias.copy_(torch.arange(48.0).chunk(tp if kind is ColumnParallelLinear else 1)[0])
    return made


class Holder(nn.Module):
    """What pack_linears takes: a model of one layer."""

    share_embeddings_and_output_weights = False

    def __init__(self, only: nn.Module) -> None:
        super().__init__()
        self.decoder = only


def packed(only: Any, sum_over_tp: Any = None) -> Any:
    only.requires_grad_(False)
    pack_linears(Holder(only), sum_over_tp)
    return only


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_a_packed_layer_returns_the_bias_that_megatrons_own_returns(kind: type, skip_bias_add: bool) -> None:
    only, input_T1I = layer(kind, ALONE, skip_bias_add=skip_bias_add), torch.randn(5, 1, 32)
    with torch.no_grad():
        expected, expected_bias = only(input_T1I)
        output, bias = packed(only)(input_T1I)
    assert torch.allclose(output, expected, rtol=0, atol=1e-4)
    assert (bias is None) == (expected_bias is None) == (not skip_bias_add)
    assert bias is None or torch.equal(bias, torch.arange(48.0))


def test_a_row_parallel_layer_adds_its_bias_once_however_many_ranks_sum() -> None:
    input_T1I = torch.randn(5, 1, 32)
    with torch.no_grad():
        expected, _ = layer(RowParallelLinear, ALONE)(input_T1I)
        parts = [input_T1I[..., :16], input_T1I[..., 16:]]
        # What the other rank's product is, without the bias:
        other, _ = packed(layer(RowParallelLinear, Member(1, 2), skip_bias_add=True), lambda _: None)(parts[1])
        output, bias = packed(layer(RowParallelLinear, Member(0, 2)), lambda mine: mine.add_(other))(parts[0])
    assert bias is None and torch.allclose(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_expert", [False, True])
def test_an_experts_output_is_left_to_its_dispatcher_to_sum(is_expert: bool) -> None:
    summed = []
    only = layer(RowParallelLinear, Member(0, 2), is_expert=is_expert, skip_bias_add=True)
    with torch.no_grad():
        packed(only, summed.append)(torch.randn(5, 1, 16))
    assert len(summed) == (0 if is_expert else 1)


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_a_layer_in_fp8_returns_the_bias_that_megatrons_own_returns(skip_bias_add: bool) -> None:
    only = layer(RowParallelLinear, ALONE, skip_bias_add=skip_bias_add).to(torch.bfloat16)
    input_T1I = torch.randn(16, 1, 32).to(torch.bfloat16)
    with torch.no_grad():
        expected, _ = only(input_T1I)
        quantise_linears(Holder(nn.Sequential(only)), "tensorwise", has_transformer_engine=False)
        output, bias = only(input_T1I)
    assert (bias is not None) == skip_bias_add
    assert torch.allclose(output.float(), expected.float(), rtol=0, atol=2.0)  # e4m3 keeps 4 bits; a bias is up to 47
