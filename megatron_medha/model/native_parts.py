"""Parts of Megatron's layers that the native library computes, recognised by what they are: norms, MLPs, experts.

Shapes: T tokens, C hidden size, N experts of the layer, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_medha.kernels.linear.native_decoder import MlpWeights
from megatron_medha.kernels.linear.native_experts import NativeExperts, RoutedExpert, RouterOptions
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativeActivation, NativeNorm
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.general_layers import ZeroCentredNorm
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.megatron_config import ACTIVATIONS
from megatron_medha.model.packed_linear import PackedLinear, linear_kernel

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}  # by Megatron's names
_ACTIVATION_NAMES = {function: name for name, function in ACTIVATIONS.items()}


class UnsupportedPart(Exception):
    """A part of the model that the native library does not have; the message is for the log."""


def use_native_parts(model: torch.nn.Module) -> None:
    """Put native norms, activations and experts in place of torch's where there are any; for good.

    Linear layers are packed already. Raises NativeUnavailable.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm | ZeroCentredNorm | L2Norm):
            module.forward = norm_of(module)  # type: ignore[method-assign]
        elif isinstance(module, MedhaTransformerLayer):
            module.gated_silu = NativeActivation()  # type: ignore[method-assign]
    for module in model.modules():
        try:
            if isinstance(module, ExpertsLayer):
                _use_native_experts(module)
            elif type(module) in (MLP, SharedExpertMLP):
                module.forward = NativeMlp(module)  # type: ignore[method-assign]
        except UnsupportedPart:
            continue


def _use_native_experts(layer: ExpertsLayer) -> None:
    """All of them in one call; where that cannot be had, their activation. Raises UnsupportedPart for any other."""
    try:
        layer.routed = _experts_of(layer)
    except UnsupportedPart:
        layer._activated = activation_of(layer.config)  # type: ignore[method-assign]


def norm_of(norm: torch.nn.Module) -> NativeNorm:
    """Raises UnsupportedPart for a module that is no norm of Megatron's layers."""
    if isinstance(norm, L2Norm):
        return NativeNorm(torch.ones(norm.hidden_size), norm.eps)
    if isinstance(norm, torch.nn.RMSNorm):
        # What torch takes where none is given.
        return NativeNorm(norm.weight, norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps)
    if isinstance(norm, torch.nn.LayerNorm):
        return NativeNorm(norm.weight, norm.eps, norm.bias, is_centred=True)
    if isinstance(norm, ZeroCentredNorm):
        return NativeNorm(norm.weight.float() + 1.0, norm.eps, norm.bias, is_centred=norm.bias is not None)
    raise UnsupportedPart(f"a norm that is a {type(norm).__name__}")


def linear_of(linear: ColumnParallelLinear | RowParallelLinear) -> NativeLinear:
    """A layer of a single tensor-parallel rank with all it adds. Raises UnsupportedPart."""
    packed = _packed(linear)
    if not packed.is_whole or packed.returned_bias_O is not None:
        raise UnsupportedPart("linear layers that are not native ones on a single tensor-parallel rank")
    return packed.multiply  # type: ignore[return-value]


def mlp_of(mlp: MLP) -> MlpWeights:
    """Raises UnsupportedPart."""
    return MlpWeights(linear_of(mlp.linear_fc1), linear_of(mlp.linear_fc2), activation_of(mlp.config))


def activation_of(config: TransformerConfig) -> NativeActivation:
    """Raises UnsupportedPart."""
    name = _ACTIVATION_NAMES.get(config.activation_func)
    if name is None:
        raise UnsupportedPart(f"an activation that is {config.activation_func}")
    clamp = config.activation_func_clamp_value
    if clamp == 0.0:
        raise UnsupportedPart("an activation that is cut off at 0")
    return NativeActivation(
        name, has_gate=config.gated_linear_unit, clamp=clamp, gate_offset=config.glu_linear_offset
    )


class NativeMlp:
    """Stands in for the forward of Megatron's MLP, and of the expert that every token goes through."""

    def __init__(self, mlp: MLP) -> None:
        """Raises UnsupportedPart."""
        self._up, self._down, self._activation = mlp.linear_fc1, mlp.linear_fc2, activation_of(mlp.config)
        self._is_expert = isinstance(mlp, SharedExpertMLP)
        self._gate = (shared_gate_of(mlp) or _torch_gate(mlp)) if self._is_expert else None
        self._sigmoid = NativeActivation("sigmoid", has_gate=False)

    def __call__(self, hidden: Tensor, **_: Any) -> Any:
        """The output and a bias that is not added; of an expert the output alone."""
        up, bias = self._up(hidden)
        output, bias = self._down(self._activation(up if bias is None else up + bias))
        if not self._is_expert:
            return output, bias
        return output if self._gate is None else output * self._sigmoid(self._gate(hidden))


def shared_gate_of(shared: SharedExpertMLP) -> NativeLinear | None:
    """What the gate of the expert that every token goes through is made of; None: there is none, or not in bf16."""
    if not shared.use_shared_expert_gate or shared.gate_weight.dtype != torch.bfloat16:
        return None
    return NativeLinear(shared.gate_weight, None)


