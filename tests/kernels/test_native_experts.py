"""Native routed experts against the same layers called one by one, and their router against Megatron's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from native_targets import native_of
from torch import Tensor

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_experts import NativeExperts, RoutedExpert, RouterOptions
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativeActivation
from megatron_medha.kernels.linear.sliced_linear import tree_sum

NUM_EXPERTS, HIDDEN = 12, 72
GROUPED = {"is_sigmoid": True, "num_groups": 4, "num_chosen_groups": 2, "weight_scale": 2.5, "num_chosen": 4}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax over the chosen": {},
    "softmax over all": {"is_scored_first": True},
    "one of each token": {"num_chosen": 1, "is_scored_first": True},
    "all of each token": {"num_chosen": NUM_EXPERTS},
    "in fp32": {"is_wide": True},
    "sigmoid": {"is_sigmoid": True},
    "sigmoid in groups, with a bias and a scale": {**GROUPED, "has_choice_bias": True},
    "the same in fp32": {**GROUPED, "has_choice_bias": True, "is_wide": True},
    "softmax in groups": {"num_groups": 3, "num_chosen_groups": 1, "num_chosen": 2, "is_scored_first": True},
}
PARTS: dict[str, dict[str, Any]] = {
    "a width of whole packs": {"ffn_size": 64},
    "another width": {"ffn_size": 40},
    "int8": {"ffn_size": 64, "is_int8": True},
    "biases, a clamp and an offset": {"has_biases": True, "kind": "quick_gelu", "clamp": 0.5, "gate_offset": 1.0},
    "no gate": {"kind": "gelu", "has_gate": False},
}


class Layer:
    """Random experts, together and each for itself."""

    def __init__(
        self, target: str, *, ffn_size: int = 40, has_biases: bool = False, is_int8: bool = False,
        kind: str = "silu", has_gate: bool = True, clamp: float | None = None, gate_offset: float = 0.0,
        has_choice_bias: bool = False, num_slices: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(3)
        self.target, self.is_int8 = target, is_int8
        self.weights: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self.activation = NativeActivation(
            kind, has_gate=has_gate, clamp=clamp, gate_offset=gate_offset, target=target
        )
        self.options = RouterOptions(**{"num_chosen": 3, **options})
        self.router_NC = (torch.randn(NUM_EXPERTS, HIDDEN) / 8).bfloat16()
        self.router = NativeLinear(self.router_NC, None, target)
        self.choice_bias_N = torch.randn(NUM_EXPERTS) if has_choice_bias else None
        self.parts = [
            RoutedExpert(
                self._linear(ffn_size * (1 + has_gate), HIDDEN, has_biases),
                self._linear(HIDDEN, ffn_size, False, num_slices),
                torch.randn(HIDDEN).bfloat16() if has_biases else None,
            )
            for _ in range(NUM_EXPERTS)
        ]  # fmt: skip
        self.together = self.made()

    def made(self, parts: list[RoutedExpert | None] | None = None, **options: Any) -> NativeExperts:
        return NativeExperts(
            self.router, self.options, parts or self.parts, self.activation, choice_bias_N=self.choice_bias_N,
            target=self.target, **options,
        )  # fmt: skip

    def _linear(self, num_outputs: int, num_inputs: int, has_bias: bool, num_slices: int = 1) -> NativeLinear:
        bias_O = torch.randn(num_outputs).bfloat16() if has_bias else None
        weight_OI, scale_O = (torch.randn(num_outputs, num_inputs) / 8).bfloat16(), None
        if self.is_int8:
            weight_OI = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
            scale_O = torch.rand(num_outputs) / 1000
        made = NativeLinear(weight_OI, bias_O, self.target, scale=scale_O, num_slices=num_slices)
        self.weights[id(made)] = weight_OI, bias_O, scale_O
        return made

    def share(self, rank: int, tp: int, num_slices: int) -> NativeExperts:
        """What a tensor-parallel rank has of each expert."""
        parts: list[RoutedExpert | None] = []
        for expert in self.parts:
            up_OI, bias_O, up_scale_O = self.weights[id(expert.up)]
            down_OI, _, down_scale_O = self.weights[id(expert.down)]
            halves = 1 + self.activation.has_gate
            up_OI, bias_O, up_scale_O = (
                None if x is None else torch.cat([half.chunk(tp)[rank] for half in x.chunk(halves)])
                for x in (up_OI, bias_O, up_scale_O)
            )
            down_OI = down_OI.chunk(tp, dim=1)[rank]
            parts.append(
                RoutedExpert(
                    NativeLinear(up_OI, bias_O, self.target, scale=up_scale_O),
                    NativeLinear(down_OI, None, self.target, scale=down_scale_O, num_slices=num_slices // tp),
                    expert.down_bias_C,
                )
            )
        return self.made(parts, adds_biases=rank == 0)

    def chosen(self, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of each token's experts by number, and which they are, by Megatron's router."""
        options, logits_TN = self.options, self.router(hidden_TC)
        if options.is_wide:
            logits_TN = hidden_TC.float() @ self.router_NC.float().T
        return topk_routing_with_score_function(
            logits_TN,
            options.num_chosen,
            use_pre_softmax=options.is_scored_first,
            num_groups=options.num_groups or None,
            group_topk=options.num_chosen_groups or None,
            scaling_factor=options.weight_scale or None,
            score_function="sigmoid" if options.is_sigmoid else "softmax",
            expert_bias=self.choice_bias_N,
        )

    def one_by_one(self, hidden_TC: Tensor) -> Tensor:
        """What experts.py computes of the same layers."""
        weights_TN, is_chosen_TN = self.chosen(hidden_TC)
        sums_TC = torch.zeros(hidden_TC.shape)
        for t, hidden_C in enumerate(hidden_TC):
            for n in is_chosen_TN[t].nonzero()[:, 0].tolist():
                part, weight = self.parts[n], weights_TN[t, n]
                output_C = part.down((self.activation(part.up(hidden_C[None])) * weight).bfloat16())[0]
                if part.down_bias_C is not None:
                    output_C = output_C + (part.down_bias_C * weight).bfloat16()
                sums_TC[t] += output_C
        return sums_TC.bfloat16()


