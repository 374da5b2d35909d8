"""The CPU attention backend `native`: one C++ call per layer writes a batch's keys and values and attends.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim, N groups of 16
slots.
Storage is fp32 or bf16, arithmetic fp32; matrix tiles (AMX) round the softmax's weights to bf16. A token's output
depends on its own sequence alone, to the last bit: not on who shares its batch, on how its prompt was cut into chunks,
on where its blocks lie if they are multiples of 16 tokens, on the number of threads, or on how its keys are cut into
shards that begin and end with a partition. How keys and values lie in the pool: native/layout.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV, QueryRange, check_shapes
from megatron_medha.kernels.native_build import gomp_parallel_address, native_library, native_target
from megatron_medha.kernels.native_structs import native_struct
from megatron_medha.kernels.points import Points, points_in_calls

ROW_FIELDS = 11  # of `Rows` of native/layout.h
_GROUP = 16
_DTYPES = (torch.float32, torch.bfloat16)
_Call = native_struct("Call")


class NativePlan(NamedTuple):
    """A packed batch as the library takes it. Arrays whose addresses are in `rows` are kept alive beside it."""

    slots: np.ndarray | None  # int64 [T]; -1: a row of another rank's shard, not written here
    rows: np.ndarray          # int64 [ranges, ROW_FIELDS]
    runs: tuple[np.ndarray, ...]
    nodes: tuple[np.ndarray | None, ...]  # of each range
    num_results: int          # of rows that have nodes, one for each of them
    num_threads: int
    is_all_written: bool


def pool_width(head_dim: int) -> int:
    """Numbers of a group of 16 tokens of one head, whose dimensions are filled up to a multiple of 16."""
    return _GROUP * (-(-head_dim // _GROUP) * _GROUP)


class NativeAttention(AttentionBackend):
    """Attention backend `native`."""

    name = "native"
    adds_sinks = True
    reads_by_slots = True
    is_native = True

    def __init__(self, target: str | None = None) -> None:
        """target: as for `native_library`, which may raise NativeUnavailable."""
        self.target = target or native_target()
        self.library = native_library(self.target)
        self._attend = self.library.medha_attend
        self._run_parallel = gomp_parallel_address()

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerKV:
        """Uninitialised KV of one layer: two tensors [K, N, 16 * D], D rounded up to a multiple of 16."""
        if dtype not in _DTYPES:
            raise ValueError(f"the native backend keeps KV in float32 or bfloat16, not in {dtype}")
        num_groups = -(-num_blocks * block_size // _GROUP)
        shape = (num_kv_heads, num_groups, pool_width(head_dim))
        return LayerKV(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))

    def copy_blocks(self, layer: Iterable[Tensor], sources_B: Tensor, targets_B: Tensor, block_size: int) -> None:
        """See AttentionBackend."""
        if block_size % _GROUP:
            within = torch.arange(block_size)
            slots = [(blocks_B[:, None] * block_size + within).flatten() for blocks_B in (sources_B, targets_B)]
            _copy_slots(*layer, *slots)
            return
        for pool in layer:  # whole groups
            blocks = pool.view(len(pool), -1, block_size // _GROUP * pool.shape[2])
            blocks[:, targets_B] = blocks[:, sources_B]

    def plan(self, ranges: Sequence[QueryRange]) -> NativePlan:
        """Slots to write and keys to read, for all layers of one step."""
        is_all_written = all(r.is_written for r in ranges)
        if is_all_written and all(r.num_rows == 1 for r in ranges):
            slots = np.array([r.table.slot(r.start) for r in ranges], dtype=np.int64)
        else:
            pieces = [
                r.table.slots(r.start, r.num_rows) if r.is_written else np.full(r.num_rows, -1, dtype=np.int64)
                for r in ranges
            ]
            slots = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        runs = tuple(r.table.runs_in_order() for r in ranges)
        partition_tokens, num_results = self.partition_tokens, 0
        fields: list[tuple[int, ...]] = []
        for r, table_runs in zip(ranges, runs, strict=True):
            starts = r.node_starts
            node_address, num_nodes = (0, 0) if starts is None else (starts.ctypes.data, len(starts))
            fields.append((
                r.first_row, r.num_rows, r.start + r.is_written, r.is_written, r.table.runs_address, len(table_runs),
                r.first_position, partition_tokens, node_address, num_nodes, num_results,
            ))  # fmt: skip
            num_results += r.num_rows * num_nodes
        rows, nodes = np.array(fields, dtype=np.int64), tuple([r.node_starts for r in ranges])
        return NativePlan(slots, rows, runs, nodes, num_results, torch.get_num_threads(), is_all_written)

    def attend(
        self,
        plan: NativePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD."""
        assert plan.is_all_written, "rows of another rank's shard need attend_with_lse"
        call, out_THD = self.prepared(plan, q_TKGD, k_TKD, v_TKD, layer, scale, None)
        kept_H = None if sinks_H is None else sinks_of(sinks_H, call)
        out_THD = self._attended(call, out_THD)
        del kept_H  # not before: the call has its address
        return out_THD

    def attend_with_lse(
        self, plan: NativePlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: LayerKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend`, and the natural log-sum-exp of the scaled scores, lse_TH fp32. No key seen: 0 and -inf."""
        num_tokens, num_kv_heads, group, _ = q_TKGD.shape
        lse_TH = torch.empty(num_tokens, num_kv_heads * group)
        return self._attended(*self.prepared(plan, q_TKGD, k_TKD, v_TKD, layer, scale, lse_TH)), lse_TH

    def looking(self, points: Points) -> AbstractContextManager[None]:
        """See AttentionBackend; also calls of the decoder have them."""
        return points_in_calls(self.library, points)

    def _attended(self, call: ctypes.Structure, out_THD: Tensor) -> Tensor:
        if self._attend(ctypes.byref(call)):
            raise MemoryError("the attention library could not allocate its working memory")
        return out_THD

    def prepared(
        self,
        plan: NativePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: LayerKV,
        scale: float,
        lse_TH: Tensor | None,
        nodes: Tensor | None = None,
    ) -> tuple[ctypes.Structure, Tensor]:
        """What an entry point of the library takes, and the output it fills, out_THD. It holds nothing alive.

        nodes: [results of the plan, H, D + 2], filled instead where rows have nodes.

        Raises ValueError for what does not fit.
        """
        num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
        check_shapes(q_TKGD, k_TKD, v_TKD)
        pool, dtype = layer.k, layer.k.dtype
        if q_TKGD.dtype != dtype or k_TKD.dtype != dtype or v_TKD.dtype != dtype:
            raise ValueError(f"queries {q_TKGD.dtype}, keys {k_TKD.dtype}, values {v_TKD.dtype}, but KV is {dtype}")
        if pool.shape[0] != num_kv_heads or pool.shape[2] != pool_width(head_dim):
            raise ValueError(f"{num_kv_heads} heads of {head_dim} do not fit a pool {tuple(pool.shape)}")
        if plan.slots is not None and len(plan.slots) != num_tokens:
            raise ValueError(f"a plan for {len(plan.slots)} tokens was given {num_tokens}")
        if plan.num_results and (nodes is None or len(nodes) != plan.num_results):
            raise ValueError(f"a plan with {plan.num_results} results of nodes needs as many places for them")
        *q_strides, q_dim = q_TKGD.stride()
        *k_strides, k_dim = k_TKD.stride()
        *v_strides, v_dim = v_TKD.stride()
        if not (q_dim == k_dim == v_dim == 1) and head_dim > 1:
            raise ValueError("the last dimension of queries, keys and values must be dense")
        out_THD = torch.empty(num_tokens, num_kv_heads * group, head_dim, dtype=dtype)
        call = _Call(
            dtype == torch.bfloat16,
            num_tokens,
            num_kv_heads,
            group,
            head_dim,
            scale,
            plan.num_threads,
            self._run_parallel,
            pool.data_ptr(),
            layer.v.data_ptr(),
            pool.stride(0),
            q_TKGD.data_ptr(),
            k_TKD.data_ptr(),
            v_TKD.data_ptr(),
            *q_strides,
            *k_strides,
            *v_strides,
            None if plan.slots is None else plan.slots.ctypes.data,
            out_THD.data_ptr(),
            None if lse_TH is None else lse_TH.data_ptr(),
            None if nodes is None else nodes.data_ptr(),
            None,
            plan.rows.ctypes.data,
            len(plan.rows),
        )
        return call, out_THD


def sinks_of(sinks_H: Tensor, call: ctypes.Structure) -> Tensor:
    """Have a call add sinks: to be kept alive while it is made."""
    sinks_H = sinks_H.detach().float().contiguous()
    num_heads = call.num_kv_heads * call.queries_per_kv_head
    if sinks_H.shape != (num_heads,):
        raise ValueError(f"sinks {tuple(sinks_H.shape)} for {num_heads} heads")
    call.sinks = sinks_H.data_ptr()
    return sinks_H


def _copy_slots(k_KNW: Tensor, v_KNW: Tensor, sources_S: Tensor, targets_S: Tensor) -> None:
    """Copy single slots; how they lie in their group: native/layout.h."""
    num_heads, num_groups, _ = k_KNW.shape
    pair = 2 if k_KNW.dtype == torch.bfloat16 else 1
    k = k_KNW.view(num_heads, num_groups, -1, _GROUP, pair).movedim(3, 2)         # slot in group, then its numbers
    v = v_KNW.view(num_heads, num_groups, _GROUP // pair, -1, pair).movedim(4, 3)  # pair, slot in pair, numbers
    source, target = sources_S % _GROUP, targets_S % _GROUP
    k[:, targets_S // _GROUP, target] = k[:, sources_S // _GROUP, source]
    v[:, targets_S // _GROUP, target // pair, target % pair] = v[:, sources_S // _GROUP, source // pair, source % pair]
