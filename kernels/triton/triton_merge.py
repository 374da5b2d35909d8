"""Merging the parts of tiles whose keys were cut, by log-sum-exp, in Triton.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, D head dim, R rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medha.kernels.attention.work_list import MERGE_COLUMNS

# Parts one program reads at once; a lone decode is cut into about 30 per key/value head.
_PARTS_AT_ONCE = 32
_NUMBERS_AT_ONCE = 8192  # 64 registers a thread


@triton.jit
def merge_kernel(
    part_out, part_lse, merges, out, lse, num_kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program (merge, key/value head, row): so many that a lone decode uses more than a few multiprocessors.

    DIM: the head dim; WIDTH: a power of two that holds it.
    Online softmax over blocks of PARTS parts, arXiv:1805.02867; all of a block's loads are under way together.
    """
    merge = merges + tl.program_id(0) * 4  # MERGE_COLUMNS
    head = tl.program_id(1)
    row = tl.program_id(2)
    first_row, num_rows = tl.load(merge), tl.load(merge + 1)
    if row // GROUP >= num_rows:
        return
    first_part, num_parts = tl.load(merge + 2).to(tl.int64), tl.load(merge + 3)
    dim_D = tl.arange(0, WIDTH)
    is_real_D = dim_D < DIM
    part_P = tl.arange(0, PARTS)

    running_max = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc_D = tl.zeros([WIDTH], tl.float32)
    for first in range(0, num_parts, PARTS):
        is_real_P = first + part_P < num_parts
        at_P = ((first_part + first + part_P) * num_kv_heads + head) * BLOCK_M + row
        lse_P = tl.load(part_lse + at_P, mask=is_real_P, other=-float("inf"))
        is_real_PD = is_real_P[:, None] & is_real_D[None, :]
        out_PD = tl.load(part_out + at_P[:, None] * DIM + dim_D[None, :], mask=is_real_PD, other=0.0)
        new_max = tl.maximum(running_max, tl.max(lse_P, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        kept = tl.exp(running_max - shift)
        weight_P = tl.exp(lse_P - shift)
        acc_D = acc_D * kept + tl.sum(out_PD * weight_P[:, None], 0)
        total = total * kept + tl.sum(weight_P, 0)
        running_max = new_max

    is_empty = total == 0.0
    whole = tl.where(is_empty, 1.0, total)
    row_in_out = ((first_row + row // GROUP).to(tl.int64) * num_kv_heads + head) * GROUP + row % GROUP
    tl.store(out + row_in_out * DIM + dim_D, (acc_D / whole).to(out.dtype.element_ty), mask=is_real_D)
    if HAS_LSE:
        tl.store(lse + row_in_out, tl.where(is_empty, -float("inf"), running_max + tl.log(whole)))


def merge_tiles(
    parts: tuple[Tensor, Tensor], merges_MI: Tensor, out_TKGD: Tensor, lse_TKG: Tensor | None
) -> None:
    """Put the parts of every merge together, into the rows of out (and lse) that it names.

    parts: fp32 (out [parts, K, R, D], lse [parts, K, R]), natural log, -inf where a part is empty; as
    `paged_attention` returns them. merges_MI: int32 [M, MERGE_COLUMNS]. Raises ValueError if they do not fit.
    """
    part_out, part_lse = parts
    num_kv_heads, group, head_dim = out_TKGD.shape[1:]
    block_m = part_out.shape[2]
    if part_out.shape[1:] != (num_kv_heads, block_m, head_dim) or part_lse.shape != part_out.shape[:3]:
        raise ValueError(f"parts {tuple(part_out.shape)}, {tuple(part_lse.shape)} do not fit {tuple(out_TKGD.shape)}")
    if part_out.dtype != torch.float32 or part_lse.dtype != torch.float32:
        raise ValueError(f"parts are {part_out.dtype} and {part_lse.dtype}, not float32")
    if merges_MI.dtype != torch.int32 or merges_MI.shape[1:] != (MERGE_COLUMNS,):
        raise ValueError(f"merges are {merges_MI.dtype} {tuple(merges_MI.shape)}, not int32 [M, {MERGE_COLUMNS}]")
    for tensor in (part_out, part_lse, merges_MI, out_TKGD, lse_TKG):
        if tensor is not None and (not tensor.is_contiguous() or tensor.device != out_TKGD.device):
            raise ValueError(f"a tensor of {tuple(tensor.shape)} is not contiguous on {out_TKGD.device}")
    if not merges_MI.shape[0]:
        return
    width = triton.next_power_of_2(head_dim)
    merge_kernel[(merges_MI.shape[0], num_kv_heads, block_m // group * group)](
        part_out, part_lse, merges_MI, out_TKGD, lse_TKG, num_kv_heads,
        GROUP=group, DIM=head_dim, WIDTH=width, BLOCK_M=block_m, PARTS=min(_PARTS_AT_ONCE, _NUMBERS_AT_ONCE // width),
        HAS_LSE=lse_TKG is not None, num_warps=4,
    )  # fmt: skip
