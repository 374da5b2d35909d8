"""What the layers need to know of one packed batch: Megatron's inference context, filled once per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.points import HeldStep
from megatron_medha.model.rotary import Rotation
from megatron_medha.model.shared_attention import SharedAttention


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The last rows of a packed batch, of requests whose KV lies on several kvp ranks."""

    first_row: int
    attention: SharedAttention  # of these rows alone
    windowed: SharedAttention | None = None  # the same in layers with a window


class PackedBatch(BaseInferenceContext):
    """A mixed batch of prefill chunks and decodes, packed along the token axis as (T, 1, hidden).

    Megatron passes it unchanged to every layer as `inference_context`.
    """

    def __init__(
        self,
        *,
        backend: AttentionBackend,
        plan: Any,
        window_plan: Any = None,
        kv_layers: Sequence[LayerKV],
        rotation: Rotation,
        positions_T: Tensor | None = None,
        logit_rows: Tensor,
        hidden_rows: Tensor | None = None,
        shared: SharedRows | None = None,
        before_layer: Callable[[], None] | None = None,
        held: HeldStep | None = None,
    ) -> None:
        """plan: the backend's own, from `backend.plan`, for the rows before `shared`; None when there are none.

        window_plan: the same for layers with a window.
        kv_layers: of this pipeline stage, in order.
        positions_T: int64, of models with learned positions; others have them in `rotation`.
        logit_rows: int64, the rows whose logits the model returns.
        hidden_rows: int64, rows whose final hidden states are kept in `hidden` (for prompt logprobs, whose
        logits over a whole chunk would not fit in memory at once).
        before_layer: called before each layer; what must not wait for the whole batch is done there.
        held: how layers look for steps that overtake this one; None: it is not held.
        """
        super().__init__(materialize_only_last_token_logits=True)
        self.backend = backend
        self.plan = plan
        self.window_plan = window_plan
        self.kv_layers = kv_layers
        self.rotation = rotation
        self.positions_T = positions_T
        self.shared = shared
        # Rows whose partial results go to other ranks are rotated beforehand: those ranks attend with them as they are.
        self.is_rotated_by_backend = shared is None and backend.rotates
        self.before_layer = before_layer
        self.held = held
        self.hidden: Tensor | None = None
        self.logit_rows = logit_rows
        self.hidden_rows = hidden_rows

    def is_static_batching(self) -> bool:
        """False: rows of many requests, each at its own position."""
        return False

    def is_decode_only(self) -> bool:
        """False, always: Megatron asks only to choose among CUDA graphs, which are not used through it."""
        return False

    @property
    def padding_slice(self) -> slice:
        """Rows that Megatron zeroes before an FP8 model: none, rows that fill up a batch are never looked at."""
        return slice(0, 0)

    def last_token_logits(self, hidden_1TC: Tensor) -> Tensor:
        """Megatron's name for choosing the rows that go through the output layer: [1, T, C] -> [R, C]."""
        hidden_TC = hidden_1TC.squeeze(0)
        if self.hidden_rows is not None:
            self.hidden = hidden_TC.index_select(0, self.hidden_rows)
        return hidden_TC.index_select(0, self.logit_rows)
