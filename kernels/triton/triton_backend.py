"""The Triton attention backend: a few launches per layer over lists made once per step.

Per layer: rotate and write (one launch, two for e4m3), attention of chunks (one), of single tokens (one), merging of
what was cut (up to two). Nothing here waits for the device. Checked in Triton's interpreter and compiled for sm_90;
not yet run on a GPU.

Shapes: T tokens, K key/value heads, G query heads per key/value head, H = K * G, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.attention.work_list import (
    ITEM_COLUMNS,
    MERGE_COLUMNS,
    NUM_WAVES_TRIED,
    RowRange,
    WorkList,
    note_runs,
    work_list,
)
from megatron_medha.kernels.kv.block_tables import BlockTables
from megatron_medha.kernels.kv.paged_kv import E4M3, PagedKV, allocate_paged
from megatron_medha.kernels.staging import Staging
from megatron_medha.kernels.triton.triton_attention import DeviceWork, TileConfig, paged_attention, split_group
from megatron_medha.kernels.triton.triton_merge import merge_tiles
from megatron_medha.kernels.triton.triton_tiles import DECODE_TILES, INTERPRETED_TILE, PREFILL_TILES, wide_tiles
from megatron_medha.kernels.triton.triton_widen import WidePool, WideSegment, is_wide, wide_segments
from megatron_medha.kernels.triton.triton_write import WRITE_COLUMNS, rotate_and_write

# Two programs, so that the interpreter's runs cut tiles into parts, too.
_INTERPRETED_PROGRAMS = 8


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a step needs on the device, still on the host, in a fixed order: see `arrays`."""

    slots_T: np.ndarray    # int64; -1 where nothing is written; empty for e4m3 pools
    pieces_W4: np.ndarray  # int32; empty for plain pools
    chunks: WorkList
    decodes: WorkList
    places: np.ndarray     # int64, and
    blocks: np.ndarray     # int32: what is new in the block tables
    wide: tuple[WideSegment, ...] = ()  # long chunks over e4m3 KV

    @property
    def arrays(self) -> list[np.ndarray]:
        """For staging; `TritonAttention.on_device` takes them back in this order."""
        return [
            self.slots_T, self.pieces_W4, self.chunks.items_NI, self.chunks.merges_MI, self.decodes.items_NI,
            self.decodes.merges_MI,
            *(x for segment in self.wide for x in (segment.work.items_NI, segment.work.merges_MI)),
            self.places, self.blocks,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """The fixed lengths of a plan's lists inside a CUDA graph."""

    num_tokens: int
    num_pieces: int
    num_chunk_tiles: int
    num_chunk_items: int
    num_decode_tiles: int
    num_decode_items: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The same on the device."""

    slots_T: Tensor
    pieces_W4: Tensor
    chunks: DeviceWork
    decodes: DeviceWork
    tables_SB: Tensor
    wide: tuple[WideSegment, ...] = ()
    is_padded: bool = False  # some rows belong to nobody: their output is 0, not whatever memory held


class SplitHeads(NamedTuple):
    """Heads that programs are made for, and the query heads of each."""

    num_heads: int
    group: int


class TritonAttention(AttentionBackend):
    """Attention backend `triton`. One object serves all layers of a rank."""

    name = "triton"
    block_size = 128  # at least one inner step of the kernel; half of it is what a request wastes on average
    rotates = stores_fp8 = has_padded_plans = masks_windows = adds_sinks = caps_scores = True
    has_fixed_splits = stores_latents_once = True

    @classmethod
    def made(cls, name: str, device: torch.device, group: int) -> Self:
        """See AttentionBackend."""
        return cls(device, group=group)

    def __init__(
        self,
        device: torch.device,
        *,
        group: int,
        prefill_tile: TileConfig | None = None,
        decode_tile: TileConfig | None = None,
    ) -> None:
        """group: query heads per key/value head of this rank. On a CPU Triton's interpreter must be in use.

        Tiles that are not given are chosen by the head dim.
        """
        is_cuda = device.type == "cuda"
        self.device = device
        self._group = group
        self._prefill_tile = prefill_tile or (PREFILL_TILES[0] if is_cuda else INTERPRETED_TILE)
        self._decode_tile = decode_tile or (DECODE_TILES[0] if is_cuda else INTERPRETED_TILE)
        self._are_tiles_given = prefill_tile is not None or decode_tile is not None
        self._num_sms = (
            torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else _INTERPRETED_PROGRAMS
        )
        self._staging = Staging(device)
        self._num_kv_heads = 0
        self._is_quantised = False
        self.tables: BlockTables | None = None
        self._wide: WidePool | None = None

    def use_tiles(self, *, prefill_tile: TileConfig | None = None, decode_tile: TileConfig | None = None) -> None:
        """Other tiles from the next plan on; plans and graphs made before are void."""
        self._are_tiles_given = True
        self._prefill_tile = prefill_tile or self._prefill_tile
        self._decode_tile = decode_tile or self._decode_tile

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        are_values_keys: bool = False,
    ) -> PagedKV:
        """Uninitialised KV of one layer. Raises ValueError for blocks and heads the kernels have no tiles for.

        are_values_keys: of latent vectors, which are there once.
        """
        if self.tables is None:
            self.tables = BlockTables(num_blocks, block_size, self.device)
            self._block_size, self._num_pool_tokens = block_size, num_blocks * block_size
        self._num_kv_heads, self._is_quantised = num_kv_heads, dtype == E4M3
        if not self._are_tiles_given and self.device.type == "cuda":
            tiles = wide_tiles(head_dim, self._group, is_quantised=self._is_quantised)
            self._prefill_tile, self._decode_tile = tiles or (self._prefill_tile, self._decode_tile)
        layer = allocate_paged(
            num_blocks, block_size, num_kv_heads, head_dim, dtype, self.device, are_values_keys=are_values_keys
        )
        # A program widens a power of two; tiles that share a group of query heads are left out, as no model needs them.
        self._fits_wide = not head_dim & (head_dim - 1) and self._heads(self._prefill_tile).group == self._group
        if self._widens and self.device.type == "cuda":
            self._wide_pool(layer, torch.bfloat16)  # at once, as memory is counted when all KV is there
        return layer

    @property
    def tiles(self) -> str:
        """See AttentionBackend."""
        return f"{self._prefill_tile.name},{self._decode_tile.name}"

    @property
    def is_quantised(self) -> bool:
        """Whether KV is stored in e4m3."""
        return self._is_quantised

    def room(self, num_tokens: int, num_sequences: int, *, has_chunks: bool) -> PlanCapacity:
        """Lists long enough for nearly every step of that many tokens and sequences."""
        def items(tile: TileConfig, num_tiles: int) -> int:
            if self.fixed_split_tokens is not None:  # as many parts as the pool has, shared prefixes counted once
                return num_tiles + self._num_pool_tokens // self.fixed_split_tokens
            return num_tiles + NUM_WAVES_TRIED * self._num_sms * tile.programs_per_sm // self._heads(tile).num_heads

        per_tile = self._prefill_tile.tokens_per_tile(self._heads(self._prefill_tile).group)
        num_tiles = -(-num_tokens // per_tile) + num_sequences
        return PlanCapacity(
            num_tokens=num_tokens,
            num_pieces=min(num_tokens, num_tokens // self._block_size + 2 * num_sequences),
            num_chunk_tiles=num_tiles if has_chunks else 0,
            num_chunk_items=items(self._prefill_tile, num_tiles) if has_chunks else 0,
            num_decode_tiles=num_sequences,
            num_decode_items=items(self._decode_tile, num_sequences),
        )

    def plan(self, ranges: Sequence[QueryRange]) -> DevicePlan:
        """Lists for all layers of one step, on their way to the device in one copy."""
        host = self.host_plan(ranges)
        return self.on_device(host, self._staging.upload(host.arrays))

    def host_plan(self, ranges: Sequence[QueryRange]) -> HostPlan:
        """The lists of one step. Afterwards the device's block tables are taken to know what `places` names."""
        assert self.tables is not None, "a plan before any KV"
        places, blocks = self.tables.news(r.table for r in ranges)
        chunks, decodes = [], []
        wide: list[WideSegment] = []
        runs: dict[int, np.ndarray] = {}
        for found in ranges:
            first_row, num_rows, start, table, is_written, *_ = found
            # Rows of another rank's shard see all that lies in this one, whatever their own order.
            last_key = start if is_written else start - 1
            row = self.tables.row_of(table)
            rows = RowRange(first_row, num_rows, last_key, int(is_written), row, found.lowest_key)
            if self._widens and is_written and found.lowest_key is None and is_wide(num_rows, start):
                wide += wide_segments(rows, start, self._block_size, partial(self._cut, tile=self._prefill_tile))
            else:
                (decodes if num_rows == 1 else chunks).append(rows)
                if num_rows > 1 and self._prefill_tile.reads_runs:
                    runs[row] = table.runs_in_order()
        slots_T, pieces_W4 = self._writes(ranges)
        chunk_work = self._cut(chunks, self._prefill_tile)
        note_runs(chunk_work, runs, self._block_size)
        return HostPlan(
            slots_T=slots_T,
            pieces_W4=pieces_W4,
            chunks=chunk_work,
            decodes=self._cut(decodes, self._decode_tile),
            places=places,
            blocks=blocks,
            wide=tuple(wide),
        )

    def on_device(self, host: HostPlan, tensors: Sequence[Tensor], is_padded: bool = False) -> DevicePlan:
        """tensors: `host.arrays`, copied. Enqueues what is new for the block tables."""
        assert self.tables is not None
        slots_T, pieces_W4, chunk_items, chunk_merges, decode_items, decode_merges, *wide, places, blocks = tensors
        self.tables.tell(places, blocks)
        return DevicePlan(
            slots_T=slots_T,
            pieces_W4=pieces_W4,
            chunks=DeviceWork(chunk_items, chunk_merges, host.chunks.num_parts, host.chunks.is_windowed),
            decodes=DeviceWork(decode_items, decode_merges, host.decodes.num_parts, host.decodes.is_windowed),
            tables_SB=self.tables.tables_SB,
            wide=tuple(
                replace(segment, work=DeviceWork(items, merges, segment.work.num_parts))
                for segment, items, merges in zip(host.wide, wide[::2], wide[1::2], strict=True)
            ),
            is_padded=is_padded,
        )

    def padded(self, host: HostPlan, room: PlanCapacity) -> HostPlan:
        """See the function."""
        return padded(host, room, self._is_quantised)

    def empty_plan(self, room: PlanCapacity) -> HostPlan:
        """A plan of nothing at a graph's lengths, to capture it with."""
        nothing = work_list([], tokens_per_tile=1, block_n=1, num_kv_heads=1, num_programs=1)
        no_write = np.empty((0, WRITE_COLUMNS), np.int32)
        none = np.empty(0, np.int64)
        return self.padded(HostPlan(none, no_write, nothing, nothing, none, none.astype(np.int32)), room)

    def attend(
        self,
        plan: DevicePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: PagedKV,
        scale: float,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the batch's own keys and values to the pool, then attend; returns out_THD."""
        sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        return self._attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale, sinks_H=sinks_H)[0]

    def attend_with_lse(
        self, plan: DevicePlan, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: PagedKV, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` over one shard of each sequence; (out_THD, lse_TH fp32)."""
        out_THD, lse_TH = self._attend(plan, q_TKGD, k_TKD, v_TKD, layer, scale, has_lse=True)
        assert lse_TH is not None
        return out_THD, lse_TH

    def attend_rotating(
        self,
        plan: DevicePlan,
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
        plan: DevicePlan,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        layer: PagedKV,
        scale: float,
        angles: tuple[Tensor | None, Tensor | None] = (None, None),
        has_lse: bool = False,
        sinks_H: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        slots_T, pieces_W4 = (None, plan.pieces_W4) if self._is_quantised else (plan.slots_T, None)
        # Latent vectors, of which the value is a part: neither written nor read twice.
        are_values_keys = v_TKD.data_ptr() == k_TKD.data_ptr() and v_TKD.stride() == k_TKD.stride()
        assert are_values_keys or layer.v_NKPD is not layer.k_NKPD, "a pool of latent vectors has no other values"
        q_TKGD = rotate_and_write(
            q_TKGD, k_TKD, v_TKD, *angles, layer, slots_T=slots_T, pieces_W4=pieces_W4,
            writes_values=not are_values_keys,
        )  # fmt: skip
        return self.attend_written(
            plan, q_TKGD, layer, scale, has_lse, sinks_H=sinks_H, are_values_keys=are_values_keys
        )

    def attend_written(
        self,
        plan: DevicePlan,
        q_TKGD: Tensor,
        layer: PagedKV,
        scale: float,
        has_lse: bool,
        *,
        sinks_H: Tensor | None = None,
        are_values_keys: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what the pool holds, nothing written: (out_THD, lse_TH or None)."""
        out_TKGD = torch.zeros_like(q_TKGD) if plan.is_padded else torch.empty_like(q_TKGD)
        lse_TKG = torch.empty(q_TKGD.shape[:3], dtype=torch.float32, device=q_TKGD.device) if has_lse else None
        num_tokens, _, _, head_dim = q_TKGD.shape
        for work, tile in ((plan.chunks, self._prefill_tile), (plan.decodes, self._decode_tile)):
            heads = self._heads(tile)
            q, out = (x.view(num_tokens, *heads, head_dim) for x in (q_TKGD, out_TKGD))
            lse = None if lse_TKG is None else lse_TKG.view(num_tokens, *heads)
            parts = paged_attention(
                q, layer, plan.tables_SB, work, config=tile, scale=scale, out_TKGD=out, lse_TKG=lse,
                score_cap=self.score_cap, sinks_H=sinks_H, are_values_keys=are_values_keys,
            )  # fmt: skip
            if parts is not None:
                merge_tiles(parts, work.merges_MI, out, lse)
        if plan.wide:
            self._wide_pool(layer, q_TKGD.dtype).attend(
                plan.wide, q_TKGD, layer, plan.tables_SB, tile=self._prefill_tile, scale=scale, out_TKGD=out_TKGD,
                lse_TKG=lse_TKG, score_cap=self.score_cap, sinks_H=sinks_H, are_values_keys=are_values_keys,
            )  # fmt: skip
        return out_TKGD.flatten(1, 2), None if lse_TKG is None else lse_TKG.flatten(1, 2)

    @property
    def _widens(self) -> bool:
        """Whether long chunks over e4m3 are computed over what is widened; parts at fixed positions are not."""
        return self._is_quantised and self._fits_wide and self.fixed_split_tokens is None

    def _heads(self, tile: TileConfig) -> SplitHeads:
        """As the tile's programs see them: a group that has more rows than the tile is cut among several."""
        splits = split_group(self._group, tile.block_m)
        return SplitHeads(self._num_kv_heads * splits, self._group // splits)

    def _wide_pool(self, layer: PagedKV, dtype: torch.dtype) -> WidePool:
        if self._wide is None or self._wide.layer.k_NKPD.dtype != dtype:
            self._wide = WidePool(layer, dtype)
        return self._wide

    def _cut(self, ranges: Sequence[RowRange], tile: TileConfig) -> WorkList:
        return work_list(
            ranges,
            tokens_per_tile=tile.tokens_per_tile(self._heads(tile).group),
            block_n=min(tile.block_n, self._block_size),
            num_kv_heads=self._heads(tile).num_heads,
            num_programs=self._num_sms * tile.programs_per_sm,
            partition_keys=self.fixed_split_tokens,
        )

    def _writes(self, ranges: Sequence[QueryRange]) -> tuple[np.ndarray, np.ndarray]:
        """Slots of all rows, or pieces of blocks; whichever the pool is written by."""
        if not self._is_quantised:
            slots = [
                r.table.slots(r.start, r.num_rows) if r.is_written else np.full(r.num_rows, -1, np.int64)
                for r in ranges
            ]
            return np.concatenate(slots), np.empty((0, WRITE_COLUMNS), np.int32)
        pieces = [block_pieces(r, self._block_size) for r in ranges if r.is_written]
        empty = np.empty((0, WRITE_COLUMNS), np.int32)
        return np.empty(0, np.int64), np.concatenate(pieces) if pieces else empty


def block_pieces(rows: QueryRange, block_size: int) -> np.ndarray:
    """int32 [W, WRITE_COLUMNS]: the parts of blocks that these rows fill, in order."""
    end = rows.start + rows.num_rows
    first_block = rows.start // block_size
    begin = np.maximum(np.arange(first_block, -(-end // block_size), dtype=np.int64) * block_size, rows.start)
    blocks = rows.table.slots(rows.start, rows.num_rows)[begin - rows.start] // block_size
    counts = np.minimum((begin // block_size + 1) * block_size, end) - begin
    return np.stack((blocks, begin % block_size, counts, rows.first_row + begin - rows.start), axis=1).astype(np.int32)


def padded(host: HostPlan, room: PlanCapacity, is_quantised: bool) -> HostPlan:
    """The plan at a graph's lengths; items, merges and pieces of 0 rows do nothing, slots of -1 neither.

    Raises ValueError when it does not fit: the step then runs without the graph.
    """
    slots_T = np.full(0 if is_quantised else room.num_tokens, -1, np.int64)
    pieces_W4 = np.zeros((room.num_pieces if is_quantised else 0, WRITE_COLUMNS), np.int32)
    for name, target, source in (("slots", slots_T, host.slots_T), ("pieces", pieces_W4, host.pieces_W4)):
        if len(source) > len(target):
            raise ValueError(f"{len(source)} {name}; room for {len(target)}")
        target[: len(source)] = source
    return HostPlan(
        slots_T=slots_T,
        pieces_W4=pieces_W4,
        chunks=_padded_work(host.chunks, room.num_chunk_items, room.num_chunk_tiles),
        decodes=_padded_work(host.decodes, room.num_decode_items, room.num_decode_tiles),
        places=host.places,
        blocks=host.blocks,
    )


def with_window(host: HostPlan) -> HostPlan:
    """A padded plan for layers with a window, whatever is in it: they have a kernel of their own."""
    return replace(
        host, chunks=replace(host.chunks, is_windowed=True), decodes=replace(host.decodes, is_windowed=True)
    )


def _padded_work(work: WorkList, num_items: int, num_merges: int) -> WorkList:
    if len(work.items_NI) > num_items or len(work.merges_MI) > num_merges or work.num_parts > num_items:
        raise ValueError(
            f"{len(work.items_NI)} items, {len(work.merges_MI)} merges; room for {num_items} and {num_merges}"
        )
    items = np.zeros((num_items, ITEM_COLUMNS), np.int32)
    merges = np.zeros((num_merges, MERGE_COLUMNS), np.int32)
    items[: len(work.items_NI)] = work.items_NI
    merges[: len(work.merges_MI)] = work.merges_MI
    return WorkList(items, merges, num_items, work.makespan_blocks, work.is_windowed)
