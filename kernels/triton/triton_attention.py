"""The paged attention kernel in Triton, and its launch: one kernel for prefill chunks and decodes, with log-sum-exp.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, D head dim, N blocks of the pool, P tokens
per block, I items, R rows of a tile (BLOCK_M). A tile's rows are tokens times G: row m is query head m % G of token
m // G, so that one read of the keys serves the whole group. Keys every row of the tile sees are run through without a
mask; only the last blocks of a tile are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_medha.kernels.attention.work_list import ITEM_COLUMNS, WorkList
from megatron_medha.kernels.kv.paged_kv import PagedKV

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How the kernel is compiled; which one is fastest is measured (kernels/triton/triton_tiles.py holds the table)."""

    block_m: int     # rows of a tile
    block_n: int     # keys per inner step; never more than a block of the pool
    num_warps: int
    num_stages: int
    has_tma: bool = False  # keys and values by the tensor memory accelerator (Hopper and later), not by cp.async
    max_registers: int | None = None  # of a thread; where the compiler would spill to fit one program more
    programs_per_sm: int = 1  # that run at once, for cutting the work; measured occupancy, not a wish

    def tokens_per_tile(self, group: int) -> int:
        """Tokens whose query groups fit into a tile."""
        return self.block_m // group


@triton.jit
def _blend(
    acc_RD, sum_R, max_R, unit, q_RD, keys, values, k_scale, v_scale, table, n, last_key_R, head, num_kv_heads,
    scale_log2, IS_MASKED: tl.constexpr, IS_QUANTISED: tl.constexpr, HAS_TMA: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """One block of keys and values into the running softmax. n: its first key, a multiple of BLOCK_N.

    unit: what acc_RD is a multiple of: of e4m3 blocks the largest scale so far, else 1.
    """
    HEAD_DIM: tl.constexpr = q_RD.shape[1]
    block = tl.load(table + n // PAGE).to(tl.int64)
    first_slot = (block * num_kv_heads + head) * PAGE + n % PAGE
    if HAS_TMA:
        k_ND = keys.load([first_slot.to(tl.int32), 0])
        v_ND = values.load([first_slot.to(tl.int32), 0])
    else:
        at_ND = first_slot * HEAD_DIM + tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        k_ND = tl.load(keys + at_ND)
        v_ND = tl.load(values + at_ND)
    if IS_QUANTISED:
        scale_log2 *= tl.load(k_scale + block * num_kv_heads + head)
    scores_RN = tl.dot(q_RD, tl.trans(k_ND.to(q_RD.dtype)), input_precision="ieee") * scale_log2
    if IS_MASKED:
        key_N = n + tl.arange(0, BLOCK_N)
        scores_RN = tl.where(key_N[None, :] > last_key_R[:, None], -float("inf"), scores_RN)
        # A slot nobody wrote, or a broken request once did, may hold NaN, and 0 * NaN would spoil the sum.
        is_seen_N1 = (key_N <= tl.max(last_key_R, 0))[:, None]
        v_ND = tl.where(is_seen_N1, v_ND.to(q_RD.dtype), 0.0)
    new_max_R = tl.maximum(max_R, tl.max(scores_RN, 1))
    shift_R = new_max_R
    if IS_MASKED:
        shift_R = tl.where(new_max_R == -float("inf"), 0.0, new_max_R)
    weights_RN = tl.math.exp2(scores_RN - shift_R[:, None])
    kept_R = tl.math.exp2(max_R - shift_R)
    sum_R = sum_R * kept_R + tl.sum(weights_RN, 1)
    if IS_QUANTISED:
        # Weights go through fp16, whose least numbers a weight times a scale would soon be below. Scales are powers of
        # two, so nothing is rounded here.
        scale = tl.load(v_scale + block * num_kv_heads + head)
        new_unit = tl.maximum(unit, scale)
        weights_RN *= scale / new_unit
        kept_R *= unit / new_unit
        unit = new_unit
    acc_RD = tl.dot(
        weights_RN.to(q_RD.dtype), v_ND.to(q_RD.dtype), acc_RD * kept_R[:, None], input_precision="ieee"
    )
    return acc_RD, sum_R, new_max_R, unit


@triton.jit(do_not_specialize=["table_width"])  # the pool's size, of which no variant is to be compiled
def attention_kernel(
    q, keys, values, k_scale, v_scale, out, lse, part_out, part_lse, block_tables, items,
    table_width, num_kv_heads, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr, IS_QUANTISED: tl.constexpr, HAS_TMA: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program (item, key/value head): a tile over a range of its keys, into out or into a part."""
    item = items + tl.program_id(0) * 8  # ITEM_COLUMNS
    head = tl.program_id(1)
    first_row, num_rows = tl.load(item), tl.load(item + 1)
    if num_rows == 0:  # fills up a list whose length a CUDA graph has fixed
        return
    first_last_key, step = tl.load(item + 2), tl.load(item + 3)
    key_begin, key_end = tl.load(item + 4), tl.load(item + 5)
    table = block_tables + tl.load(item + 6).to(tl.int64) * table_width
    part = tl.load(item + 7)

    row_R = tl.arange(0, BLOCK_M)
    token_R = row_R // GROUP
    is_real_R = token_R < num_rows
    last_key_R = first_last_key + token_R * step
    dim_D = tl.arange(0, HEAD_DIM)
    q_row_R = ((first_row + token_R).to(tl.int64) * num_kv_heads + head) * GROUP + row_R % GROUP
    q_RD = tl.load(q + q_row_R[:, None] * HEAD_DIM + dim_D[None, :], mask=is_real_R[:, None], other=0.0)

    max_R = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_M], tl.float32)
    acc_RD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    unit = tl.full([], 1.1754944e-38 if IS_QUANTISED else 1.0, tl.float32)
    if IS_QUANTISED and q_RD.dtype == tl.bfloat16:
        # e4m3 is exact in both, but Hopper converts to bf16 at an eighth of the rate (F2F: 16 a clock, not 128).
        q_RD = q_RD.to(tl.float16)
    # Up to here every row sees every key: the first row sees the fewest.
    seen_by_all = tl.minimum(key_end, (first_last_key + 1) // BLOCK_N * BLOCK_N)
    for n in tl.range(key_begin, seen_by_all, BLOCK_N, num_stages=NUM_STAGES):
        acc_RD, sum_R, max_R, unit = _blend(
            acc_RD, sum_R, max_R, unit, q_RD, keys, values, k_scale, v_scale, table, n, last_key_R, head,
            num_kv_heads, scale_log2, False, IS_QUANTISED, HAS_TMA, BLOCK_N, PAGE,
        )  # fmt: skip
    # Pool and tables are whole blocks, so the last one may be read past key_end; the mask hides what lies there.
    last_key_R = tl.minimum(last_key_R, key_end - 1)
    for n in tl.range(tl.maximum(key_begin, seen_by_all), key_end, BLOCK_N, num_stages=1):
        acc_RD, sum_R, max_R, unit = _blend(
            acc_RD, sum_R, max_R, unit, q_RD, keys, values, k_scale, v_scale, table, n, last_key_R, head,
            num_kv_heads, scale_log2, True, IS_QUANTISED, HAS_TMA, BLOCK_N, PAGE,
        )  # fmt: skip

    is_empty_R = sum_R == 0.0
    if IS_QUANTISED:
        acc_RD *= unit
    out_RD = tl.where(is_empty_R[:, None], 0.0, acc_RD / tl.where(is_empty_R, 1.0, sum_R)[:, None])
    # ln 2: the running softmax is kept in powers of two, as the hardware has exp2 only.
    lse_R = tl.where(is_empty_R, -float("inf"), max_R * 0.6931471805599453 + tl.log(tl.where(is_empty_R, 1.0, sum_R)))
    if part < 0:
        at_RD = q_row_R[:, None] * HEAD_DIM + dim_D[None, :]
        tl.store(out + at_RD, out_RD.to(out.dtype.element_ty), mask=is_real_R[:, None])
        if HAS_LSE:
            tl.store(lse + q_row_R, lse_R, mask=is_real_R)
    else:
        part_row_R = (part.to(tl.int64) * num_kv_heads + head) * BLOCK_M + row_R
        tl.store(part_out + part_row_R[:, None] * HEAD_DIM + dim_D[None, :], out_RD, mask=is_real_R[:, None])
        tl.store(part_lse + part_row_R, lse_R, mask=is_real_R)


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A work list on the device. num_parts is what the partial buffers must hold, also under padding."""

    items_NI: Tensor   # int32
    merges_MI: Tensor  # int32
    num_parts: int

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> DeviceWork:
        """Copied as it is; the serving path stages all lists of a step in one copy instead."""
        return cls(
            torch.from_numpy(work.items_NI).to(device), torch.from_numpy(work.merges_MI).to(device), work.num_parts
        )


def paged_attention(
    q_TKGD: Tensor,
    kv: PagedKV,
    block_tables_SB: Tensor,
    work: DeviceWork,
    *,
    config: TileConfig,
    scale: float,
    out_TKGD: Tensor,
    lse_TKG: Tensor | None,
    parts: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attention of the rows named in `work`, written to out (and lse); rows it does not name are left alone.

    q_TKGD:   bf16, fp16 or fp32, contiguous. kv: the pool of one layer, same dtype or e4m3.
    block_tables_SB: int32, contiguous; row s holds the blocks of the sequence that items call s.
    lse_TKG:  fp32, or None where nobody asks.
    parts:    fp32 buffers (out [parts, K, BLOCK_M, D], lse [parts, K, BLOCK_M]) to use; made here when None.
    Returns the parts of tiles that were cut, which `merge_parts` of triton_merge.py must put together, or
    None when there are none. Raises ValueError for devices, dtypes, shapes or strides it cannot take.
    """
    _check(q_TKGD, kv, block_tables_SB, work, config, out_TKGD, lse_TKG)
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    if work.num_parts and parts is None:
        shape = (work.num_parts, num_kv_heads, config.block_m)
        parts = (
            q_TKGD.new_empty((*shape, head_dim), dtype=torch.float32), q_TKGD.new_empty(shape, dtype=torch.float32)
        )  # fmt: skip
    num_items = work.items_NI.shape[0]
    if not num_items or not num_tokens:
        return None
    block_n = min(config.block_n, kv.block_size)
    keys: Any = kv.k_NKPD
    values: Any = kv.v_NKPD
    if config.has_tma:
        keys, values = (TensorDescriptor.from_tensor(x.view(-1, head_dim), [block_n, head_dim]) for x in (keys, values))
    is_quantised = kv.k_scale_NK is not None
    attention_kernel[(num_items, num_kv_heads)](
        q_TKGD, keys, values, kv.k_scale_NK, kv.v_scale_NK, out_TKGD, lse_TKG, *(parts or _no_parts(q_TKGD.device)),
        block_tables_SB, work.items_NI,
        block_tables_SB.shape[1], num_kv_heads, scale * 1.4426950408889634,  # log2(e)
        GROUP=group, HEAD_DIM=head_dim, PAGE=kv.block_size, BLOCK_M=config.block_m, BLOCK_N=block_n,
        NUM_STAGES=config.num_stages, IS_QUANTISED=is_quantised, HAS_TMA=config.has_tma,
        HAS_LSE=lse_TKG is not None, num_warps=config.num_warps, maxnreg=config.max_registers,
    )  # fmt: skip
    return parts if work.num_parts else None


@cache
def _no_parts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Stand in for buffers that no item writes to: None would be another kernel, compiled in the middle of serving."""
    return torch.empty(0, dtype=torch.float32, device=device), torch.empty(0, dtype=torch.float32, device=device)


def _check(
    q_TKGD: Tensor,
    kv: PagedKV,
    block_tables_SB: Tensor,
    work: DeviceWork,
    config: TileConfig,
    out_TKGD: Tensor,
    lse_TKG: Tensor | None,
) -> None:
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    if q_TKGD.dtype not in QUERY_DTYPES:
        raise ValueError(f"queries are {q_TKGD.dtype}; known: {', '.join(map(str, QUERY_DTYPES))}")
    kv.check(q_TKGD.dtype, q_TKGD.device)
    if kv.k_NKPD.shape[1] != num_kv_heads or kv.k_NKPD.shape[3] != head_dim:
        raise ValueError(f"queries {tuple(q_TKGD.shape)} do not fit a pool of {tuple(kv.k_NKPD.shape)}")
    if out_TKGD.shape != q_TKGD.shape or out_TKGD.dtype != q_TKGD.dtype:
        raise ValueError(f"out is {tuple(out_TKGD.shape)} {out_TKGD.dtype}, not {tuple(q_TKGD.shape)} {q_TKGD.dtype}")
    if lse_TKG is not None and (lse_TKG.shape != q_TKGD.shape[:3] or lse_TKG.dtype != torch.float32):
        raise ValueError(f"lse is {tuple(lse_TKG.shape)} {lse_TKG.dtype}, not {tuple(q_TKGD.shape[:3])} float32")
    if group > config.block_m:
        raise ValueError(f"{group} query heads per key/value head do not fit into tiles of {config.block_m} rows")
    for name, x in (("block tables", block_tables_SB), ("items", work.items_NI)):
        if x.dtype != torch.int32 or x.dim() != 2:
            raise ValueError(f"{name} are {x.dtype} with {x.dim()} dimensions, not int32 with 2")
    if work.items_NI.shape[1] != ITEM_COLUMNS:
        raise ValueError(f"items have {work.items_NI.shape[1]} columns, not {ITEM_COLUMNS}")
    tensors = {
        "q": q_TKGD, "out": out_TKGD, "lse": lse_TKG, "block tables": block_tables_SB, "items": work.items_NI
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
        if tensor is not None and tensor.device != q_TKGD.device:
            raise ValueError(f"{name} is on {tensor.device}, queries on {q_TKGD.device}")
