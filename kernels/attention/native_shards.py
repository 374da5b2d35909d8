"""Attention over this rank's shard, exchanged with other ranks' and merged: the Python side of native/shards.cpp.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import LayerKV
from megatron_medha.kernels.attention.native_attention import NativePlan
from megatron_medha.kernels.native_structs import native_struct

_NOT_READY = 2  # of native/shards.cpp
_Exchange, _Merge = native_struct("Exchange"), native_struct("Merge")


class PendingShard(NamedTuple):
    """One layer's attention over this rank's shard, to be merged with that of the others where it lies."""

    call: ctypes.Structure
    out_THD: Tensor
    lse_TH: Tensor


class NativeShards:
    """The rows of one batch that several ranks of this machine attend to. Every layer attends once and merges once."""

    def __init__(
        self,
        attention: Any,
        plan: NativePlan,
        rank: int,
        links: np.ndarray,
        sets: Sequence[tuple[Sequence[int], int, int]],
    ) -> None:
        """attention: a NativeAttention. plan: of all these rows. rank: this one.

        sets: ranks in ascending order, first row, number of rows.
        links: int64 [ranks, 6], `Link` of native/shards.cpp: addresses of memory shared with each of the others.
        """
        self._attention, self._plan = attention, plan
        self._attend, self._merge = attention.library.medha_attend_shard, attention.library.medha_merge_shards
        self._links, self._ranks = links, [np.array(ranks, dtype=np.int64) for ranks, _, _ in sets]
        self._sets = np.array(
            [
                (first_row, num_rows, ranks.ctypes.data, len(ranks))
                for (_, first_row, num_rows), ranks in zip(sets, self._ranks, strict=True)
            ],
            dtype=np.int64,
        )
        self._exchange = _Exchange(links.ctypes.data, len(links), rank, self._sets.ctypes.data, len(sets))

    def attend(
        self, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float, wait_ns: int = 0
    ) -> tuple[PendingShard, bool]:
        """Attend, and send the other ranks what is theirs; with wait_ns then `merge`. Returns also what that does."""
        num_tokens, num_kv_heads, group, _ = q_TKGD.shape
        lse_TH = torch.empty(num_tokens, num_kv_heads * group)
        call, out_THD = self._attention.prepared(self._plan, q_TKGD, k_TKD, v_TKD, layer, scale, lse_TH)
        found = self._attend(ctypes.byref(call), ctypes.byref(self._exchange), wait_ns)
        return PendingShard(call, out_THD, lse_TH), _is_done(found)

    def merge(self, begun: PendingShard, wait_ns: int) -> bool:
        """Wait at most so long for the others' parts, and merge them into begun.out_THD; False: not all have come."""
        return _is_done(self._merge(ctypes.byref(begun.call), ctypes.byref(self._exchange), wait_ns))

    @property
    def attended_s(self) -> float:
        """When this rank's own attention was last done, by time.monotonic and time.perf_counter (Linux: the same)."""
        return self._exchange.attended_ns / 1e9


def _is_done(found: int) -> bool:
    if found not in (0, _NOT_READY):
        raise MemoryError("the attention library could not allocate its working memory")
    return found == 0


def native_merge(attention: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`merge_outputs` of (out_THD, lse_TH) by the arithmetic of NativeShards: the same to the last bit."""
    outs = [out_THD.contiguous() for out_THD, _ in parts]
    lses = [lse_TH.contiguous() for _, lse_TH in parts]
    out_THD = torch.empty_like(outs[0])
    addresses = np.array([[x.data_ptr() for x in column] for column in (outs, lses)], dtype=np.int64)
    call = _Merge(
        out_THD.dtype == torch.bfloat16,
        *out_THD.shape,
        addresses[0].ctypes.data,
        addresses[1].ctypes.data,
        len(parts),
        out_THD.data_ptr(),
    )
    if attention.library.medha_merge(ctypes.byref(call)):
        raise MemoryError("the attention library could not allocate its working memory")
    return out_THD
