"""Experts computed without dispatch: Megatron's own sums to the bit, whatever else is in the batch, at any tp."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.grouped_experts import GroupedExperts, group_experts
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed


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


VARIANTS: dict[str, dict[str, Any]] = {
    "softmax over the chosen": {},
    "softmax over all": {"moe_router_pre_softmax": True},
    "one expert of each token": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "all experts of each token": {"moe_router_topk": 8},
    "sigmoid with a bias, groups and a scale": {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_num_groups": 4,
        "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5, "moe_router_topk": 4,
    },
    "a router in fp32": {"moe_router_dtype": "fp32"},
    "a shared expert": {"moe_shared_expert_intermediate_size": 48},
    "a shared expert with a gate": {"moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True},
    "biases, a clamp and an offset": {
        "add_bias_linear": True, "activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0,
    },
    "no gate": {"gated_linear_unit": False, "activation_func": F.gelu},
}  # fmt: skip


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    return build_groups(ParallelLayout())


def pair(pgs: MedhaPGs, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[MoELayer, ExpertsLayer]:
    """Megatron's own layer and ours, of the same random weights."""
    fields = {
        "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 40,
        "num_moe_experts": 8, "moe_router_topk": 2, "moe_router_load_balancing_type": "none", "add_bias_linear": False,
        "gated_linear_unit": True, "activation_func": F.silu, "moe_token_dispatcher_type": "allgather",
        "bias_activation_fusion": False, "use_cpu_initialization": True, "params_dtype": dtype,
        "gradient_accumulation_fusion": False,
    } | options  # fmt: skip
    config = TransformerConfig(**fields)
    mlp = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False).submodules.mlp
    torch.manual_seed(0)
    theirs = MoELayer(config, mlp.submodules, layer_number=1, pg_collection=pgs).to(dtype).eval()
    with torch.no_grad():
        for weight in [*theirs.parameters(), *theirs.buffers()]:
            weight.normal_(0.0, 0.3)
    ours = ExpertsLayer(config, mlp.submodules, layer_number=1, pg_collection=pgs).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def hidden_states(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, 1, 32, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


@torch.no_grad()
def computed(layer: MoELayer, hidden: Tensor) -> Tensor:
    output, bias = layer(hidden)
    assert bias is None
    return output


@pytest.mark.parametrize("num_tokens", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_sums_are_megatrons_own_to_the_bit(
    name: str, dtype: torch.dtype, num_tokens: int, pgs: MedhaPGs
) -> None:
    theirs, ours = pair(pgs, dtype, **VARIANTS[name])
    hidden = hidden_states(num_tokens, dtype)
    assert torch.equal(computed(ours, hidden), computed(theirs, hidden))


def test_no_token_means_no_work(pgs: MedhaPGs) -> None:
    _, ours = pair(pgs)
    assert computed(ours, hidden_states(0)).shape == (0, 1, 32)


def test_a_token_has_the_same_output_whatever_else_is_in_the_batch(pgs: MedhaPGs) -> None:
    """But for the last bits: kernels for other numbers of rows add in another order."""
    _, ours = pair(pgs)
    hidden = hidden_states(40)
    together = computed(ours, hidden)
    for first, count in ((0, 1), (7, 5), (30, 10)):
        alone = computed(ours, hidden[first : first + count])
        assert torch.allclose(alone, together[first : first + count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_biases", [False, True])
def test_the_parts_of_two_ranks_add_up(has_biases: bool, pgs: MedhaPGs) -> None:
    """Each has half of every expert."""
    whole, _ = pair(pgs, add_bias_linear=has_biases)
    hidden, parts = hidden_states(20), []
    for rank in range(2):
        groups = copy.copy(pgs)
        groups.tp = groups.expt_tp = Member(rank, 2)
        _, ours = pair(groups, add_bias_linear=has_biases)
        with torch.no_grad():
            for name, weight in ours.named_parameters():
                theirs = whole.state_dict()[name]
                if "linear_fc1" in name:
                    theirs = torch.cat([half.chunk(2)[rank] for half in theirs.chunk(2)])
                elif "linear_fc2.weight" in name:
                    theirs = theirs.chunk(2, dim=1)[rank]
                weight.copy_(theirs)
        ours.sum_over_tp = lambda mine: parts.append(mine.clone())
        computed(ours, hidden)
    assert torch.allclose((parts[0] + parts[1]).view_as(hidden), computed(whole, hidden), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_products_of_all_experts_at_once_give_what_one_by_one_does(name: str, pgs: MedhaPGs) -> None:
    _, ours = pair(pgs, **VARIANTS[name])
    hidden = hidden_states(50)
    expected = computed(ours, hidden)
    group_experts(ours)
    assert isinstance(ours.routed, GroupedExperts)
    assert torch.allclose(computed(ours, hidden), expected, rtol=0, atol=1e-5)
    assert torch.allclose(computed(ours, hidden[:1]), expected[:1], rtol=0, atol=1e-5)


def test_experts_of_other_ranks_are_left_to_them(pgs: MedhaPGs) -> None:
    whole, _ = pair(pgs, add_bias_linear=True)
    hidden, total = hidden_states(20), 0
    for rank in range(2):
        groups = copy.copy(pgs)
        groups.ep = Member(rank, 2)
        _, ours = pair_of_rank(groups, whole, rank)
        group_experts(ours)
        with torch.no_grad():
            total = total + ours.routed(hidden.flatten(0, -2))
    assert torch.allclose(total.view_as(hidden), computed(whole, hidden), rtol=0, atol=1e-4)


def pair_of_rank(groups: MedhaPGs, whole: MoELayer, rank: int) -> tuple[MoELayer, ExpertsLayer]:
    """A layer with every other half of the experts, of the whole one's weights."""
    mlp = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False).submodules.mlp
    config = dataclasses.replace(whole.config, expert_model_parallel_size=2)
    ours = ExpertsLayer(config, mlp.submodules, layer_number=1, pg_collection=groups).eval()
    theirs = whole.state_dict()
    renamed = {
        name: theirs[re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{int(found[1]) + 4 * rank}", name)]
        for name in ours.state_dict()
        if theirs.get(name) is not None
    }
    ours.load_state_dict(renamed, strict=False)
    return whole, ours


def test_nothing_looks_at_how_many_tokens_an_expert_has(pgs: MedhaPGs) -> None:
    """On torch's meta device nothing has a value: what would wait for a GPU fails there."""
    _, ours = pair(pgs, torch.bfloat16, add_bias_linear=True)
    ours = ours.to("meta")
    group_experts(ours)
    with torch.no_grad():
        assert ours.routed(torch.empty(7, 32, dtype=torch.bfloat16, device="meta")).shape == (7, 32)


def test_weights_loaded_after_they_were_brought_together_are_used(pgs: MedhaPGs) -> None:
    theirs, ours = pair(pgs)
    group_experts(ours)
    hidden = hidden_states(9)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(0.5)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(computed(ours, hidden), computed(theirs, hidden), rtol=0, atol=1e-5)
