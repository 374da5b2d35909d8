"""Attention over this rank's shard, exchanged with other ranks' and merged: the Python side of native/shards.cpp.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim, N results of one
token and node of the merge tree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import LayerKV
from megatron_medha.kernels.attention.native_attention import NativePlan, sinks_of
from megatron_medha.kernels.native_structs import native_struct

_NOT_READY = 2  # of native/shards.cpp
_Exchange = native_struct("Exchange")


class SharedChunk(NamedTuple):
    """Consecutive rows of a batch that belong to one sequence, and where its keys lie, in their order."""

    first_row: int
    num_rows: int
    shards: tuple[tuple[int, np.ndarray], ...]  # rank, and first partitions of its nodes: merge_tree.py


class PendingShard(NamedTuple):
    """One layer's attention over this rank's shard, to be merged with that of the others."""

    call: ctypes.Structure
    out_THD: Tensor
    nodes_NHE: Tensor       # fp32, E = D + 2
    sinks_H: Tensor | None  # fp32


class NativeShards:
    """The rows of one batch that several ranks attend to. Every layer attends once and merges once."""

    def __init__(
        self, attention: Any, plan: NativePlan, rank: int, links: np.ndarray | None, chunks: Sequence[SharedChunk]
    ) -> None:
        """attention: a NativeAttention. plan: of all these rows. rank: this one.

        links: int64 [ranks, 6], `Link` of native/shards.cpp: addresses of memory shared with each of the others.
        """
        self._attention, self._plan = attention, plan
        library = attention.library
        self._attend, self._attend_shard, self._merge = (
            library.medha_attend, library.medha_attend_shard, library.medha_merge_shards
        )  # fmt: skip
        self._links, self._chunks = links, chunks
        num_ranks = 1 + max(other for chunk in chunks for other, _ in chunk.shards) if links is None else len(links)
        self._shards = np.array(
            [(other, starts.ctypes.data, len(starts)) for chunk in chunks for other, starts in chunk.shards],
            dtype=np.int64,
        )
        ends = accumulate(len(chunk.shards) for chunk in chunks)
        first, size = self._shards.ctypes.data, self._shards.strides[0]
        self._table = np.array(
            [
                (chunk.first_row, chunk.num_rows, first + (end - len(chunk.shards)) * size, len(chunk.shards))
                for chunk, end in zip(chunks, ends, strict=True)
            ],
            dtype=np.int64,
        )
        self._arrived = np.zeros(num_ranks, dtype=np.int64)  # addresses
        address = None if links is None else links.ctypes.data
        self._exchange = _Exchange(address, num_ranks, rank, self._table.ctypes.data, len(chunks))

    def begin(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> PendingShard:
        """A layer's call, still to be made. sinks_H: see AttentionBackend.attend."""
        _, num_kv_heads, group, head_dim = q_TKGD.shape
        num_heads = num_kv_heads * group
        nodes_NHE = torch.empty(self._plan.num_results, num_heads, head_dim + 2)
        call, out_THD = self._attention.prepared(self._plan, q_TKGD, k_TKD, v_TKD, layer, scale, None, nodes_NHE)
        return PendingShard(call, out_THD, nodes_NHE, None if sinks_H is None else sinks_of(sinks_H, call))

    def attend(self, begun: PendingShard) -> None:
        """Fill nodes_NHE."""
        _is_done(self._attend(ctypes.byref(begun.call)))

    def attend_and_send(self, begun: PendingShard, wait_ns: int = 0) -> bool:
        """`attend`, and send the other ranks what is theirs; with wait_ns then `merge`. Returns what that does."""
        return _is_done(self._attend_shard(ctypes.byref(begun.call), ctypes.byref(self._exchange), wait_ns))

    def merge(self, begun: PendingShard, wait_ns: int) -> bool:
        """Wait at most so long for what others have sent, and merge it into begun.out_THD; False: not all has come."""
        return _is_done(self._merge(ctypes.byref(begun.call), ctypes.byref(self._exchange), wait_ns))

    def merge_arrived(self, begun: PendingShard, arrived: Mapping[int, Tensor]) -> None:
        """Merge what has come from each rank, contiguous, another way."""
        for rank, nodes in arrived.items():
            self._arrived[rank] = nodes.data_ptr()
        self._exchange.arrived = self._arrived.ctypes.data
        self.merge(begun, 0)
        self._exchange.arrived = None

    @property
    def attended_s(self) -> float:
        """When this rank's own attention was last done, by time.monotonic and time.perf_counter (Linux: the same)."""
        return self._exchange.attended_ns / 1e9


def _is_done(found: int) -> bool:
    if found not in (0, _NOT_READY):
        raise MemoryError("the attention library could not allocate its working memory")
    return found == 0