def hidden_states(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens)).bfloat16()


@pytest.mark.parametrize("name", PARTS)
def test_experts_together_are_those_called_one_by_one(native: NativeAttention, name: str) -> None:
    """Scores in fp32 and one expert a token: Megatron's weights are then the same to the bit."""
    layer = Layer(native.target, is_wide=True, is_sigmoid=True, num_chosen=1, **PARTS[name])
    for num_tokens in (1, 2, 30):
        hidden_TC = hidden_states(num_tokens)
        difference = layer.together(hidden_TC).float() - layer.one_by_one(hidden_TC).float()
        assert difference.abs().max() <= 2**-7 * layer.one_by_one(hidden_TC).float().abs().max()
        assert (difference != 0).float().mean() < 0.05  # a weight's last bit: another rounding now and then


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_go_to_megatrons_experts_with_its_weights(native: NativeAttention, name: str) -> None:
    layer = Layer(native.target, **{"is_wide": False, **ROUTERS[name]})
    hidden_TC = hidden_states(60)
    scores_TN = layer.router(hidden_TC)
    scores_TN = scores_TN.sigmoid() if layer.options.is_sigmoid else scores_TN.softmax(dim=1)
    has_tie = torch.tensor([len(row.unique()) < NUM_EXPERTS for row in scores_TN])  # either expert is right then
    expected, found = layer.one_by_one(hidden_TC).float(), layer.together(hidden_TC).float()
    error_T = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert (~has_tie).sum() > 10 and error_T[~has_tie].max() < 0.02


@pytest.mark.parametrize("name", PARTS)
def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch(native: NativeAttention, name: str) -> None:
    layer = Layer(native.target, **PARTS[name])
    hidden_TC = hidden_states(90)
    whole = layer.together(hidden_TC)
    for first, count in ((0, 1), (5, 2), (7, 30), (40, 50)):
        rows = slice(first, first + count)
        assert torch.equal(layer.together(hidden_TC[rows]), whole[rows])


def test_threads_change_no_bit(native: NativeAttention) -> None:
    layer, hidden_TC = Layer(native.target, ffn_size=192), hidden_states(70)
    before = torch.get_num_threads()
    try:
        outputs = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            outputs.append(layer.together(hidden_TC))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("target", ["AMX", "AVX512_BF16"])
def test_products_of_bf16_and_their_plain_version_give_the_same_bits(target: str, name: str) -> None:
    fast, plain = (Layer(native_of(each).target, **PARTS[name]) for each in (target, f"{target}_PLAIN"))
    hidden_TC = hidden_states(33)
    assert torch.equal(fast.together(hidden_TC), plain.together(hidden_TC))


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_two_ranks_add_up(native: NativeAttention, name: str) -> None:
    layer, hidden_TC = Layer(native.target, **PARTS[name]), hidden_states(20)
    halves = [[part if n % 2 == rank else None for n, part in enumerate(layer.parts)] for rank in range(2)]
    summed_TC = sum(layer.made(half)(hidden_TC).float() for half in halves)
    whole_TC = layer.together(hidden_TC).float()
    assert (summed_TC - whole_TC).abs().max() <= 2**-6 * whole_TC.abs().max()


def test_no_token_means_no_work(native: NativeAttention) -> None:
    assert Layer(native.target).together(hidden_states(0)).shape == (0, HIDDEN)


def test_what_is_not_a_number_stays_with_its_token(native: NativeAttention) -> None:
    layer, hidden_TC = Layer(native.target), hidden_states(5)
    whole = layer.together(hidden_TC)
    hidden_TC[2] = torch.nan
    output = layer.together(hidden_TC)
    assert output[2].isnan().all()
    assert torch.equal(output[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_what_does_not_fit_is_refused(native: NativeAttention) -> None:
    layer = Layer(native.target)
    with pytest.raises(ValueError, match="for size 72"):
        layer.together(torch.zeros(2, 71, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="a router of 12 that chooses 3 of 11"):
        layer.made(layer.parts[1:])
    with pytest.raises(ValueError, match="an expert of"):
        layer.made([layer.parts[0], RoutedExpert(layer.parts[1].down, layer.parts[1].up), *layer.parts[2:]])


@pytest.mark.parametrize("name", PARTS)
def test_sums_of_ranks_with_some_slices_each_have_the_bits_of_one_rank(native: NativeAttention, name: str) -> None:
    """A token's experts are added up in each slice, then the slices in a tree."""
    layer = Layer(native.target, **PARTS[name], num_slices=4)
    for num_tokens in (1, 5, 60):
        hidden_TC = hidden_states(num_tokens)
        expected = layer.together(hidden_TC)
        assert (expected.float() - layer.one_by_one(hidden_TC).float()).norm() < 0.02 * expected.float().norm()
        for tp in (1, 2, 4):
            shares = [layer.share(rank, tp, 4) for rank in range(tp)]
            sums = tree_sum([share.sums(hidden_TC) for share in shares])
            assert torch.equal(sums.bfloat16(), expected), (num_tokens, tp)