def _torch_gate(shared: SharedExpertMLP) -> Callable[[Tensor], Tensor] | None:
    if not shared.use_shared_expert_gate:
        return None
    make = linear_kernel("auto", shared.gate_weight.dtype)  # BLAS adds up otherwise for other numbers of tokens
    return make(shared.gate_weight.detach(), None) if make is not None else partial(F.linear, weight=shared.gate_weight)


def _experts_of(layer: ExpertsLayer) -> NativeExperts:
    """The router and the experts on this rank. Raises UnsupportedPart."""
    config, router = layer.config, layer.router
    if "routing" in vars(router):
        raise UnsupportedPart("a router that is not Megatron's")
    if router.weight.dtype != torch.bfloat16 or config.moe_router_dtype not in (None, "fp32"):
        raise UnsupportedPart(f"a router in {config.moe_router_dtype or router.weight.dtype}")
    experts: list[RoutedExpert | None] = [None] * config.num_moe_experts
    for number, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
        up, down = _packed(expert.linear_fc1), _packed(expert.linear_fc2)
        if up.returned_bias_O is not None:
            raise UnsupportedPart("an expert whose first layer leaves its bias to others")
        experts[number] = RoutedExpert(up.multiply, down.multiply, down.returned_bias_O)  # type: ignore[arg-type]
    options = RouterOptions(
        num_chosen=config.moe_router_topk,
        is_sigmoid=config.moe_router_score_function == "sigmoid",
        is_scored_first=config.moe_router_pre_softmax,
        is_wide=config.moe_router_dtype == "fp32",
        num_groups=config.moe_router_num_groups or 0,
        num_chosen_groups=config.moe_router_group_topk or 0,
        weight_scale=config.moe_router_topk_scaling_factor or 0.0,
    )
    return NativeExperts(
        NativeLinear(router.weight, router.bias),
        options,
        experts,
        activation_of(config),
        choice_bias_N=router.expert_bias,
        adds_biases=layer.adds_biases,
    )


def _packed(linear: ColumnParallelLinear | RowParallelLinear) -> PackedLinear:
    packed = linear.forward
    if not isinstance(packed, PackedLinear) or not isinstance(packed.multiply, NativeLinear):
        raise UnsupportedPart("linear layers that are not native ones")
    return packed


def pack_routers(model: torch.nn.Module) -> None:
    """Replace what Megatron's routers compute where no native call does it; inference only, for good.

    Their product goes through BLAS, which adds up in another order for another number of tokens, and torch's sigmoid
    has other bits in the last few numbers of a tensor. A product in fp64 stays torch's.
    """
    for module in model.modules():
        if not isinstance(module, ExpertsLayer) or module.routed is not None:
            continue
        router = module.router
        if (multiply := _product_of(router)) is not None:
            router.gating = multiply
        if router.score_function == "sigmoid" and "routing" not in vars(router):
            try:
                router.routing = partial(_routed_by_sigmoid, router, NativeActivation("sigmoid", has_gate=False))
            except NativeUnavailable:
                continue


def _product_of(router: Router) -> Callable[[Tensor], Tensor] | None:
    """[..., C] -> logits [..., N], in the dtype that the router computes in; None: there is no packed one."""
    weight_NC, bias_N = router.weight.detach(), router.bias
    dtype = _DTYPES.get(router.config.moe_router_dtype or "", weight_NC.dtype)
    make = linear_kernel("auto", dtype) if dtype in (torch.float32, torch.bfloat16) else None
    if make is None:
        return None
    multiply = make(weight_NC.to(dtype), None if bias_N is None else bias_N.detach().to(dtype))
    return lambda hidden: multiply(hidden.to(dtype).contiguous())


def _routed_by_sigmoid(
    router: Any, sigmoid: Callable[[Tensor], Tensor], logits: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """As Megatron's router returns: weights [T, N], and which are chosen."""
    config, num_chosen = router.config, router.topk
    logits_TN = logits.view(-1, config.num_moe_experts)
    scores_TN = sigmoid(logits_TN.float()).type_as(logits_TN)
    ranked_TN = scores_TN if router.expert_bias is None else scores_TN + router.expert_bias
    if config.moe_router_group_topk:
        chosen_TK = group_limited_topk(
            scores=ranked_TN, topk=num_chosen, num_tokens=len(ranked_TN), num_experts=config.num_moe_experts,
            num_groups=config.moe_router_num_groups, group_topk=config.moe_router_group_topk,
        )[1]  # fmt: skip
    else:
        chosen_TK = ranked_TN.topk(num_chosen, dim=1)[1]
    weights_TK = scores_TN.gather(1, chosen_TK)
    if num_chosen > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if config.moe_router_topk_scaling_factor:
        weights_TK = weights_TK * config.moe_router_topk_scaling_factor
    weights_TN = torch.zeros_like(logits_TN).scatter_(1, chosen_TK, weights_TK.type_as(logits_TN))
    return weights_TN, torch.zeros_like(logits_TN, dtype=torch.bool).scatter_(1, chosen_TK, True)
