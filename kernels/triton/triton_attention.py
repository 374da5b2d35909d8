"""The paged attention kernel in Triton, and its launch: one kernel for prefill chunks and decodes, with log-sum-exp.

Shapes: T query tokens, K key/value heads, G query heads per key/value head, D head dim, E its tail, N blocks of the
pool, P tokens per block, I items, R rows of a tile (BLOCK_M). A tile's rows are tokens times G: row m is
query head m % G of token m // G, so that one read of the keys serves the whole group. Keys every row of the tile sees
are run through without a mask; only the last blocks of a tile are masked, and all of them in layers with a window. A
head dim that is no power of two (MLA's 576) is run through as two that are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_medha.kernels.attention.work_list import ITEM_COLUMNS, WorkList
from megatron_medha.kernels.kv.paged_kv import PagedKV

_LOG2_E = 1.4426950408889634
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
    reads_runs: bool = False  # items whose blocks follow one another have a loop of their own, which looks up none
    programs_per_sm: int = 1  # that run at once, for cutting the work; measured occupancy, not a wish

    @property
    def name(self) -> str:
        """Rows x keys, stages of the pipeline."""
        return f"{self.block_m}x{self.block_n}s{self.num_stages}{'' if self.has_tma else '-cp'}"

    def tokens_per_tile(self, group: int) -> int:
        """Tokens whose query groups fit into a tile."""
        return self.block_m // group


@triton.jit
def _loaded(
    pool, first_slot, HAS_TMA: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Numbers [FIRST, FIRST + WIDTH) of BLOCK_N keys or values; 0 where those are past DIM."""
    if HAS_TMA:
        found = pool.load([first_slot.to(tl.int32), FIRST])
    else:
        dim_D = FIRST + tl.arange(0, WIDTH)
        at_ND = first_slot * DIM + tl.arange(0, BLOCK_N)[:, None] * DIM + dim_D[None, :]
        if FIRST + WIDTH > DIM:
            found = tl.load(pool + at_ND, mask=(dim_D < DIM)[None, :], other=0.0)
        else:
            found = tl.load(pool + at_ND)
    return found


