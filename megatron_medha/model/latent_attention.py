"""Multi-latent attention over a cache of latent vectors: Megatron's linear layers and norms, absorbed projections.

The cache holds one key per token for all heads: its latent vector, and the part with a position. A head's key and value
are projections of the latent vector; the key's is multiplied into the query instead, the value's into the output.
So the cache is as small as the latent vectors, and every tensor-parallel rank holds all of it.

Shapes: T tokens, H heads of this rank, N numbers of a key without position, R with one, V of a value, L of the latent.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_medha.model.attention import attend
from megatron_medha.model.general_layers import GeneralCoreAttention
from megatron_medha.model.inference_context import PackedBatch


class LatentSelfAttention(MLASelfAttention):
    """Megatron's multi-latent attention over a packed batch. Its weights are absorbed before it computes."""

    key_HNL: Tensor    # from the latent vector to a head's key
    value_HVL: Tensor  # and to its value

    def absorb(self) -> None:
        """Take the projections of keys and values apart; the layer that has them gives its weight up."""
        config, up = self.config, self.linear_kv_up_proj
        parts = (config.qk_head_dim, config.v_head_dim)
        key_HNL, value_HVL = up.weight.detach().unflatten(0, (-1, sum(parts))).split(parts, dim=1)
        self.key_HNL, self.value_HVL = key_HNL.contiguous(), value_HVL.contiguous()
        up.weight.data = up.weight.data.new_empty(0)
        up.forward = _is_absorbed  # type: ignore[method-assign]  # and so is not packed for a CPU either

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, inference_context: PackedBatch, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C]. Returns (output of that shape, bias)."""
        config, core = self.config, self.core_attention
        assert isinstance(core, GeneralCoreAttention)
        q_THD = self._queries(hidden_states.squeeze(1))
        q_THN, q_THR = q_THD.split((config.qk_head_dim, config.qk_pos_emb_head_dim), dim=-1)
        latent_TD = self._whole(self.linear_kv_down_proj(hidden_states.squeeze(1))[0])
        latent_TL, k_TR = latent_TD.split((config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1)
        latent_TL = self.kv_layernorm(latent_TL)
        rotation = inference_context.rotation
        q_THR, k_T1R = core.rotated(q_THR, rotation), core.rotated(k_TR.unsqueeze(1), rotation)
        q_THL = torch.einsum("thn,hnl->thl", q_THN, self.key_HNL)
        kv_T1D = torch.cat((latent_TL.unsqueeze(1), k_T1R), dim=-1)
        q_T1HD = torch.cat((q_THL, q_THR), dim=-1).unsqueeze(1)
        layer = inference_context.kv_layers[core.layer_index]
        # The value is the key's first L numbers; what the others bring is cut off.
        out_THD = attend(
            inference_context, q_T1HD, kv_T1D, kv_T1D, layer, core.scale, is_windowed=core.is_windowed
        )
        out_THL = out_THD[..., : config.kv_lora_rank]
        out_THV = torch.einsum("thl,hvl->thv", out_THL, self.value_HVL)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(out_THV.flatten(1).unsqueeze(1))
        return output

    def _queries(self, hidden_TC: Tensor) -> Tensor:
        """Of this rank's heads, [T, H, N + R]."""
        if self.config.q_lora_rank is None:
            q_TE, _ = self.linear_q_proj(hidden_TC)
        else:
            q_TE, _ = self.linear_q_up_proj(self.q_layernorm(self._whole(self.linear_q_down_proj(hidden_TC)[0])))
        return q_TE.unflatten(-1, (-1, self.q_head_dim))

    def _whole(self, part_TD: Tensor) -> Tensor:
        """What the tensor-parallel ranks have together; Megatron's own layer asks global groups for it."""
        if self.tp_group.size() == 1:
            return part_TD
        whole_TD: Tensor = gather_from_tensor_model_parallel_region(part_TD, group=self.tp_group)
        return whole_TD


def absorb_projections(model: nn.Module) -> None:
    """Of every layer with latent attention, once its weights are loaded."""
    for module in model.modules():
        if isinstance(module, LatentSelfAttention):
            module.absorb()


def _is_absorbed(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the projection of keys and values is absorbed")
