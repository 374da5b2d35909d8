"""Megatron's decoder layer with a short path for inference; training takes Megatron's own.

At one token per step Megatron's bookkeeping around the same operations (dropout closures, offload hooks, empty
cross-attention, profiler ranges) costs more time than the operations themselves.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_medha.model.inference_context import PackedBatch


class MedhaTransformerLayer(TransformerLayer):
    """A pre-norm decoder layer: attention and gated SiLU MLP, each added to its input. No biases, no dropout."""

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: PackedBatch | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [T, 1, C] with a batch, [S, B, C] without one. Returns (output, None)."""
        if inference_context is None:
            return super().forward(hidden_states, *args, **kwargs)
        if inference_context.pieces:
            return inference_context.piecewise(self.forward, hidden_states)
        if inference_context.before_layer is not None:
            inference_context.before_layer()
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), inference_context=inference_context
        )
        hidden_states = hidden_states + attended
        return hidden_states + self._mlp(self.pre_mlp_layernorm(hidden_states)), None

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
