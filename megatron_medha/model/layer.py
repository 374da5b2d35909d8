"""Megatron's decoder layer with a short path for inference; training takes Megatron's own.

At one token per step Megatron's bookkeeping around the same operations (dropout closures, offload hooks, empty
cross-attention, profiler ranges) costs more time than the operations themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_medha.kernels.points import HeldStep
from megatron_medha.model.inference_context import PackedBatch


class MedhaTransformerLayer(TransformerLayer):
    """A pre-norm decoder layer: attention and gated SiLU MLP, each added to its input. No biases, no dropout."""

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: PackedBatch | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C] with a batch, [S, B, C] without one. Returns (output, None)."""
        if inference_context is None:
            return super().forward(hidden_states, *args, **kwargs)
        if inference_context.held is not None:
            return self._held(hidden_states, inference_context, inference_context.held), None
        if inference_context.before_layer is not None:
            inference_context.before_layer()
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), inference_context=inference_context
        )
        hidden_states = hidden_states + attended
        return hidden_states + self._mlp(self.pre_mlp_layernorm(hidden_states)), None

    def _held(self, hidden_T1C: Tensor, batch: PackedBatch, held: HeldStep) -> Tensor:
        """The same with points between blocks of rows, and within attention."""
        attention = self.self_attention
        parts = [
            attention.rotated(self.input_layernorm(hidden_T1C[rows]), batch.rotation.rows(rows))
            for rows in held.blocks(len(hidden_T1C))
        ]
        q_TKGD, k_TKD, v_TKD = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))
        out_T1C = attention.attended(q_TKGD, k_TKD, v_TKD, batch).flatten(1).unsqueeze(1)
        outputs = []
        for rows in held.agreed_blocks(len(hidden_T1C)):
            block_T1C = hidden_T1C[rows] + attention.linear_proj(out_T1C[rows])[0]
            outputs.append(block_T1C + self._mlp(self.pre_mlp_layernorm(block_T1C)))
        return torch.cat(outputs)

    def _mlp(self, hidden_T1C: Tensor) -> Tensor:
        if type(self.mlp) is not MLP:  # a fused or routed one knows best
            return self.mlp(hidden_T1C)[0]
        gate_and_up, _ = self.mlp.linear_fc1(hidden_T1C)
        return self.mlp.linear_fc2(self.gated_silu(gate_and_up))[0]

    @staticmethod
    def gated_silu(gate_and_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]; native_parts.py may put a kernel in its place."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        # In place, and without Megatron's "+ 0.0": each pass over a chunk's widest tensor costs half a millisecond.
        return F.silu(gate).mul_(up)
