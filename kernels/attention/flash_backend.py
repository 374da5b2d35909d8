"""Attention by flash-attn 2, or by the flash kernel inside torch, over the same paged KV as the Triton backend.

flash_attn reads pages through block tables (blocks of a multiple of 256 tokens); torch's kernel knows no pages, so
every layer's keys are gathered first, which costs as much memory traffic again: a fallback, and a yardstick.
Nothing of this file has run yet: it needs a GPU.

Shapes: T tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim, N blocks, P tokens per
block, S sequences, B blocks of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange, check_shapes
from megatron_medha.kernels.kv.paged_kv import E4M3, PagedKV, allocate_paged
from megatron_medha.kernels.staging import Staging


@dataclass(frozen=True, slots=True)
class FlashGroup:
    """Sequences attended in one call: all causal, or all over the whole of their table."""

    is_causal: bool
    rows_T: Tensor         # int64, of the packed batch
    first_rows_S: Tensor   # int32 [S + 1], within rows_T
    num_keys_S: Tensor     # int32
    first_keys_S: Tensor   # int32 [S + 1]
    tables_SB: Tensor      # int32
    max_rows: int
    max_keys: int
    key_slots: Tensor      # int64, all keys one after another; empty where pages are read in place


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """One step."""

    blocks_W: Tensor       # int64, of the rows that are written
    places_W: Tensor       # int64, in their block
    written_rows_W: Tensor  # int64
    groups: tuple[FlashGroup, ...]


class FlashAttention(AttentionBackend):
    """Attention backends `flash_attn` and `torch`."""

    @classmethod
    def made(cls, name: str, device: torch.device, group: int) -> Self:
        """See AttentionBackend."""
        return cls(device, library=name)

    def __init__(self, device: torch.device, *, library: str) -> None:
        """library: flash_attn or torch. Raises ImportError where flash_attn is broken."""
        self.name = library
        self.device = device
        self._reads_pages = library == "flash_attn"
        self.block_size = 256 if self._reads_pages else 64  # flash-attn's own rule: a multiple of 256
        self._call: Callable[..., tuple[Tensor, Tensor]] = _with_flash_attn if self._reads_pages else _with_torch
        if self._reads_pages:
            import flash_attn  # noqa: F401
        self._staging = Staging(device)
        self._block_size = 0

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> PagedKV:
        """Uninitialised KV of one layer. Raises ValueError for what flash-attn cannot read."""
        if self._reads_pages and block_size % 256:
            raise ValueError(f"block_size={block_size} must be a multiple of 256 for flash_attn")
        if dtype == E4M3 or dtype == torch.float32:
            raise ValueError(f"attention_backend={self.name} holds KV in bfloat16 or float16, not {dtype}")
        self._block_size = block_size
        return allocate_paged(num_blocks, block_size, num_kv_heads, head_dim, dtype, self.device)

    def plan(self, ranges: Sequence[QueryRange]) -> FlashPlan:
        """Tables and lengths for all layers of one step, in one copy."""
        written = [r for r in ranges if r.is_written]
        slots = np.concatenate([r.table.slots(r.start, r.num_rows) for r in written] or [np.empty(0, np.int64)])
        rows = np.concatenate([_rows_of(r) for r in written] or [np.empty(0, np.int64)])
        # Single tokens and chunks apart: a group's calls are laid out for its longest query.
        kinds = (
            (True, [r for r in written if r.num_rows == 1]),
            (True, [r for r in written if r.num_rows > 1]),
            (False, [r for r in ranges if not r.is_written]),
        )
        kinds = tuple((is_causal, group) for is_causal, group in kinds if group)
        arrays = [slots // self._block_size, slots % self._block_size, rows]
        for is_causal, group in kinds:
            arrays += self._arrays(group, is_causal)
        tensors = self._staging.upload(arrays)
        groups = tuple(
            FlashGroup(
                is_causal,
                *tensors[3 + 6 * index : 8 + 6 * index],
                max_rows=max(r.num_rows for r in group),
                max_keys=max(_num_keys(r) for r in group),
                key_slots=tensors[8 + 6 * index],
            )
            for index, (is_causal, group) in enumerate(kinds)
        )
        return FlashPlan(tensors[0], tensors[1], tensors[2], groups)

    def attend_with_lse(
        self, plan: FlashPlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: PagedKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence; (out_THD, lse_TH fp32)."""
        num_tokens, num_kv_heads, group_size, head_dim = q_TKGD.shape
        check_shapes(q_TKGD, k_TKD, v_TKD)
        layer.k_NKPD.transpose(1, 2).index_put_((plan.blocks_W, plan.places_W), k_TKD[plan.written_rows_W])
        layer.v_NKPD.transpose(1, 2).index_put_((plan.blocks_W, plan.places_W), v_TKD[plan.written_rows_W])
        q_THD = q_TKGD.reshape(num_tokens, num_kv_heads * group_size, head_dim)
        out_THD = torch.empty_like(q_THD)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        for group in plan.groups:
            out, lse_HT = self._call(q_THD.index_select(0, group.rows_T), layer, group, scale)
            # flash-attn says +inf for rows without a key, unless it splits the keys.
            lse_HT = lse_HT.masked_fill(lse_HT.isposinf(), -torch.inf)
            out_THD.index_copy_(0, group.rows_T, out)
            lse_TH.index_copy_(0, group.rows_T, lse_HT.transpose(0, 1))
        return out_THD, lse_TH

    def _arrays(self, group: Sequence[QueryRange], is_causal: bool) -> list[np.ndarray]:
        """The tensors of a FlashGroup, in its order, key slots last."""
        num_keys = np.array([_num_keys(r) for r in group], np.int32)
        tables = np.zeros((len(group), max(1, -(-int(num_keys.max()) // self._block_size))), np.int32)
        key_slots = np.empty(0, np.int64)
        for row, (r, count) in enumerate(zip(group, num_keys, strict=True)):
            blocks = r.table.slots(0, int(count))[:: self._block_size] // self._block_size if count else []
            tables[row, : len(blocks)] = blocks
        if not self._reads_pages:
            key_slots = np.concatenate([r.table.slots(0, int(n)) for r, n in zip(group, num_keys, strict=True) if n]
                                       or [key_slots])  # fmt: skip
        return [
            np.concatenate([_rows_of(r) for r in group]),
            np.concatenate(([0], np.cumsum([r.num_rows for r in group]))).astype(np.int32),
            num_keys,
            np.concatenate(([0], np.cumsum(num_keys))).astype(np.int32),
            tables,
            key_slots,
        ]


def _num_keys(rows: QueryRange) -> int:
    return rows.start + (rows.num_rows if rows.is_written else 0)


def _rows_of(rows: QueryRange) -> np.ndarray:
    return np.arange(rows.first_row, rows.first_row + rows.num_rows, dtype=np.int64)


def _with_flash_attn(q_THD: Tensor, layer: PagedKV, group: FlashGroup, scale: float) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_HT), pages read where they lie."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    k_NPKD, v_NPKD = layer.k_NKPD.transpose(1, 2), layer.v_NKPD.transpose(1, 2)
    if group.max_rows == 1:
        # The variant that splits keys over multiprocessors; varlen would leave most of them idle.
        out_S1HD, lse_SH1 = flash_attn_with_kvcache(
            q_THD.unsqueeze(1), k_NPKD, v_NPKD, cache_seqlens=group.num_keys_S, block_table=group.tables_SB,
            softmax_scale=scale, causal=group.is_causal, return_softmax_lse=True,
        )  # fmt: skip
        return out_S1HD.squeeze(1), lse_SH1.squeeze(2).transpose(0, 1)
    out_THD, lse_HT, _ = flash_attn_varlen_func(
        q_THD, k_NPKD, v_NPKD, group.first_rows_S, group.first_keys_S, group.max_rows, group.max_keys,
        softmax_scale=scale, causal=group.is_causal, return_attn_probs=True, block_table=group.tables_SB,
    )  # fmt: skip
    return out_THD, lse_HT


def _with_torch(q_THD: Tensor, layer: PagedKV, group: FlashGroup, scale: float) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_HT), keys and values gathered first."""
    size = layer.block_size
    blocks, places = group.key_slots // size, group.key_slots % size
    k_SKD, v_SKD = (x.transpose(1, 2)[blocks, places] for x in (layer.k_NKPD, layer.v_NKPD))
    if not group.max_keys:
        return torch.zeros_like(q_THD), q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32).T
    flash: Any = torch.ops.aten._flash_attention_forward.default
    out_THD, lse_HT, *_ = flash(
        q_THD, k_SKD, v_SKD, group.first_rows_S, group.first_keys_S, group.max_rows, group.max_keys, 0.0,
        group.is_causal, False, scale=scale,
    )  # fmt: skip
    return out_THD, lse_HT