@triton.jit
def _blend(
    acc_RD, acc_RE, sum_R, max_R, unit, q_RD, q_RE, keys, values, keys_tail, values_tail, k_scale, v_scale, table, run,
    n, last_key_R, lowest_key_R, head, num_kv_heads, scale_log2, cap_log2,
    IS_MASKED: tl.constexpr, IS_WINDOWED: tl.constexpr, IS_CAPPED: tl.constexpr, IS_QUANTISED: tl.constexpr,
    HAS_TMA: tl.constexpr, ARE_VALUES_KEYS: tl.constexpr, IN_RUN: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys and values into the running softmax. n: its first key, a multiple of BLOCK_N.

    head: of the pool. unit: what acc is a multiple of: of e4m3 blocks the largest scale so far, else 1.
    acc_RE, q_RE, keys_tail, values_tail: the last numbers of a head dim that is no power of two, where TAIL > 0.
    """
    HEAD_DIM: tl.constexpr = q_RD.shape[1]
    block = (run + n // PAGE if IN_RUN else tl.load(table + n // PAGE)).to(tl.int64)
    first_slot = (block * num_kv_heads + head) * PAGE + n % PAGE
    k_ND = _loaded(keys, first_slot, HAS_TMA, BLOCK_N, DIM, 0, HEAD_DIM)
    v_ND = k_ND if ARE_VALUES_KEYS else _loaded(values, first_slot, HAS_TMA, BLOCK_N, DIM, 0, HEAD_DIM)
    if IS_QUANTISED:
        scale_log2 *= tl.load(k_scale + block * num_kv_heads + head)
    scores_RN = tl.dot(q_RD, tl.trans(k_ND.to(q_RD.dtype)), input_precision="ieee")
    if TAIL:
        k_NE = _loaded(keys_tail, first_slot, HAS_TMA, BLOCK_N, DIM, HEAD_DIM, TAIL)
        scores_RN = tl.dot(q_RE, tl.trans(k_NE.to(q_RE.dtype)), scores_RN, input_precision="ieee")
        v_NE = k_NE if ARE_VALUES_KEYS else _loaded(values_tail, first_slot, HAS_TMA, BLOCK_N, DIM, HEAD_DIM, TAIL)
    scores_RN = scores_RN * scale_log2
    if IS_CAPPED:
        # cap * tanh(score / cap); scale_log2 holds 2 / cap too. Triton has no tanh of its own.
        scores_RN = cap_log2 - 2.0 * cap_log2 / (tl.math.exp2(scores_RN) + 1.0)
    if IS_MASKED:
        key_N = n + tl.arange(0, BLOCK_N)
        is_hidden_RN = key_N[None, :] > last_key_R[:, None]
        if IS_WINDOWED:
            is_hidden_RN = is_hidden_RN | (key_N[None, :] < lowest_key_R[:, None])
        scores_RN = tl.where(is_hidden_RN, -float("inf"), scores_RN)
        # A slot nobody wrote, or a broken request once did, may hold NaN, and 0 * NaN would spoil the sum.
        is_seen_N1 = (key_N <= tl.max(last_key_R, 0))[:, None]
        v_ND = tl.where(is_seen_N1, v_ND.to(q_RD.dtype), 0.0)
        if TAIL:
            v_NE = tl.where(is_seen_N1, v_NE.to(q_RD.dtype), 0.0)
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
    weights_RN = weights_RN.to(q_RD.dtype)
    acc_RD = tl.dot(weights_RN, v_ND.to(q_RD.dtype), acc_RD * kept_R[:, None], input_precision="ieee")
    if TAIL:
        acc_RE = tl.dot(weights_RN, v_NE.to(q_RD.dtype), acc_RE * kept_R[:, None], input_precision="ieee")
    return acc_RD, acc_RE, sum_R, new_max_R, unit


@triton.jit(do_not_specialize=["table_width"])  # the pool's size, of which no variant is to be compiled
def attention_kernel(
    q, keys, values, keys_tail, values_tail, k_scale, v_scale, sinks, out, lse, part_out, part_lse, block_tables, items,
    table_width, num_kv_heads, scale_log2, cap_log2,
    GROUP: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, SPLITS: tl.constexpr,
    IS_QUANTISED: tl.constexpr, IS_WINDOWED: tl.constexpr, IS_CAPPED: tl.constexpr, ARE_VALUES_KEYS: tl.constexpr,
    HAS_RUNS: tl.constexpr, HAS_TMA: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program (item, head): a tile over a range of its keys, into out or into a part.

    SPLITS: programs that share the queries of a key/value head, GROUP of them each; `head` counts these.
    DIM: the head dim; HEAD_DIM: the largest power of two in it; TAIL: one that holds the rest, or 0.
    """
    item = items + tl.program_id(0) * 10  # ITEM_COLUMNS
    head = tl.program_id(1)
    kv_head = head // SPLITS
    num_heads = num_kv_heads * SPLITS
    first_row, num_rows = tl.load(item), tl.load(item + 1)
    if num_rows == 0:  # fills up a list whose length a CUDA graph has fixed
        return
    first_last_key, step = tl.load(item + 2), tl.load(item + 3)
    key_begin, key_end = tl.load(item + 4), tl.load(item + 5)
    table = block_tables + tl.load(item + 6).to(tl.int64) * table_width
    part, run = tl.load(item + 7), tl.load(item + 9)

    row_R = tl.arange(0, BLOCK_M)
    token_R = row_R // GROUP
    is_real_R = token_R < num_rows
    # Pool and tables are whole blocks, so the last one may be read past key_end; the mask hides what lies there.
    last_key_R = tl.minimum(first_last_key + token_R * step, key_end - 1)
    lowest_key_R = last_key_R
    lowest_key = 0
    if IS_WINDOWED:
        lowest_key = tl.load(item + 8)
        lowest_key_R = lowest_key + token_R
    dim_D = tl.arange(0, HEAD_DIM)
    q_row_R = ((first_row + token_R).to(tl.int64) * num_heads + head) * GROUP + row_R % GROUP
    q_RD = tl.load(q + q_row_R[:, None] * DIM + dim_D[None, :], mask=is_real_R[:, None], other=0.0)
    q_RE = q_RD
    acc_RE = tl.zeros([], tl.float32)
    if TAIL:
        dim_E = HEAD_DIM + tl.arange(0, TAIL)
        is_real_RE = is_real_R[:, None] & (dim_E < DIM)[None, :]
        q_RE = tl.load(q + q_row_R[:, None] * DIM + dim_E[None, :], mask=is_real_RE, other=0.0)
        acc_RE = tl.zeros([BLOCK_M, TAIL], tl.float32)

    max_R = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_M], tl.float32)
    acc_RD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    unit = tl.full([], 1.1754944e-38 if IS_QUANTISED else 1.0, tl.float32)
    if IS_QUANTISED and q_RD.dtype == tl.bfloat16:
        # e4m3 is exact in both, but Hopper converts to bf16 at an eighth of the rate (F2F: 16 a clock, not 128).
        q_RD = q_RD.to(tl.float16)
        q_RE = q_RE.to(tl.float16)
    # Up to here every row sees every key: the first row sees the fewest.
    seen_by_all = key_begin
    if not IS_WINDOWED:  # with one, few blocks are seen by all rows: all are masked, in one loop
        seen_by_all = tl.minimum(key_end, (first_last_key + 1) // BLOCK_N * BLOCK_N)
        begin = key_begin
        if HAS_RUNS:  # noqa: SIM102  # a constant
            if run != -2147483648:  # NO_RUN
                # No block is looked up, which takes levels of the pipeline: the next keys are on their way with two
                # buffers, too. With three, shared memory is 16 bytes short of two programs of the first tile.
                for n in tl.range(key_begin, seen_by_all, BLOCK_N, num_stages=NUM_STAGES - 3):
                    acc_RD, acc_RE, sum_R, max_R, unit = _blend(
                        acc_RD, acc_RE, sum_R, max_R, unit, q_RD, q_RE, keys, values, keys_tail, values_tail, k_scale,
                        v_scale, table, run, n, last_key_R, lowest_key_R, kv_head, num_kv_heads, scale_log2, cap_log2,
                        False, False, IS_CAPPED, IS_QUANTISED, HAS_TMA, ARE_VALUES_KEYS, True, BLOCK_N, PAGE, DIM, TAIL,
                    )  # fmt: skip
                begin = seen_by_all
        for n in tl.range(begin, seen_by_all, BLOCK_N, num_stages=NUM_STAGES):
            acc_RD, acc_RE, sum_R, max_R, unit = _blend(
                acc_RD, acc_RE, sum_R, max_R, unit, q_RD, q_RE, keys, values, keys_tail, values_tail, k_scale, v_scale,
                table, run, n, last_key_R, lowest_key_R, kv_head, num_kv_heads, scale_log2, cap_log2,
                False, False, IS_CAPPED, IS_QUANTISED, HAS_TMA, ARE_VALUES_KEYS, False, BLOCK_N, PAGE, DIM, TAIL,
            )  # fmt: skip
    for n in tl.range(
        tl.maximum(key_begin, seen_by_all), key_end, BLOCK_N, num_stages=NUM_STAGES if IS_WINDOWED else 1
    ):
        acc_RD, acc_RE, sum_R, max_R, unit = _blend(
            acc_RD, acc_RE, sum_R, max_R, unit, q_RD, q_RE, keys, values, keys_tail, values_tail, k_scale, v_scale,
            table, run, n, last_key_R, lowest_key_R, kv_head, num_kv_heads, scale_log2, cap_log2,
            True, IS_WINDOWED, IS_CAPPED, IS_QUANTISED, HAS_TMA, ARE_VALUES_KEYS, False, BLOCK_N, PAGE, DIM, TAIL,
        )  # fmt: skip

    kept_R = tl.full([BLOCK_M], 1.0, tl.float32) * unit
    if HAS_SINKS:  # noqa: SIM102  # a constant
        # A sink is a key without a value; the first of a tile's parts has it.
        if key_begin == tl.maximum(lowest_key, 0) // BLOCK_N * BLOCK_N:
            sink_R = tl.load(sinks + head * GROUP + row_R % GROUP) * 1.4426950408889634
            new_max_R = tl.maximum(max_R, sink_R)
            kept_of_keys_R = tl.math.exp2(max_R - new_max_R)
            sum_R = sum_R * kept_of_keys_R + tl.math.exp2(sink_R - new_max_R)
            kept_R *= kept_of_keys_R
            max_R = new_max_R
    is_empty_R = sum_R == 0.0
    # ln 2: the running softmax is kept in powers of two, as the hardware has exp2 only.
    lse_R = tl.where(is_empty_R, -float("inf"), max_R * 0.6931471805599453 + tl.log(tl.where(is_empty_R, 1.0, sum_R)))
    whole_R1 = tl.where(is_empty_R, 1.0, sum_R)[:, None]
    is_empty_R1 = is_empty_R[:, None]
    part_row_R = (part.to(tl.int64) * num_heads + head) * BLOCK_M + row_R
    if part < 0:
        if HAS_LSE:
            tl.store(lse + q_row_R, lse_R, mask=is_real_R)
    else:
        tl.store(part_lse + part_row_R, lse_R, mask=is_real_R)
    if IS_QUANTISED or HAS_SINKS:
        acc_RD *= kept_R[:, None]
    out_RD = tl.where(is_empty_R1, 0.0, acc_RD / whole_R1)
    if part < 0:
        at_RD = q_row_R[:, None] * DIM + dim_D[None, :]
        tl.store(out + at_RD, out_RD.to(out.dtype.element_ty), mask=is_real_R[:, None])
    else:
        tl.store(part_out + part_row_R[:, None] * DIM + dim_D[None, :], out_RD, mask=is_real_R[:, None])
    if TAIL:
        if IS_QUANTISED or HAS_SINKS:
            acc_RE *= kept_R[:, None]
        out_RE = tl.where(is_empty_R1, 0.0, acc_RE / whole_R1)
        if part < 0:
            at_RE = q_row_R[:, None] * DIM + dim_E[None, :]
            tl.store(out + at_RE, out_RE.to(out.dtype.element_ty), mask=is_real_RE)
        else:
            tl.store(part_out + part_row_R[:, None] * DIM + dim_E[None, :], out_RE, mask=is_real_RE)


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A work list on the device. num_parts is what the partial buffers must hold, also under padding."""

    items_NI: Tensor   # int32
    merges_MI: Tensor  # int32
    num_parts: int
    is_windowed: bool = False  # rows do not see keys below the last column of their item

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> DeviceWork:
        """Copied as it is; the serving path stages all lists of a step in one copy instead."""
        items, merges = (torch.from_numpy(x).to(device) for x in (work.items_NI, work.merges_MI))
        return cls(items, merges, work.num_parts, work.is_windowed)


class HeadDims(NamedTuple):
    """A head dim as two powers of two, as Triton wants them."""

    main: int
    tail: int  # that holds the rest, or 0


def split_dim(head_dim: int) -> HeadDims:
    """The largest power of two in it, and one for the rest, of at least what a product of tensor cores takes."""
    main = 1 << head_dim.bit_length() - 1
    return HeadDims(main, max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0)


def split_group(group: int, num_rows: int) -> int:
    """Into how many parts of equal size a group of query heads is cut, so that a part fits into so many rows."""
    return next(parts for parts in range(1, group + 1) if group % parts == 0 and group // parts <= num_rows)


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
    score_cap: float | None = None,
    sinks_H: Tensor | None = None,
    are_values_keys: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Attention of the rows named in `work`, written to out (and lse); rows it does not name are left alone.

    q_TKGD:   bf16, fp16 or fp32, contiguous. kv: the pool of one layer, same dtype or e4m3; of a K-th, where several
              of the K share a key/value head of the pool (`split_group`).
    block_tables_SB: int32, contiguous; row s holds the blocks of the sequence that items call s.
    lse_TKG:  fp32, or None where nobody asks.
    parts:    fp32 buffers (out [parts, K, BLOCK_M, D], lse [parts, K, BLOCK_M]) to use; made here when None.
    score_cap: scaled scores x become cap * tanh(x / cap). sinks_H: fp32, a score of each query head beside its keys'.
    are_values_keys: the pool's values are not read, as each is the same as its key.
    Returns the parts of tiles that were cut, which `merge_parts` of triton_merge.py must put together, or
    None when there are none. Raises ValueError for devices, dtypes, shapes or strides it cannot take.
    """
    _check(q_TKGD, kv, block_tables_SB, work, config, out_TKGD, lse_TKG, sinks_H)
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
    dims = split_dim(head_dim)
    has_tma = config.has_tma and head_dim * kv.k_NKPD.itemsize % 16 == 0  # a tensor map's rows begin at 16 bytes
    pools: list[Any] = [kv.k_NKPD, kv.v_NKPD, *((kv.k_NKPD, kv.v_NKPD) if dims.tail else (None, None))]
    if has_tma:
        widths = (dims.main, dims.main, dims.tail, dims.tail)
        pools = [
            None if pool is None else TensorDescriptor.from_tensor(pool.view(-1, head_dim), [block_n, width])
            for pool, width in zip(pools, widths, strict=True)
        ]
    is_quantised = kv.k_scale_NK is not None
    scale_log2, cap_log2 = scale * _LOG2_E, 0.0
    if score_cap is not None:
        scale_log2, cap_log2 = scale_log2 * 2.0 / score_cap, score_cap * _LOG2_E
    num_pool_heads = kv.k_NKPD.shape[1]
    attention_kernel[(num_items, num_kv_heads)](
        q_TKGD, *pools, kv.k_scale_NK, kv.k_scale_NK if are_values_keys else kv.v_scale_NK, sinks_H, out_TKGD, lse_TKG,
        *(parts or _no_parts(q_TKGD.device)), block_tables_SB, work.items_NI,
        block_tables_SB.shape[1], num_pool_heads, scale_log2, cap_log2,
        GROUP=group, DIM=head_dim, HEAD_DIM=dims.main, TAIL=dims.tail, PAGE=kv.block_size, BLOCK_M=config.block_m,
        BLOCK_N=block_n, NUM_STAGES=config.num_stages, SPLITS=num_kv_heads // num_pool_heads,
        IS_QUANTISED=is_quantised, IS_WINDOWED=work.is_windowed, IS_CAPPED=score_cap is not None,
        ARE_VALUES_KEYS=are_values_keys, HAS_RUNS=config.reads_runs and not work.is_windowed,
        HAS_TMA=has_tma, HAS_SINKS=sinks_H is not None,
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
    sinks_H: Tensor | None,
) -> None:
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    if q_TKGD.dtype not in QUERY_DTYPES:
        raise ValueError(f"queries are {q_TKGD.dtype}; known: {', '.join(map(str, QUERY_DTYPES))}")
    kv.check(q_TKGD.dtype, q_TKGD.device)
    if num_kv_heads % kv.k_NKPD.shape[1] or kv.k_NKPD.shape[3] != head_dim:
        raise ValueError(f"queries {tuple(q_TKGD.shape)} do not fit a pool of {tuple(kv.k_NKPD.shape)}")
    if out_TKGD.shape != q_TKGD.shape or out_TKGD.dtype not in (q_TKGD.dtype, torch.float32):
        raise ValueError(f"out is {tuple(out_TKGD.shape)} {out_TKGD.dtype}, not {tuple(q_TKGD.shape)} {q_TKGD.dtype}")
    if lse_TKG is not None and (lse_TKG.shape != q_TKGD.shape[:3] or lse_TKG.dtype != torch.float32):
        raise ValueError(f"lse is {tuple(lse_TKG.shape)} {lse_TKG.dtype}, not {tuple(q_TKGD.shape[:3])} float32")
    if sinks_H is not None and (sinks_H.shape != (num_kv_heads * group,) or sinks_H.dtype != torch.float32):
        raise ValueError(f"sinks are {tuple(sinks_H.shape)} {sinks_H.dtype}, not [{num_kv_heads * group}] float32")
    if group > config.block_m:
        raise ValueError(f"{group} query heads per key/value head do not fit into tiles of {config.block_m} rows")
    for name, x in (("block tables", block_tables_SB), ("items", work.items_NI)):
        if x.dtype != torch.int32 or x.dim() != 2:
            raise ValueError(f"{name} are {x.dtype} with {x.dim()} dimensions, not int32 with 2")
    if work.items_NI.shape[1] != ITEM_COLUMNS:
        raise ValueError(f"items have {work.items_NI.shape[1]} columns, not {ITEM_COLUMNS}")
    tensors = {
        "q": q_TKGD, "out": out_TKGD, "lse": lse_TKG, "block tables": block_tables_SB, "items": work.items_NI,
        "sinks": sinks_H,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
        if tensor is not None and tensor.device != q_TKGD.device:
            raise ValueError(f"{name} is on {tensor.device}, queries on {q_TKGD.device}")
