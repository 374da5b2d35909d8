"""What an attention backend is: the protocol, and the types it works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_medha.kernels.kv.slot_table import SlotTable


class LayerKV(NamedTuple):
    """One layer's keys and values for all blocks of the pool; the layout is the backend's own."""

    k: Tensor
    v: Tensor


class QueryRange(NamedTuple):
    """Consecutive rows of the packed batch that belong to one sequence."""

    first_row: int
    num_rows: int
    start: int  # position of the first row in its sequence: KV for [0, start) already exists
    table: SlotTable
    # False: the rows' own keys and values belong to another rank's shard. They are not written, and the rows see
    # all of [0, start) of this table and nothing of one another.
    is_written: bool = True


class AttentionBackend(Protocol):
    """Causal attention of a packed batch over paged KV. One object serves all layers."""

    name: str
    min_run_tokens: int  # for the slot tables it is given

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerKV:
        """Uninitialised KV of one layer."""

    def plan(self, ranges: Sequence[QueryRange]) -> Any:
        """Everything about a batch that all layers share, computed once per step."""

    def attend(
        self, plan: Any, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD (H = K * G, in that order).

        A query at position p of its sequence sees positions [0, p]. Every range of the plan must be written.
        """

    def attend_with_lse(
        self, plan: Any, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence: (out_THD, lse_TH fp32, natural), to be merged with other shards'.

        A row that sees no key of this shard has lse -inf.
        """


@runtime_checkable
class RotatingBackend(Protocol):
    """A backend that also rotates queries and keys, in the pass that writes keys and values to the pool."""

    def attend_rotating(
        self,
        plan: Any,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: LayerKV,
        scale: float,
    ) -> Tensor:
        """`attend` with queries and keys still to be rotated by (cos_TD, signed_sin_TD), fp32."""
