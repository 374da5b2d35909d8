"""Megatron's layer of experts, computed where its tokens are: every rank has all of them, and its share of the experts.

Nothing is dispatched, dropped or computed twice. An expert is computed for the tokens that were sent to it, and a
token's experts are added up by their number: what else is in the batch has no part in the order of any sum. Where
layers have slices (virtual_tp.py) a token's experts are added up in each slice, then the slices in a binary tree.

Shapes: T tokens, C hidden size, N experts of the layer, K experts of a token, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_medha.kernels.linear.sliced_linear import tree_sum
from megatron_medha.parallel.tp_all_reduce import tree_all_reduce


class ExpertsLayer(MoELayer):
    """A router, the experts it chooses among, and the shared expert if there is one. Inference only."""

    sum_over_tp: Callable[[Tensor], object] | None  # what sums a tensor over the ranks, in place; None: there is one

    def __init__(self, *args: Any, is_group_by_best: bool = False, **kwargs: Any) -> None:
        """is_group_by_best: see core/model_spec.py; megatron-core has no such router."""
        super().__init__(*args, **kwargs)
        self.sum_over_tp = partial(tree_all_reduce, self.tp_group) if self.tp_group.size() > 1 else None
        self.has_slices = False  # pack_linears makes them
        # The router and the experts of this rank in one call: [T, C] -> [T, C]; native_parts.py may put it there.
        self.routed: Any = None
        # The bias of an expert's output is of the whole sum, not of a rank's part of it.
        self.adds_biases = self.num_local_experts < self.config.num_moe_experts or self.tp_group.rank() == 0
        if is_group_by_best:
            self.router.routing = partial(_routed_by_best, self.config)
        # It counts the tokens of an expert for training, and goes through torch.compile to do so.
        self.router._apply_expert_bias = lambda *_, **__: None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """hidden_states: [T, 1, C] -> (output of that shape, None)."""
        if not hidden_states.shape[0]:
            return torch.zeros_like(hidden_states), None
        hidden_TC = hidden_states.flatten(0, -2)
        is_part_summed = self.has_slices and self.sum_over_tp is not None  # before it is rounded
        if self.routed is not None:
            routed_TC = self.routed.sums(hidden_TC) if is_part_summed else self.routed(hidden_TC)
        else:
            routed_TC = self._routed(hidden_TC, *self.router(hidden_states))
            routed_TC = routed_TC if is_part_summed else routed_TC.to(hidden_TC.dtype)
        if self.sum_over_tp is not None:
            self.sum_over_tp(routed_TC)
        output = routed_TC.to(hidden_TC.dtype).view_as(hidden_states)
        return (output if self.shared_experts is None else output + self.shared_experts(hidden_states)), None

    def _routed(self, hidden_TC: Tensor, weights_TN: Tensor, is_chosen_TN: Tensor) -> Tensor:
        """The weighted sum of each token's experts, as far as they are on this rank; [T, C], fp32."""
        num_tokens, num_experts = is_chosen_TN.shape
        expert_of_TK = is_chosen_TN.nonzero()[:, 1].view(num_tokens, -1)  # of a token by number
        num_chosen = expert_of_TK.shape[1]
        by_expert = expert_of_TK.flatten().argsort(stable=True)
        token = by_expert // num_chosen
        input_, weights = hidden_TC[token], weights_TN[token, expert_of_TK.flatten()[by_expert]]
        output_SRC: Tensor | None = None  # S slices, or one
        end = 0
        for number, count in enumerate(torch.bincount(expert_of_TK.flatten(), minlength=num_experts).tolist()):
            rows, end = slice(end, end + count), end + count
            if count and (local := number - self.local_expert_indices[0]) in range(self.num_local_experts):
                expert = self.experts.local_experts[local]
                parts = self._computed(expert, input_[rows], weights[rows, None])
                if output_SRC is None:
                    output_SRC = parts[0].new_zeros(len(parts), *input_.shape)
                for slice_number, part in enumerate(parts):
                    output_SRC[slice_number, rows] = part
        if output_SRC is None:  # all of the batch's experts are on other ranks
            return torch.zeros_like(hidden_TC, dtype=torch.float32)
        output_SRC = torch.empty_like(output_SRC).index_copy_(1, by_expert, output_SRC)
        output_STKC = output_SRC.unflatten(1, (num_tokens, num_chosen))
        summed_STC = output_STKC[:, :, 0].float()
        for k in range(1, num_chosen):
            summed_STC = summed_STC + output_STKC[:, :, k]
        return tree_sum(summed_STC.unbind())

    def _computed(self, expert: MLP, input_: Tensor, weight: Tensor) -> list[Tensor]:
        """One expert's output for some tokens, times their weights; of each slice, where its second layer has any."""
        hidden, bias = expert.linear_fc1(input_)
        activated = self._activated(hidden if bias is None else hidden + bias)
        weighted = (activated * weight).to(activated.dtype)
        if self.has_slices:
            packed = expert.linear_fc2.forward
            outputs, bias = packed.multiply.slice_sums(weighted), packed.returned_bias_O
        else:
            output, bias = expert.linear_fc2(weighted)
            outputs = [output]
        if bias is not None and self.adds_biases:
            outputs[0] = outputs[0] + (bias * weight).to(outputs[0].dtype)
        return outputs

    def _activated(self, hidden: Tensor) -> Tensor:
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if (most := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=most), up.clamp(min=-most, max=most)
        return config.activation_func(gate) * (up + config.glu_linear_offset)


def _routed_by_best(config: Any, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Softmax scores; a token's experts are of the groups with the best single ones. As Megatron's router returns."""
    scores_TN = torch.softmax(logits.view(-1, config.num_moe_experts), dim=-1, dtype=torch.float32)
    by_group = scores_TN.unflatten(-1, (config.moe_router_num_groups, -1))
    best = by_group.amax(-1).topk(config.moe_router_group_topk, dim=-1)[1]
    is_in_best = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=scores_TN.device).scatter_(1, best, True)
    # Not below 0: where fewer experts than asked for are in the groups, the others have a weight of 0, as elsewhere.
    limited_TN = (by_group * is_in_best.unsqueeze(-1)).flatten(1)
    weights_TK, chosen_TK = limited_TN.topk(config.moe_router_topk, dim=-1)
    weights_TK = weights_TK * (config.moe_router_topk_scaling_factor or 1.0)
    weights_TN = torch.zeros_like(scores_TN).scatter_(1, chosen_TK, weights_TK).type_as(logits)
    return weights_TN, torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, chosen_TK, True)
