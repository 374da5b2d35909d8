"""How many slices a model gets, what is refused, and that layers over slices compute the same on any share of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import Experts
from megatron_medha.kernels.linear.sliced_linear import ColumnSlices, RowSlices, tree_sum
from megatron_medha.kernels.native_build import NativeUnavailable, native_library
from megatron_medha.model.packed_linear import OneDnnLinear, _operators_exist, pack_linears
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.virtual_tp import virtual_tp_of
from megatron_medha.parallel.groups import init_distributed
from megatron_medha.parallel.tp_all_reduce import tree_sum_

needs_operators = pytest.mark.skipif(not _operators_exist(), reason="this torch has no packed linear operators")


def config(**options: Any) -> ModelConfig:
    fields = {
        "name": "small", "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 352, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 32, "vocab_size": 500, "max_context_len": 512, "norm_epsilon": 1e-5,
        "stop_token_ids": (), "dtype": "float32",
    } | options  # fmt: skip
    return ModelConfig(**fields)


def chosen(setting: str, tp: int = 1, step: int = 1, **options: Any) -> int:
    return virtual_tp_of(setting, config(**options), tp=tp, step=step)


def test_auto_takes_as_many_slices_as_ranks_could_share_out() -> None:
    assert chosen("auto") == 4
    assert chosen("auto", num_kv_heads=8) == 8
    assert chosen("auto", num_kv_heads=8, ffn_hidden_size=84) == 4
    assert chosen("auto", num_kv_heads=1) == chosen("1", ffn_hidden_size=7) == 1
    experts = Experts(num_experts=4, num_per_token=2, ffn_hidden_size=352, shared_ffn_hidden_size=6)
    assert chosen("auto", experts=experts) == 2
    assert chosen("8") == 8  # finer than any tensor parallelism of 4 groups of heads


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("model.virtual_tp=8: must divide model.ffn_hidden_size=84 of small; use model.virtual_tp=4",
         {"setting": "8", "ffn_hidden_size": 84}),
        ("parallel.tp=4: must divide model.virtual_tp=2", {"setting": "2", "tp": 4}),
        (r"parallel.tp=3: must divide model.virtual_tp=1 \(auto\)", {"setting": "auto", "tp": 3, "num_kv_heads": 3}),
        ("model.ffn_hidden_size=352 of small into multiples of 32", {"setting": "2", "step": 32}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_way_out(words: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*model.virtual_tp=1"):
        chosen(**options)


def test_layers_that_round_partial_sums_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs native linear layers in bfloat16.*model.virtual_tp=1"):
        packed(RowParallelLinear, Share(0, 1), torch.bfloat16, None, {"linear_backend": "onednn"})


def test_a_tree_adds_up_neighbours_first() -> None:
    numbers = [torch.tensor(x) for x in (1e8, 1.0, -1e8, 1.0)]
    expected = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3])
    assert torch.equal(tree_sum(numbers), expected) and not torch.equal(sum(numbers), expected)
    assert torch.equal(tree_sum_([x.clone() for x in numbers]), expected)
    assert tree_sum_([x.clone() for x in (numbers[0], numbers[2], numbers[1])]) == 1.0  # the odd one comes last


@needs_operators
def test_shares_of_a_sliced_layer_in_fp32_have_the_bits_of_the_whole() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(12):
        num_slices = rng.choice((2, 4, 8))
        num_inputs, num_outputs = num_slices * rng.randint(1, 150), rng.choice((33, 500, 509, 768))
        weight_OI, bias_O = torch.randn(num_outputs, num_inputs), torch.randn(num_outputs)
        input_TI = torch.randn(rng.choice((1, 2, 17, 100)), num_inputs)
        expected = RowSlices(OneDnnLinear, num_slices, weight_OI, bias_O)(input_TI)
        assert torch.allclose(expected, input_TI @ weight_OI.T + bias_O, rtol=0, atol=1e-3)
        width = -(-num_outputs // num_slices)
        column = ColumnSlices(OneDnnLinear, width, weight_OI, bias_O)(input_TI)
        assert torch.allclose(column, expected, rtol=0, atol=1e-3)
        for tp in (2, 4, 8)[: num_slices.bit_length() - 1]:
            rows = [RowSlices(OneDnnLinear, num_slices // tp, part, bias_O) for part in weight_OI.chunk(tp, dim=1)]
            sums = tree_sum([row.sums(x) for row, x in zip(rows, input_TI.chunk(tp, dim=1), strict=True)])
            assert torch.equal(rows[0].finished(sums), expected), (num_slices, tp)
            of_rank = -(-num_outputs // tp)
            columns = [
                ColumnSlices(OneDnnLinear, width, part, bias)(input_TI)
                for part, bias in zip(weight_OI.split(of_rank), bias_O.split(of_rank), strict=True)
            ]
            assert torch.equal(torch.cat(columns, dim=-1), column), (num_slices, tp)


@dataclass(frozen=True)
class Share:
    """Stands in for the tensor-parallel group of a rank."""

    number: int
    of: int

    def size(self) -> int:
        """Ranks."""
        return self.of

    def rank(self) -> int:
        """This one."""
        return self.number


class OneLayer(nn.Module):
    """What pack_linears takes: a model of one layer."""

    share_embeddings_and_output_weights = False

    def __init__(self, only: nn.Module) -> None:
        super().__init__()
        self.decoder = only


def packed(kind: type, group: Share, dtype: torch.dtype, sum_over_tp: Any, options: dict[str, Any]) -> Any:
    """One rank's part of a random layer of 96 inputs and 130 outputs, in 4 slices."""
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    settings = TransformerConfig(
        num_layers=1, hidden_size=96, num_attention_heads=2, use_cpu_initialization=True, perform_initialization=False
    )
    split = {"gather_output": False} if kind is ColumnParallelLinear else {"input_is_parallel": True}
    made = kind(
        96, 136, config=settings, init_method=nn.init.zeros_, bias=True, skip_bias_add=False, tp_group=group, **split
    ).to(dtype)
    torch.manual_seed(0)
    dim = 0 if kind is ColumnParallelLinear else 1
    with torch.no_grad():
        made.weight.copy_(torch.randn(136, 96).chunk(group.of, dim=dim)[group.number])
        bias_O = torch.randn(136)
        made.bias.copy_(bias_O if dim else bias_O.chunk(group.of)[group.number])
    made.requires_grad_(False)
    pack_linears(OneLayer(made), sum_over_tp, virtual_tp=4, **options)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", ["auto", "int8"])
