"""Megatron's self-attention with our positions, our paged KV and our kernels; its linear layers and norms stay.

Shapes: T tokens, S sequence length, B sequences, K key/value heads, G query heads per key/value head, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.attention.merge import with_sinks
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.rotary import Rotary, Rotation, rotate


def attend(
    batch: PackedBatch,
    q_TKGD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: LayerKV,
    scale: float,
    sinks_H: Tensor | None = None,
    *,
    is_windowed: bool = False,
) -> Tensor:
    """Write the batch's keys and values to this layer's KV and attend over it, as over other kvp ranks'; out_THD.

    sinks_H: a score for each head that takes its part of the softmax and brings no value; None: there is none.
    """
    held = batch.held
    if held is not None:
        with batch.backend.looking(held.points):
            out_THD = _attend_looking(batch, q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H, is_windowed)
        if batch.shared is None:
            held.points.agree()
        return out_THD
    plan = batch.window_plan if is_windowed else batch.plan
    if batch.shared is None:
        return _attend_alone(batch.backend, plan, q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)
    first_row = batch.shared.first_row
    attention = batch.shared.windowed if is_windowed else batch.shared.attention
    assert attention is not None
    if not first_row:
        return attention.attend(q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)
    alone, shared = slice(0, first_row), slice(first_row, None)
    merged = attention.begin(q_TKGD[shared], k_TKD[shared], v_TKD[shared], layer, scale, sinks_H)
    # What no other rank has a part in is computed while theirs is on its way.
    parts = (q_TKGD[alone], k_TKD[alone], v_TKD[alone])
    out_THD = _attend_alone(batch.backend, plan, *parts, layer, scale, sinks_H)
    return torch.cat((out_THD, merged()))


def _attend_looking(
    batch: PackedBatch,
    q_TKGD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: LayerKV,
    scale: float,
    sinks_H: Tensor | None,
    is_windowed: bool,
) -> Tensor:
    """The same with points. Shared rows come last: between what they send and receive no other step may send."""
    assert batch.held is not None
    num_alone = batch.shared.first_row if batch.shared is not None else len(q_TKGD)
    parts = []
    if num_alone:
        alone = slice(0, num_alone)
        plan = batch.window_plan if is_windowed else batch.plan
        tensors = (q_TKGD[alone], k_TKD[alone], v_TKD[alone])
        parts.append(_attend_alone(batch.backend, plan, *tensors, layer, scale, sinks_H))
    if batch.shared is not None:
        attention = batch.shared.windowed if is_windowed else batch.shared.attention
        assert attention is not None
        shared = slice(num_alone, None)
        tensors = (q_TKGD[shared], k_TKD[shared], v_TKD[shared])
        parts.append(attention.attend(*tensors, layer, scale, sinks_H, agree=batch.held.points.agree))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_alone(
    backend: AttentionBackend,
    plan: Any,
    q_TKGD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: LayerKV,
    scale: float,
    sinks_H: Tensor | None,
) -> Tensor:
    if sinks_H is None:
        return backend.attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale)
    if backend.adds_sinks:
        return backend.attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H)
    out_THD, lse_TH = backend.attend_with_lse(plan, q_TKGD, k_TKD, v_TKD, layer, scale)
    return with_sinks(out_THD, lse_TH, sinks_H)[0]


class PagedCoreAttention(torch.nn.Module):
    """Fills Megatron's core_attention slot: the scale, and the way to attend for inference and for training."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        """Takes what Megatron passes to any core attention; what is not named here is of no use to it."""
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, layer_index: int
    ) -> Tensor:
        """A packed batch over paged KV; returns out_THD."""
        layer = batch.kv_layers[layer_index]
        if batch.is_rotated_by_backend:
            angles = batch.rotation[:2]
            return batch.backend.attend_rotating(batch.plan, q_TKGD, k_TKD, v_TKD, angles, layer, self.scale)
        return attend(batch, q_TKGD, k_TKD, v_TKD, layer, self.scale)

    def forward_training(self, q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
        """Plain causal attention with gradients, [S, B, H, D]. Megatron's own is 40 times slower on CPU."""
        q_BHSD, k_BKSD, v_BKSD = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBKD, v_SBKD))
        group = q_BHSD.shape[1] // k_BKSD.shape[1]
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD,
            k_BKSD.repeat_interleave(group, dim=1),
            v_BKSD.repeat_interleave(group, dim=1),
            is_causal=True,
            scale=self.scale,
        )
        return out_BHSD.permute(2, 0, 1, 3)


class MedhaSelfAttention(SelfAttention):
    """Self-attention over a packed batch when given one, plain causal attention otherwise."""

    def __init__(self, *args: Any, rotary: Rotary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary
        self._layer_index = self.layer_number - 1 - self._get_pp_layer_offset_for_inference()
        self._has_qk_norm = self.config.qk_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: PackedBatch | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C] with a batch, [S, B, C] without one. Returns (output of that shape, bias).

        The mask is always causal; attention_mask and what else Megatron passes to any attention is not looked at.
        """
        if inference_context is None:
            return self._forward_training(hidden_states)
        if inference_context.is_rotated_by_backend:
            q_TKGD, k_TKD, v_TKD = self._projected(hidden_states)
        else:
            q_TKGD, k_TKD, v_TKD = self.rotated(hidden_states, inference_context.rotation)
        out_THD = self.attended(q_TKGD, k_TKD, v_TKD, inference_context)
        return self.linear_proj(out_THD.flatten(1).unsqueeze(1))

    def rotated(self, hidden_T1C: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, K, G, D] and keys [T, K, D] at their positions, and values [T, K, D]."""
        if self._has_qk_norm:
            q_TKGD, k_TKD, v_TKD = self._projected(hidden_T1C)
            return rotate(q_TKGD, rotation), rotate(k_TKD, rotation), v_TKD
        mixed_TKJD = self._mixed(hidden_T1C)
        turned_TKJD = rotate(mixed_TKJD[:, :, :-1], rotation)  # all but the value at once
        return turned_TKJD[:, :, :-1], turned_TKJD[:, :, -1], mixed_TKJD[:, :, -1]

    def attended(self, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch) -> Tensor:
        """Core attention of a packed batch, out_THD."""
        out_THD: Tensor = self.core_attention(q_TKGD, k_TKD, v_TKD, batch, self._layer_index)
        return out_THD

    def _projected(self, hidden_T1C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation."""
        if self._has_qk_norm:
            query, key, value = self.get_query_key_value_tensors(hidden_T1C, None)
            num_tokens, _, num_kv_heads, head_dim = key.shape
            return query.view(num_tokens, num_kv_heads, -1, head_dim), key.squeeze(1), value.squeeze(1)
        mixed_TKJD = self._mixed(hidden_T1C)
        return mixed_TKJD[:, :, :-2], mixed_TKJD[:, :, -2], mixed_TKJD[:, :, -1]

    def _mixed(self, hidden_T1C: Tensor) -> Tensor:
        """Megatron's layout: queries, key and value of one group after another, [T, K, G + 2, D]."""
        mixed, (_, head_dim, _) = self.get_query_key_value_tensors(hidden_T1C, None, split_qkv=False)
        num_tokens, _, num_kv_heads, _ = mixed.shape
        return mixed.view(num_tokens, num_kv_heads, -1, head_dim)

    def _forward_training(self, hidden_SBC: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_SBC, None)
        rotation = self.rotary.consecutive(query.shape[0], query.device)
        out_SBHD = self.core_attention.forward_training(rotate(query, rotation), rotate(key, rotation), value)
        return self.linear_proj(out_SBHD.flatten(2))
