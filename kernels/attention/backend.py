"""What an attention backend is: the protocol, and the types it works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.points import Points


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
    first_position: int = 0  # of the table's first token in its sequence
    # Of a shard, for a native backend: nodes of its merge tree that results are for, by their first partitions. None:
    # the rows' whole output.
    node_starts: np.ndarray | None = None
    # The first key in the table that the first row sees, the next row from the next key on; None: all see it from its
    # start. Only for backends with masks_windows.
    lowest_key: int | None = None


def check_shapes(q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
    """Raises ValueError unless these are queries, keys and values of the same tokens and heads."""
    if k_TKD.shape != (*q_TKGD.shape[:2], q_TKGD.shape[3]) or v_TKD.shape != k_TKD.shape:
        raise ValueError(
            f"queries {tuple(q_TKGD.shape)}, keys {tuple(k_TKD.shape)}, values {tuple(v_TKD.shape)} disagree"
        )


class AttentionBackend(Protocol):
    """Causal attention of a packed batch over paged KV. One object serves all layers.

    What a backend says of itself beside its name has a default here; a new backend is a file and a line of
    kernels/backend_table.py.
    """

    name: str
    block_size = 16             # tokens in a KV block by default: wastes little, where runs of blocks are read as one
    is_native = False           # its plans and pools are those of the C++ library, whose other functions take them too
    partition_tokens = 1024     # of a native one: keys whose sums are merged in a fixed tree; see merge_tree.py
    rotates = False             # there is attend_rotating
    stores_fp8 = False          # its pool may be float8_e4m3
    reads_by_slots = False      # a table of its ranges may begin anywhere in a block, as windows do
    masks_windows = False       # it looks at lowest_key
    adds_sinks = False          # attend takes sinks_H
    stores_latents_once = False  # allocate takes are_values_keys
    has_padded_plans = False    # its plans fit the fixed lengths of a CUDA graph
    has_fixed_splits = False    # it looks at fixed_split_tokens
    fixed_split_tokens: int | None = None  # keys are summed up in parts of so many, whatever else is in the batch
    tiles = ""                  # that its kernels are compiled for, where there is a choice of them
    caps_scores = False         # it looks at score_cap
    score_cap: float | None = None  # scaled scores x become cap * tanh(x / cap), of all layers

    @classmethod
    def made(cls, name: str, device: torch.device, group: int) -> Self:
        """A backend for such a device. group: query heads per key/value head. May raise NativeUnavailable."""
        return cls()

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerKV:
        """Uninitialised KV of one layer."""
        ...

    def copy_blocks(self, layer: Iterable[Tensor], sources_B: Tensor, targets_B: Tensor, block_size: int) -> None:
        """Copy what blocks of a layer hold to others; none of them is both. int64, on the pool's device."""
        for values in layer:  # [N, ...], as bytes: some dtypes cannot be indexed
            bytes_N = values.view(torch.uint8)
            bytes_N[targets_B] = bytes_N[sources_B]

    def plan(self, ranges: Sequence[QueryRange]) -> Any:
        """Everything about a batch that all layers share, computed once per step."""

    def attend(
        self,
        plan: Any,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD (H = K * G, in that order).

        sinks_H: of backends with adds_sinks, a score of each head in its softmax that brings no value.
        A query at position p of its sequence sees positions [0, p]. Every range of the plan must be written.
        """
        assert sinks_H is None, f"{self.name} adds no sinks"
        return self.attend_with_lse(plan, q_TKGD, k_TKD, v_TKD, layer, scale)[0]

    def attend_with_lse(
        self, plan: Any, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence: (out_THD, lse_TH fp32, natural), to be merged with other shards'.

        A row that sees no key of this shard has lse -inf.
        """
        ...

    def looking(self, points: Points) -> AbstractContextManager[None]:
        """While it lasts, attention has these points; a CPU's does."""
        return nullcontext()

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
        raise NotImplementedError