def test_packed_layers_of_any_number_of_ranks_have_the_bits_of_one(dtype: torch.dtype, weight_dtype: str) -> None:
    if dtype == torch.bfloat16:
        try:
            native_library()
        except NativeUnavailable as reason:
            pytest.skip(str(reason))
    elif weight_dtype != "auto" or not _operators_exist():
        pytest.skip("no such layers")
    options: dict[str, Any] = {"weight_dtype": weight_dtype}
    input_T1I = torch.randn(9, 1, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, _ = packed(RowParallelLinear, Share(0, 1), dtype, None, options)(input_T1I)
    columns, _ = packed(ColumnParallelLinear, Share(0, 1), dtype, None, options)(input_T1I)
    for tp in (2, 4):
        if weight_dtype == "auto":  # int8 ranks agree on scales, for which there is no group here
            sent: list[Tensor] = []
            inputs = list(enumerate(input_T1I.chunk(tp, dim=-1)))

            def keep(sums: Tensor, sent: list[Tensor] = sent) -> None:
                sent.append(sums.clone())

            def add_up(sums: Tensor, sent: list[Tensor] = sent) -> None:
                sums.copy_(tree_sum(sent))

            for rank, part in inputs:
                packed(RowParallelLinear, Share(rank, tp), dtype, keep, options)(part)
            assert all(sums.dtype == torch.float32 for sums in sent)
            for rank, part in inputs:
                output, _ = packed(RowParallelLinear, Share(rank, tp), dtype, add_up, options)(part)
                assert torch.equal(output, expected), (tp, rank)
        shares = [
            packed(ColumnParallelLinear, Share(rank, tp), dtype, None, options)(input_T1I)[0] for rank in range(tp)
        ]
        assert torch.equal(torch.cat(shares, dim=-1), columns), tp
