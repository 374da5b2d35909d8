"""Long chunks over e4m3 KV: what lies before them is widened once per layer, then read as bf16 by every tile.

The attention kernel converts each e4m3 key for every tile of rows that reads it. A chunk of 2,048 tokens has 128 tiles
(4 query heads per key/value head, tiles of 64 rows), so that converting costs more than the products. Here keys are
converted once, into a scratch pool of one segment of the sequence after the other; segments are merged by log-sum-exp.
Steps that fit a CUDA graph are shorter than what is widened.

Shapes: T tokens, K key/value heads, G query heads per key/value head, D head dim, N blocks, P tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medha.kernels.attention.merge import with_sinks
from megatron_medha.kernels.attention.work_list import RUN_COLUMN, RowRange, WorkList
from megatron_medha.kernels.kv.paged_kv import PagedKV
from megatron_medha.kernels.triton.triton_attention import DeviceWork, TileConfig, paged_attention
from megatron_medha.kernels.triton.triton_merge import merge_tiles

MIN_ROWS = 513        # of a chunk; CUDA graphs hold fewer
MAX_ROWS = 8192       # for which scratch has room beside a segment
MIN_CONTEXT = 4096    # tokens before it
SEGMENT_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class WideSegment:
    """A chunk over one segment of its sequence, whose blocks are [first_block, first_block + num_blocks) of its row."""

    first_row: int
    num_rows: int
    table_row: int
    first_block: int
    num_blocks: int
    work: WorkList | DeviceWork


def is_wide(num_rows: int, start: int) -> bool:
    """Whether a chunk of so many rows after so many tokens is worth it."""
    return MIN_ROWS <= num_rows <= MAX_ROWS and start >= MIN_CONTEXT


def wide_segments(
    rows: RowRange, start: int, block_size: int, cut: Callable[[Sequence[RowRange]], WorkList]
) -> list[WideSegment]:
    """The segments of one chunk, in order; the last one has its own tokens. rows: causal, as of the whole sequence."""
    size = max(SEGMENT_TOKENS // block_size, 1) * block_size
    begins = list(range(0, start, size))
    segments = []
    for begin, end in zip(begins, [*begins[1:], start + rows.num_rows], strict=True):
        is_last = begin == begins[-1]
        seen = RowRange(rows.first_row, rows.num_rows, start - begin if is_last else end - begin - 1, int(is_last), 0)
        num_blocks = -(-(end - begin) // block_size)
        work = cut([seen])
        work.items_NI[:, RUN_COLUMN] = 0  # blocks of the scratch pool follow one another from its first on
        segments.append(
            WideSegment(rows.first_row, rows.num_rows, rows.table, begin // block_size, num_blocks, work)
        )
    return segments


@triton.jit
def widen_kernel(
    k_pool, v_pool, k_scale, v_scale, table, k_out, v_out, num_kv_heads, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr
):
    """Program (block, key/value head): e4m3 times its scale, a power of two: nothing is rounded."""
    head = tl.program_id(1)
    from_at = tl.load(table + tl.program_id(0)).to(tl.int64) * num_kv_heads + head
    to_at = tl.program_id(0).to(tl.int64) * num_kv_heads + head
    place_PD = tl.arange(0, PAGE)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    from_PD, to_PD = from_at * PAGE * HEAD_DIM + place_PD, to_at * PAGE * HEAD_DIM + place_PD
    # By way of fp16, which Hopper converts e4m3 to eight times as fast as to bf16.
    k_PD = tl.load(k_pool + from_PD).to(tl.float16).to(tl.float32) * tl.load(k_scale + from_at)
    v_PD = tl.load(v_pool + from_PD).to(tl.float16).to(tl.float32) * tl.load(v_scale + from_at)
    tl.store(k_out + to_PD, k_PD.to(k_out.dtype.element_ty))
    tl.store(v_out + to_PD, v_PD.to(v_out.dtype.element_ty))


class WidePool:
    """Scratch for one segment of one sequence, of all layers in turn."""

    def __init__(self, layer: PagedKV, dtype: torch.dtype) -> None:
        """dtype: of queries, and of what is widened."""
        _, num_kv_heads, block_size, head_dim = layer.k_NKPD.shape
        num_blocks = -(-(SEGMENT_TOKENS + MAX_ROWS) // block_size) + 2
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        device = layer.k_NKPD.device
        self.layer = PagedKV(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        self.table_1B = torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0)

    @property
    def num_blocks(self) -> int:
        """That a segment may have."""
        return self.table_1B.shape[1]

    def attend(
        self,
        segments: Sequence[WideSegment],
        q_TKGD: Tensor,
        layer: PagedKV,
        tables_SB: Tensor,
        *,
        tile: TileConfig,
        scale: float,
        out_TKGD: Tensor,
        lse_TKG: Tensor | None,
        score_cap: float | None = None,
        sinks_H: Tensor | None = None,
        are_values_keys: bool = False,
    ) -> None:
        """Attention of the segments' rows, written to out and lse. Segments of a chunk follow one another.

        score_cap, sinks_H, are_values_keys: see paged_attention.
        """
        k_pool, k_scale = layer.k_NKPD, layer.k_scale_NK
        v_pool, v_scale = (k_pool, k_scale) if are_values_keys else (layer.v_NKPD, layer.v_scale_NK)
        _, num_kv_heads, block_size, head_dim = layer.k_NKPD.shape
        for index, segment in enumerate(segments):
            assert isinstance(segment.work, DeviceWork) and segment.num_blocks <= self.num_blocks
            table = tables_SB[segment.table_row, segment.first_block :]
            widen_kernel[(segment.num_blocks, num_kv_heads)](
                k_pool, v_pool, k_scale, v_scale, table, self.layer.k_NKPD, self.layer.v_NKPD, num_kv_heads,
                HEAD_DIM=head_dim, PAGE=block_size, num_warps=8,
            )  # fmt: skip
            part = torch.empty(q_TKGD.shape, dtype=torch.float32, device=q_TKGD.device)
            part_lse = torch.empty(q_TKGD.shape[:3], dtype=torch.float32, device=q_TKGD.device)
            cut = paged_attention(
                q_TKGD, self.layer, self.table_1B, segment.work, config=tile, scale=scale, out_TKGD=part,
                lse_TKG=part_lse, score_cap=score_cap,
            )  # fmt: skip
            if cut is not None:
                merge_tiles(cut, segment.work.merges_MI, part, part_lse)
            rows = slice(segment.first_row, segment.first_row + segment.num_rows)
            if segment.first_block == 0:
                total, total_lse = part[rows], part_lse[rows]
            else:  # every row sees a key of each segment, so that no log-sum-exp is -inf
                total = torch.lerp(total, part[rows], torch.sigmoid(part_lse[rows] - total_lse).unsqueeze(-1))
                total_lse = torch.logaddexp(total_lse, part_lse[rows])
            if index + 1 == len(segments) or segments[index + 1].first_block == 0:
                if sinks_H is not None:
                    total, total_lse = with_sinks(total, total_lse, sinks_H.view(q_TKGD.shape[1:3]))
                out_TKGD[rows] = total.to(out_TKGD.dtype)
                if lse_TKG is not None:
                    lse_TKG[rows] = total_lse
