"""Attention by FlashAttention-3 (Hopper, bf16 or fp16) over the paged KV that the Triton backend has, too.

Rotation and writing are the Triton kernels. Attention of a whole batch, chunks and decodes, is one call of the package;
rows of other ranks' shards, which have no causal order here, are another. Called by its real signature and checked over
a fake of the package (tests/kernels/fake_flash3.py); nothing of this file has run on a GPU yet.

Every call makes its own schedule on the device. One schedule per step for all layers, as the package offers it, would
save a small launch per layer; whether the package leaves it usable after a call is not documented.

Shapes: T tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim, S sequences, B blocks of
the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.kv.block_tables import BlockTables
from megatron_medha.kernels.kv.paged_kv import PagedKV, allocate_paged
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.kernels.staging import Staging
from megatron_medha.kernels.triton.triton_write import rotate_and_write

_DTYPES = (torch.bfloat16, torch.float16)
_HOPPER = (9, 0)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class HostCall:
    """The sequences of one call, on the host. Rows lie one after another; those of `rows_T` where it is not empty."""

    rows_T: np.ndarray        # int64, of the packed batch
    first_rows_S: np.ndarray  # int32 [S + 1]
    num_keys_S: np.ndarray    # int32
    table_rows_S: np.ndarray  # int64, in the device's block tables
    max_rows: int             # of a sequence
    num_blocks: int           # of the longest sequence, at least 1

    @property
    def arrays(self) -> list[np.ndarray]:
        """For staging."""
        return [self.rows_T, self.first_rows_S, self.num_keys_S, self.table_rows_S]


@dataclass(frozen=True, slots=True)
class FlashHostPlan:
    """What a step needs on the device, still on the host."""

    slots_T: np.ndarray  # int64; -1 where nothing is written
    own: HostCall        # rows that see a causal part of their sequence
    foreign: HostCall    # rows of other ranks' shards, which see all keys here
    places: np.ndarray   # int64, and
    blocks: np.ndarray   # int32: what is new in the block tables

    @property
    def arrays(self) -> list[np.ndarray]:
        """For staging; `Flash3Attention.on_device` takes them back in this order."""
        return [self.slots_T, *self.own.arrays, *self.foreign.arrays, self.places, self.blocks]


@dataclass(frozen=True, slots=True)
class FlashCapacity:
    """The fixed lengths of a plan's lists inside a CUDA graph."""

    num_tokens: int
    num_sequences: int  # one more than the step may have: rows that belong to nobody are its
    max_rows: int


@dataclass(frozen=True, slots=True)
class DeviceCall:
    """The same on the device."""

    rows_T: Tensor | None  # None: all rows of the batch
    first_rows_S: Tensor
    num_keys_S: Tensor
    pages_SB: Tensor
    max_rows: int
    is_causal: bool


@dataclass(frozen=True, slots=True)
class FlashDevicePlan:
    """One step."""

    slots_T: Tensor
    calls: tuple[DeviceCall, ...]


