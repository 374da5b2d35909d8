"""The experts of a layer in two products for all of them, as GPUs want it; torch's grouped product does them.

Nothing waits for the device: how many tokens an expert has stays there, so that a step can be captured in a CUDA graph.

Shapes: T tokens, C hidden size, N experts of the layer, L experts of this rank, K experts of a token, M = T * K,
F width of an expert's first product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_medha.model.experts import ExpertsLayer

log = logging.getLogger(__name__)


class GroupedExperts:
    """Router and experts of one layer on this rank: [T, C] -> [T, C]. Sums up as ExpertsLayer does, in its order."""

    def __init__(self, layer: ExpertsLayer, grouped_mm: Callable[..., Tensor]) -> None:
        """The experts' weights are brought together; their modules keep views, through which they can be loaded."""
        self._layer, self._grouped_mm = layer, grouped_mm
        experts = layer.experts.local_experts
        self._up_LFC = _together([expert.linear_fc1.weight for expert in experts])
        self._down_LCH = _together([expert.linear_fc2.weight for expert in experts])
        biases = [[getattr(expert, name).bias for expert in experts] for name in ("linear_fc1", "linear_fc2")]
        self._up_bias_LF, self._down_bias_LC = (None if found[0] is None else _together(found) for found in biases)
        device = self._up_LFC.device
        self._num_experts, self._num_chosen = layer.config.num_moe_experts, layer.config.moe_router_topk
        self._first = layer.local_expert_indices[0]
        self._number_N = torch.arange(self._num_experts, device=device)
        self._local_L = torch.arange(layer.num_local_experts, device=device)

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        """The weighted sum of each token's experts, as far as they are on this rank."""
        weights_TN, is_chosen_TN = self._layer.router(hidden_TC.unsqueeze(1))
        num_tokens = len(hidden_TC)
        # Of a token by number; as many of each token, so that no length has to be known.
        numbers_TN = torch.where(is_chosen_TN, self._number_N, self._num_experts)
        expert_TK = numbers_TN.topk(self._num_chosen, dim=1, largest=False, sorted=True).values
        # This rank's first, in order; those of other ranks lie behind, where no product reaches.
        place_M = (expert_TK.flatten() - self._first) % self._num_experts
        by_place_M = place_M.argsort(stable=True)
        sorted_M = place_M[by_place_M]
        ends_L = torch.searchsorted(sorted_M, self._local_L, right=True).to(torch.int32)
        token_M = by_place_M // self._num_chosen
        local_M = sorted_M.clamp(max=len(self._local_L) - 1)
        weight_M1 = weights_TN.gather(1, expert_TK).flatten()[by_place_M].unsqueeze(1)

        hidden_MF = self._grouped_mm(hidden_TC[token_M], self._up_LFC.transpose(1, 2), offs=ends_L)
        if self._up_bias_LF is not None:
            hidden_MF = hidden_MF + self._up_bias_LF[local_M]
        activated_MH = self._layer._activated(hidden_MF)
        weighted_MH = (activated_MH * weight_M1).to(activated_MH.dtype)
        output_MC = self._grouped_mm(weighted_MH, self._down_LCH.transpose(1, 2), offs=ends_L)
        if self._down_bias_LC is not None and self._layer.adds_biases:
            output_MC = output_MC + (self._down_bias_LC[local_M] * weight_M1).to(output_MC.dtype)
        # What no product has written may be anything.
        output_MC = output_MC.masked_fill((sorted_M >= len(self._local_L)).unsqueeze(1), 0.0)
        output_TKC = torch.empty_like(output_MC)
        output_TKC[by_place_M] = output_MC
        output_TKC = output_TKC.view(num_tokens, self._num_chosen, -1)
        summed_TC = output_TKC[:, 0].float()
        for k in range(1, self._num_chosen):
            summed_TC = summed_TC + output_TKC[:, k]
        return summed_TC.to(hidden_TC.dtype)


def group_experts(model: torch.nn.Module) -> None:
    """Of every layer of experts whose weights can be brought together. Says in the log what computes them."""
    layers = [module for module in model.modules() if isinstance(module, ExpertsLayer)]
    if not layers:
        return
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    reason = _why_not(layers) if grouped_mm is not None else "this torch has no grouped product"
    if grouped_mm is None or reason is not None:
        log.warning("experts=one_by_one layers=%d reason=%s", len(layers), reason)
        return
    for layer in layers:
        layer.routed = GroupedExperts(layer, grouped_mm)
    log.info("experts=grouped_mm layers=%d", len(layers))


def _why_not(layers: list[ExpertsLayer]) -> str | None:
    for layer in layers:
        for expert in layer.experts.local_experts:
            for linear in (expert.linear_fc1, expert.linear_fc2):
                weight = linear.weight
                if "forward" in vars(linear) or not weight.numel():
                    return "their products are in FP8"
                if weight.is_cuda and (weight.dtype != torch.bfloat16 or any(size % 8 for size in weight.shape)):
                    return f"it takes bfloat16 in multiples of 8, not {weight.dtype} {tuple(weight.shape)}"
    return None


def _together(parameters: list[Any]) -> Tensor:
    """One tensor of all, of which each keeps its part."""
    stacked: Tensor = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, stacked, strict=True):
        parameter.data = part
    return stacked
