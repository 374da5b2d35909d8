"""Merging the parts of tiles whose keys were cut, by log-sum-exp, in Triton.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, D head dim, R rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medha.kernels.attention.work_list import MERGE_COLUMNS

# Rows one program merges: small, because a chunk of 64 tokens has only 16 tiles of 128 rows for 132 multiprocessors.
_ROWS_PER_PROGRAM = 16


@triton.jit
def merge_kernel(
    part_out, part_lse, merges, out, lse, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program (merge, key/value head, block of rows). Online softmax over the parts, arXiv:1805.02867."""
    merge = merges + tl.program_id(0) * 4  # MERGE_COLUMNS
    head = tl.program_id(1)
    first_row, num_rows = tl.load(merge), tl.load(merge + 1)
    first_part, num_parts = tl.load(merge + 2).to(tl.int64), tl.load(merge + 3)
    row_R = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    token_R = row_R // GROUP
    is_real_R = token_R < num_rows
    if tl.program_id(2) * ROWS // GROUP >= num_rows:
        return
    dim_D = tl.arange(0, HEAD_DIM)

    max_R = tl.full([ROWS], -float("inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(num_parts):
        part_row_R = ((first_part + index) * num_kv_heads + head) * BLOCK_M + row_R
        lse_R = tl.load(part_lse + part_row_R, mask=is_real_R, other=-float("inf"))
        out_RD = tl.load(
            part_out + part_row_R[:, None] * HEAD_DIM + dim_D[None, :], mask=is_real_R[:, None], other=0.0
        )
        new_max_R = tl.maximum(max_R, lse_R)
        shift_R = tl.where(new_max_R == -float("inf"), 0.0, new_max_R)
        kept_R = tl.exp(max_R - shift_R)
        weight_R = tl.exp(lse_R - shift_R)
        acc_RD = acc_RD * kept_R[:, None] + out_RD * weight_R[:, None]
        sum_R = sum_R * kept_R + weight_R
        max_R = new_max_R

    is_empty_R = sum_R == 0.0
    whole_R = tl.where(is_empty_R, 1.0, sum_R)
    row_in_out_R = ((first_row + token_R).to(tl.int64) * num_kv_heads + head) * GROUP + row_R % GROUP
    merged_RD = (acc_RD / whole_R[:, None]).to(out.dtype.element_ty)
    tl.store(out + row_in_out_R[:, None] * HEAD_DIM + dim_D[None, :], merged_RD, mask=is_real_R[:, None])
    if HAS_LSE:
        tl.store(lse + row_in_out_R, tl.where(is_empty_R, -float("inf"), max_R + tl.log(whole_R)), mask=is_real_R)


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
    rows = min(_ROWS_PER_PROGRAM, block_m)
    merge_kernel[(merges_MI.shape[0], num_kv_heads, block_m // rows)](
        part_out, part_lse, merges_MI, out_TKGD, lse_TKG, num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_M=block_m, ROWS=rows, HAS_LSE=lse_TKG is not None, num_warps=4,
    )  # fmt: skip