class Flash3Attention(AttentionBackend):
    """Attention backend `flash_attn_3`. One object serves all layers of a rank."""

    name = "flash_attn_3"
    block_size = 128  # the package's own key tile for causal attention at head dim 128: loaded as it lies
    rotates = has_padded_plans = True
    is_quantised = False

    @classmethod
    def made(cls, name: str, device: torch.device, group: int) -> Self:
        """See AttentionBackend."""
        return cls(device, group=group)

    def __init__(self, device: torch.device, *, group: int) -> None:
        """Raises NativeUnavailable where the package has no kernels. On a CPU a fake of it must be there."""
        if device.type == "cuda" and torch.cuda.get_device_capability(device) != _HOPPER:
            raise NativeUnavailable("FlashAttention-3 has kernels for Hopper (compute capability 9.0) only")
        try:
            from flash_attn_interface import flash_attn_with_kvcache
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            raise NativeUnavailable(f"flash_attn_interface cannot be imported: {error}") from error
        self._flash_attention = flash_attn_with_kvcache
        self.device = device
        self._packs_heads = group > 1
        self._staging = Staging(device)
        self.tables: BlockTables | None = None

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> PagedKV:
        """Uninitialised KV of one layer. Raises ValueError for what the package cannot read."""
        if dtype not in _DTYPES:
            raise ValueError(f"KV is {dtype}; FlashAttention-3 is given bfloat16 or float16, use triton for others")
        if head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"head_dim={head_dim}: FlashAttention-3 has kernels up to {_MAX_HEAD_DIM}")
        if self.tables is None:
            self.tables = BlockTables(num_blocks, block_size, self.device)
            self._block_size = block_size
        return allocate_paged(num_blocks, block_size, num_kv_heads, head_dim, dtype, self.device)

    def room(self, num_tokens: int, num_sequences: int, *, has_chunks: bool) -> FlashCapacity:
        """Lists long enough for every step of that many tokens and sequences."""
        return FlashCapacity(num_tokens, num_sequences + 1, num_tokens if has_chunks else 1)

    def plan(self, ranges: Sequence[QueryRange]) -> FlashDevicePlan:
        """Lists for all layers of one step, on their way to the device in one copy."""
        host = self.host_plan(ranges)
        return self.on_device(host, self._staging.upload(host.arrays))

    def host_plan(self, ranges: Sequence[QueryRange]) -> FlashHostPlan:
        """The lists of one step. Afterwards the device's block tables are taken to know what `places` names."""
        assert self.tables is not None, "a plan before any KV"
        places, blocks = self.tables.news(r.table for r in ranges)
        own = [r for r in ranges if r.is_written]
        foreign = [r for r in ranges if not r.is_written]
        slots = [
            r.table.slots(r.start, r.num_rows) if r.is_written else np.full(r.num_rows, -1, np.int64) for r in ranges
        ]
        is_mixed = bool(own and foreign)
        return FlashHostPlan(
            np.concatenate(slots), self._call(own, is_mixed), self._call(foreign, is_mixed), places, blocks
        )

    def on_device(
        self, host: FlashHostPlan, tensors: Sequence[Tensor], is_padded: bool = False
    ) -> FlashDevicePlan:
        """tensors: `host.arrays`, copied. Enqueues what is new for the block tables."""
        assert self.tables is not None
        slots_T, *lists, places, blocks = tensors
        self.tables.tell(places, blocks)
        calls = []
        for call, of_call, is_causal in ((host.own, lists[:4], True), (host.foreign, lists[4:], False)):
            rows_T, first_rows_S, num_keys_S, table_rows_S = of_call
            if not len(num_keys_S):
                continue
            # The package's rule for splitting keys looks at the width, which a graph has fixed for all its steps.
            width = self.tables.tables_SB.shape[1] if is_padded else call.num_blocks
            pages_SB = self.tables.tables_SB[:, :width].index_select(0, table_rows_S)
            calls.append(
                DeviceCall(
                    rows_T if len(rows_T) else None, first_rows_S, num_keys_S, pages_SB, call.max_rows, is_causal
                )
            )
        return FlashDevicePlan(slots_T, tuple(calls))

    def padded(self, host: FlashHostPlan, room: FlashCapacity) -> FlashHostPlan:
        """The plan at a graph's lengths. Rows that belong to nobody are of sequences without a key: their output is 0.

        Raises ValueError when it does not fit: the step then runs without the graph.
        """
        own, num_tokens = host.own, len(host.slots_T)
        if len(host.foreign.num_keys_S) or len(own.num_keys_S) >= room.num_sequences or own.max_rows > room.max_rows:
            raise ValueError(f"{len(own.num_keys_S)} sequences of {own.max_rows} rows; room for {room}")
        if num_tokens > room.num_tokens:
            raise ValueError(f"{num_tokens} tokens; room for {room.num_tokens}")
        num_added = room.num_sequences - len(own.num_keys_S)
        ends = num_tokens + room.max_rows * np.arange(1, num_added + 1)
        first_rows = np.concatenate((own.first_rows_S, np.minimum(ends, room.num_tokens))).astype(np.int32)
        assert first_rows[-1] == room.num_tokens, "rows without a sequence"
        slots_T = np.full(room.num_tokens, -1, np.int64)
        slots_T[:num_tokens] = host.slots_T
        call = HostCall(
            own.rows_T,
            first_rows,
            np.concatenate((own.num_keys_S, np.zeros(num_added, np.int32))),
            np.concatenate((own.table_rows_S, np.zeros(num_added, np.int64))),
            room.max_rows,
            1,
        )
        return FlashHostPlan(slots_T, call, host.foreign, host.places, host.blocks)

    def empty_plan(self, room: FlashCapacity) -> FlashHostPlan:
        """A plan of nothing at a graph's lengths, to capture it with."""
        nothing, none = self._call([], False), np.empty(0, np.int64)
        return self.padded(FlashHostPlan(none, nothing, nothing, none, none.astype(np.int32)), room)

    def attend(
        self, plan: FlashDevicePlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: PagedKV, scale: float
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD."""
        return self._attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale)[0]

    def attend_with_lse(
        self, plan: FlashDevicePlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: PagedKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence; (out_THD, lse_TH fp32)."""
        return self._attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale)

    def attend_rotating(
        self,
        plan: FlashDevicePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: PagedKV,
        scale: float,
    ) -> Tensor:
        """`attend` with queries and keys still to be rotated, by (cos_TD, signed_sin_TD) fp32; returns out_THD."""
        return self._attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale, angles)[0]

    def _attend(
        self,
        plan: FlashDevicePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: PagedKV,
        scale: float,
        angles: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        q_TKGD = rotate_and_write(q_TKGD, k_TKD, v_TKD, *angles, layer, slots_T=plan.slots_T)
        return self.attend_written(plan, q_TKGD, layer, scale)

    def attend_written(
        self, plan: FlashDevicePlan, q_TKGD: Tensor, layer: PagedKV, scale: float, has_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Attention over what the pool holds, nothing written: (out_THD, lse_TH). The package always has the latter."""
        q_THD = q_TKGD.flatten(1, 2)
        parts = [self._call_package(call, q_THD, layer, scale) for call in plan.calls]
        if len(parts) == 1 and plan.calls[0].rows_T is None:
            return parts[0]
        out_THD = torch.empty_like(q_THD)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        for call, (out, lse) in zip(plan.calls, parts, strict=True):
            assert call.rows_T is not None
            out_THD.index_copy_(0, call.rows_T, out)
            lse_TH.index_copy_(0, call.rows_T, lse)
        return out_THD, lse_TH

    def _call_package(self, call: DeviceCall, q_THD: Tensor, layer: PagedKV, scale: float) -> tuple[Tensor, Tensor]:
        out_THD, lse_HT, *_ = self._flash_attention(
            q_THD if call.rows_T is None else q_THD.index_select(0, call.rows_T),
            layer.k_NKPD.transpose(1, 2),
            layer.v_NKPD.transpose(1, 2),
            cache_seqlens=call.num_keys_S,
            page_table=call.pages_SB,
            cu_seqlens_q=call.first_rows_S,
            max_seqlen_q=call.max_rows,
            softmax_scale=scale,
            causal=call.is_causal,
            num_splits=0,  # by the package's own rule, from lengths: a lone decode's keys are split over the whole GPU
            pack_gqa=self._packs_heads,
            return_softmax_lse=True,
        )
        # +inf where a row sees no key and the keys were not split.
        lse_TH = lse_HT.transpose(0, 1)
        return out_THD, lse_TH.masked_fill(lse_TH.isposinf(), -torch.inf)

    def _call(self, ranges: Sequence[QueryRange], is_mixed: bool) -> HostCall:
        """is_mixed: the batch has rows of another call, too."""
        assert self.tables is not None
        num_rows = np.array([r.num_rows for r in ranges], np.int64)
        num_keys = np.array([r.start + r.num_rows * r.is_written for r in ranges], np.int32)
        rows = [np.arange(r.first_row, r.first_row + r.num_rows) for r in ranges] if is_mixed else []
        return HostCall(
            np.concatenate(rows) if rows else np.empty(0, np.int64),
            np.concatenate(([0], np.cumsum(num_rows))).astype(np.int32),
            num_keys,
            np.array([self.tables.row_of(r.table) for r in ranges], np.int64),
            int(num_rows.max(initial=1)),
            max(1, -(-int(num_keys.max(initial=0)) // self._block_size)),
        )
