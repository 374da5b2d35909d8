"""A Megatron layer spec for training whose forward pass has the bits of the server's, with gradients.

What rounds is computed by the server's own kernels: linear layers, norms, activation and attention. Gradients are
those of torch's operations at the same inputs. Llama-like models and those that have experts besides, on a CPU, without
tensor parallelism; a server's may have any with the same model.virtual_tp. Weights are packed for the kernels again in
each forward pass, as an optimizer changes them.

Shapes: S sequence length, B sequences, H query heads, K key/value heads, D head dim, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import Experts
from megatron_medha.kernels.attention.backend import QueryRange
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.linear.native_pointwise import NativeActivation, NativeNorm
from megatron_medha.kernels.native_build import NativeUnavailable, native_library
from megatron_medha.model.attention import MedhaSelfAttention, PagedCoreAttention
from megatron_medha.model.build import llama_layer_spec
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.logprobs import row_logsumexp
from megatron_medha.model.native_parts import pack_routers, use_native_parts
from megatron_medha.model.packed_linear import MakeLinear, linear_kernel, pack_linears, sliced
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.virtual_tp import virtual_tp_of
from megatron_medha.parallel.groups import build_groups

_BLOCK_SIZE = NativeAttention.block_size
_REPLACED = ("forward", "gating", "routing", "_activated")  # by the functions that put kernels into a model


def training_block_spec(config: ModelConfig, virtual_tp: int = 1) -> TransformerBlockSubmodules:
    """The decoder layers of a GPTModel, and its last norm; its output layer: `use_served_output`.

    virtual_tp: the server's slices of row-parallel layers (virtual_tp.py), not auto; weights in the dtype they are
    served in. Raises ConfigError for models and machines on which the server computes something else.
    """
    if others := [trait for trait in config.traits if trait != "experts"]:
        raise ConfigError(
            f"{config.name}: the training spec is of Llama-like models and of experts, not of {', '.join(others)}"
        )
    if config.rope_scaling.kind == "dynamic":
        raise ConfigError(f"{config.name}: dynamic rope scaling turns prompt and output tokens by different angles")
    try:
        native_library()
    except NativeUnavailable as error:
        raise ConfigError(f"the training spec needs the CPU kernels: {error}") from error
    virtual_tp_of(str(virtual_tp), config, tp=1)
    if virtual_tp > 1 and config.experts is not None:
        raise ConfigError(f"model.virtual_tp={virtual_tp}: the training spec has no experts in slices; use 1")
    column, row = (
        ModuleSpec(module=kind, params={"virtual_tp": virtual_tp}) for kind in (ServedColumnLinear, ServedRowLinear)
    )
    layer = llama_layer_spec(config, torch.device("cpu"))
    layer.module = TrainingLayer
    parts, attention = layer.submodules, layer.submodules.self_attention
    parts.input_layernorm = parts.pre_mlp_layernorm = ServedNorm
    attention.module = TrainingSelfAttention
    attention.submodules.core_attention = ServedCoreAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = column, row
    if config.has_qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = ServedNorm
    parts.mlp.submodules.linear_fc1, parts.mlp.submodules.linear_fc2 = column, row
    layers = [layer] * config.num_layers
    if config.experts is not None:
        routed = copy.deepcopy(layer)
        routed.submodules.mlp = _experts_spec(config.experts)
        has_experts = config.experts.layers or (True,) * config.num_layers
        layers = [routed if has else layer for has in has_experts]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=ServedNorm)


def use_served_output(model: GPTModel, virtual_tp: int = 1) -> None:
    """Have the output layer, which no spec has a say in, computed by the server's kernel; for good. As the spec's."""
    assert type(model.output_layer) is ColumnParallelLinear, type(model.output_layer)
    model.output_layer.__class__ = ServedColumnLinear  # the same parameters, another forward
    model.output_layer.virtual_tp = virtual_tp


def served_logprobs(logits_TV: Tensor, token_ids_T: Tensor) -> Tensor:
    """Log-probabilities [T], fp32, of the tokens that follow. logits: without columns past the vocabulary."""
    logits_TV = logits_TV.float()
    own_T1 = logits_TV.gather(1, token_ids_T.unsqueeze(1))
    return (own_T1 - row_logsumexp(logits_TV)).squeeze(1)


class _AsServed(torch.autograd.Function):
    """A kernel's output, with the gradients of an operation of torch that means the same."""

    @staticmethod
    def forward(
        ctx: Any, served: Callable[..., Tensor], differentiable: Callable[..., Tensor], *inputs: Tensor | None
    ) -> Tensor:
        ctx.differentiable = differentiable
        ctx.save_for_backward(*inputs)
        return served(*(None if x is None else x.detach() for x in inputs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs: list[Any] = [
            None if x is None else x.detach().requires_grad_(needs)
            for x, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            output = ctx.differentiable(*inputs)
        wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]
        gradients = iter(torch.autograd.grad(output, wanted, gradient))
        return None, None, *(next(gradients) if needs else None for needs in needed)


class _ServedLinear(torch.autograd.Function):
    """The same of a linear layer, whose gradients need no second forward pass."""

    @staticmethod
    def forward(ctx: Any, make: MakeLinear, input_: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_, weight_OI)
        return make(weight_OI.detach(), bias_O)(input_.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input_, weight_OI = ctx.saved_tensors
        of_rows_RO = gradient.flatten(0, -2)
        return (
            None,
            gradient @ weight_OI,
            of_rows_RO.t() @ input_.flatten(0, -2),
            of_rows_RO.sum(dim=0) if ctx.needs_input_grad[3] else None,
        )


@cache
def _linear_maker(dtype: torch.dtype) -> MakeLinear:
    """Of the kernel that model.linear_backend=auto takes."""
    make = linear_kernel("auto", dtype)
    if make is None:
        raise ConfigError(f"the server has no packed linear layers in {dtype} on this machine")
    return make


class ServedColumnLinear(ColumnParallelLinear):
    """A linear layer in the server's bits."""

    def __init__(self, *args: Any, virtual_tp: int, **options: Any) -> None:
        """virtual_tp: see training_block_spec."""
        super().__init__(*args, **options)
        self.virtual_tp = virtual_tp

    def forward(self, input_: Tensor, weight: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[..., I] -> ([..., O], no bias: it is added). weight: of a tied output layer."""
        return _multiplied(self, input_, weight)


class ServedRowLinear(RowParallelLinear):
    """The same where outputs would be summed over ranks."""

    def __init__(self, *args: Any, virtual_tp: int, **options: Any) -> None:
        """virtual_tp: see training_block_spec."""
        super().__init__(*args, **options)
        self.virtual_tp = virtual_tp

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., I] -> ([..., O], no bias: it is added)."""
        return _multiplied(self, input_, None)


def _multiplied(
    layer: ServedColumnLinear | ServedRowLinear, input_: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if get_pg_size(layer.tp_group) > 1:
        raise ConfigError("the training spec has no tensor parallelism: its sums would have other bits")
    weight = layer.weight if weight is None else weight
    make = _linear_maker(weight.dtype)
    if layer.virtual_tp > 1:
        make = sliced(make, layer, layer.virtual_tp)
    return _ServedLinear.apply(make, input_, weight, layer.bias), None


class ServedNorm(torch.nn.RMSNorm):
    """An RMS norm in the server's bits."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Takes what Megatron passes to any norm."""
        super().__init__(hidden_size, eps=eps)

    def forward(self, input_: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return _AsServed.apply(
            lambda x, weight_C: NativeNorm(weight_C, self.eps)(x),
            lambda x, weight_C: F.rms_norm(x, self.normalized_shape, weight_C, self.eps),
            input_,
            self.weight,
        )


class ServedCoreAttention(PagedCoreAttention):
    """Causal attention over whole sequences in the server's bits; how each one is padded on its right says nothing."""

    def forward_training(self, q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
        """[S, B, H, D]."""
        return _AsServed.apply(self._served, super().forward_training, q_SBHD, k_SBKD, v_SBKD)

    def _served(self, q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
        length, num_sequences, num_kv_heads, head_dim = k_SBKD.shape
        backend, blocks_each = NativeAttention(), -(-length // _BLOCK_SIZE)
        layer = backend.allocate(num_sequences * blocks_each, _BLOCK_SIZE, num_kv_heads, head_dim, k_SBKD.dtype)
        ranges = []
        for b in range(num_sequences):
            table = SlotTable(_BLOCK_SIZE)
            table.append([(b * blocks_each, blocks_each)])
            ranges.append(QueryRange(b * length, length, 0, table))
        q_TKGD, k_TKD, v_TKD = (x.transpose(0, 1).flatten(0, 1) for x in (q_SBHD, k_SBKD, v_SBKD))
        q_TKGD = q_TKGD.unflatten(1, (num_kv_heads, -1))
        out_THD = backend.attend(backend.plan(ranges), q_TKGD, k_TKD, v_TKD, layer, self.scale)
        return out_THD.unflatten(0, (num_sequences, length)).transpose(0, 1)


class TrainingSelfAttention(MedhaSelfAttention):
    """Self-attention over whole sequences, and over these alone."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, C] -> ([S, B, C], None). The mask is always causal."""
        return self._forward_training(hidden_states)


class TrainingLayer(MedhaTransformerLayer):
    """A decoder layer with the additions of the server's, in their order."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """[S, B, C] -> ([S, B, C], None)."""
        attended, _bias = self.self_attention(self.input_layernorm(hidden_states))
        hidden_states = hidden_states + attended
        if isinstance(self.mlp, TrainingExperts):
            return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0], None
        gate_and_up, _bias = self.mlp.linear_fc1(self.pre_mlp_layernorm(hidden_states))
        activated = _AsServed.apply(NativeActivation(), _gated_silu, gate_and_up)
        return hidden_states + self.mlp.linear_fc2(activated)[0], None


def _gated_silu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _experts_spec(experts: Experts) -> ModuleSpec:
    """In place of an MLP, on one rank."""
    spec: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=experts.num_experts, moe_grouped_gemm=False, normalization="RMSNorm"
    ).submodules.mlp
    spec.module = TrainingExperts
    spec.params = {"pg_collection": build_groups(ParallelLayout()), "is_group_by_best": experts.is_group_by_best}
    return spec


class TrainingExperts(ExpertsLayer):
    """A router, the experts it chooses among, and the shared expert if there is one.

    Its values are those of the server's kernels, put over the same weights for the time of the call. Its gradients are
    those of torch's operations, which are computed beside it: one forward pass more.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[S, B, C] -> (the same shape, None)."""
        differentiable, _bias = super().forward(hidden_states)
        with torch.no_grad(), self._served_parts():
            served, _bias = super().forward(hidden_states.detach().flatten(0, -2).unsqueeze(1))
        return _WithValues.apply(differentiable, served.view_as(differentiable)), None

    @contextmanager
    def _served_parts(self) -> Iterator[None]:
        """The server's kernels, over the weights of now."""
        own = [(vars(module), {name: vars(module).get(name) for name in _REPLACED}) for module in self.modules()]
        try:
            pack_linears(self, keeps_weights=True)
            use_native_parts(self)
            pack_routers(self)
            yield
        finally:
            self.routed = None
            for values, before in own:
                for name, value in before.items():
                    values.pop(name, None)
                    if value is not None:
                        values[name] = value


class _WithValues(torch.autograd.Function):
    """Other values in place of a tensor's, with its gradient."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
