"""Megatron's own decoder layers over paged KV: any layer that TransformerConfig describes.

Megatron computes the layer as in training. Two things are ours: attention itself, in the slot core_attention, and the
rotation of queries and keys, which happens there too. So biases, norms, gates and experts come as Megatron has them.

Shapes: T tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_medha.core.model_spec import ModelSpec
from megatron_medha.kernels.linear.sliced_linear import tree_sum
from megatron_medha.model.attention import attend
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.rotary import Rotation, rotate
from megatron_medha.parallel.tp_all_reduce import tree_all_reduce


class GeneralTransformerLayer(TransformerLayer):
    """Megatron's layer. Between layers a rank looks after steps that have come meanwhile."""

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: PackedBatch, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C]. Returns (output of that shape, None)."""
        if inference_context.held is None:
            if inference_context.before_layer is not None:
                inference_context.before_layer()
            return super().forward(hidden_states, inference_context=inference_context)
        attended, _ = self._forward_attention(hidden_states, inference_context=inference_context)
        blocks = inference_context.held.agreed_blocks(len(attended))
        return torch.cat([self._forward_mlp(attended[rows], inference_context) for rows in blocks]), None


class PostNormLayer(TransformerLayer):
    """A layer whose attention and MLP have norms of their outputs, which megatron-core's layers do not."""

    def __init__(self, *args: Any, post_norm: Any, **kwargs: Any) -> None:
        """post_norm: what makes a norm, as Megatron calls it."""
        super().__init__(*args, **kwargs)
        config = self.config
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_attention_layernorm, self.post_mlp_layernorm = post_norm(**sizes), post_norm(**sizes)

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: PackedBatch, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [T, 1, C]. Returns (output of that shape, None)."""
        if inference_context.before_layer is not None:
            inference_context.before_layer()
        attended = self.self_attention(self.input_layernorm(hidden_states), inference_context=inference_context)
        hidden_states = hidden_states + self.post_attention_layernorm(_with_bias(*attended))
        if inference_context.held is None:
            return self._with_mlp(hidden_states), None
        blocks = inference_context.held.agreed_blocks(len(hidden_states))
        return torch.cat([self._with_mlp(hidden_states[rows]) for rows in blocks]), None

    def _with_mlp(self, hidden_T1C: Tensor) -> Tensor:
        computed = self.mlp(self.pre_mlp_layernorm(hidden_T1C))
        return hidden_T1C + self.post_mlp_layernorm(_with_bias(*computed))


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias


class GeneralSelfAttention(SelfAttention):
    """Megatron's self-attention, which calls core_attention as in training: on all queries, keys and values at once."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, inference_context: PackedBatch, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C]. Returns (output of that shape, bias). Megatron is given no rotary angles."""
        self.core_attention.batch = inference_context
        try:
            return super().forward(hidden_states, None)
        finally:
            self.core_attention.batch = None


class GeneralCoreAttention(torch.nn.Module):
    """Rotates queries and keys at their positions and attends over paged KV."""

    def __init__(
        self, config: Any, layer_number: int, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        """Takes what Megatron passes to any core attention."""
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.batch: PackedBatch | None = None
        self._tp_group = pg_collection.tp
        num_heads = config.num_attention_heads // self._tp_group.size()
        # Megatron's name for a score beside those of the keys, by head.
        self.softmax_offset: Tensor | None
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype))
        elif config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", torch.zeros(num_heads), persistent=False)
        else:
            self.softmax_offset = None

    def place(self, spec: ModelSpec, layer_index: int) -> None:
        """Say which model's layer this is. layer_index: on this pipeline stage."""
        no_rope = spec.no_rope_layers[self.layer_number - 1] if spec.no_rope_layers else False
        self.is_rotated = spec.positions == "rotary" and not no_rope
        self.is_windowed = spec.is_windowed(self.layer_number - 1)
        self.is_local = bool(spec.local_rope_layers) and spec.local_rope_layers[self.layer_number - 1]
        if spec.softmax_scale is not None:
            self.scale = spec.softmax_scale
        self.num_rotated, self.is_interleaved = spec.num_rotated, spec.is_rotary_interleaved
        self.layer_index = layer_index

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query: [T, 1, H, D], key, value: [T, 1, K, D], not rotated yet; returns [T, 1, H * D]."""
        batch = self.batch  # another one's, once a step has overtaken this one
        assert batch is not None, "general layers compute packed batches only"
        q_THD, k_TKD, v_TKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.is_rotated:
            rotation = batch.rotation
            if self.is_local:
                assert rotation.local is not None
                rotation = rotation.local
            q_THD, k_TKD = self.rotated(q_THD, rotation), self.rotated(k_TKD, rotation)
        q_TKGD = q_THD.unflatten(1, (k_TKD.shape[1], -1))
        layer = batch.kv_layers[self.layer_index]
        out_THD = attend(
            batch, q_TKGD, k_TKD, v_TKD, layer, self.scale, self.softmax_offset, is_windowed=self.is_windowed
        )
        return out_THD.flatten(1).unsqueeze(1)

    def rotated(self, x_THD: Tensor, rotation: Rotation) -> Tensor:
        """At their positions. Interleaved pairs come apart, first numbers first: of q and k alike, so scores stay."""
        turned_THD, rest_THD = x_THD[..., : self.num_rotated], x_THD[..., self.num_rotated :]
        if self.is_interleaved:
            turned_THD = torch.cat((turned_THD[..., 0::2], turned_THD[..., 1::2]), dim=-1)
        turned_THD = rotate(turned_THD, rotation)
        return turned_THD if not rest_THD.shape[-1] else torch.cat((turned_THD, rest_THD), dim=-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the scores beside the keys', if they are learned."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class WideNorm(torch.nn.Module):
    """RMSNorm of the queries, or keys, of all heads of a token together, whichever ranks have them."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, num_heads: int, tp_group: Any) -> None:
        """hidden_size: of a head. num_heads: of all tp ranks."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_heads // tp_group.size() * hidden_size))
        self.eps, self._size, self._tp_group = eps, num_heads * hidden_size, tp_group
        self.num_ranks: int = tp_group.size()
        self.num_slices = 1  # of the numbers here, added up in a binary tree; see virtual_tp.py
        # What sums a tensor over the ranks, in place; None: there is one.
        self.sum_over_tp: Callable[[Tensor], object] | None = None
        if self.num_ranks > 1:
            self.sum_over_tp = partial(tree_all_reduce, tp_group)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, D] -> the same shape; computed in fp32."""
        flat = x.flatten(-2).float()
        squares = tree_sum(flat.square().unflatten(-1, (self.num_slices, -1)).sum(-1).split(1, dim=-1))
        if self.sum_over_tp is not None:
            squares = squares.contiguous()
            self.sum_over_tp(squares)
        normed = flat * torch.rsqrt(squares / self._size + self.eps)
        return (normed * self.weight.float()).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description: each rank has the weights of its heads."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ZeroCentredNorm(torch.nn.Module):
    """LayerNorm or RMSNorm whose stored weight is less by one: Transformer Engine has it, torch does not."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Takes what Megatron passes to any norm."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps
        self.bias: Tensor | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; computed in fp32, as the sum 1 + weight has no room in bf16."""
        weight_C = self.weight.float() + 1.0
        if self.bias is None:
            return F.rms_norm(x.float(), x.shape[-1:], weight_C, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), x.shape[-1:], weight_C, self.bias.float(), self.eps).to(x.dtype)
