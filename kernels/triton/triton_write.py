"""Rotating queries and keys and writing keys and values to the pool, fused, in Triton; plain and e4m3 pools.

Shapes: T tokens of the batch, K key/value heads, G query heads per key/value head, D head dim, F = D / 2 frequencies,
W pieces of blocks that are written, P tokens per block. Pairs are (i, i + F), as in Hugging Face's Llama.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medha.kernels.attention.backend import check_shapes
from megatron_medha.kernels.kv.paged_kv import PagedKV

WRITE_COLUMNS = 4  # block, first slot in it, tokens, first row of the batch; for e4m3 pools
_ROWS_PER_PROGRAM = 32


@triton.jit
def _angles(cos, signed_sin, at, is_wanted, ROTATES: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines, or those of angle 0."""
    if ROTATES:
        cosines = tl.load(cos + at, mask=is_wanted, other=0.0)
        # The first half of signed_sin is negated; the second is the sine itself.
        sines = tl.load(signed_sin + at + HALF, mask=is_wanted, other=0.0)
    else:
        cosines = tl.full(at.shape, 1.0, tl.float32)
        sines = tl.full(at.shape, 0.0, tl.float32)
    return cosines, sines


# One kernel for any number of tokens: Triton would compile others for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_tokens"])
def rotate_and_write_kernel(
    q, k, v, cos, signed_sin, slots, q_out, k_pool, v_pool,
    num_tokens, num_kv_heads, q_stride_t, q_stride_k, q_stride_g, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, ROTATES: tl.constexpr, WRITES: tl.constexpr, WRITES_VALUES: tl.constexpr,
):  # fmt: skip
    """Program (TOKENS tokens, key/value head). ROWS: TOKENS * GROUP, rounded up to a power of two; WIDTH: HEAD_DIM."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1)
    first = tl.program_id(0) * TOKENS
    half_F = tl.arange(0, WIDTH // 2)
    is_half_1F = (half_F < HALF)[None, :]

    row_R = tl.arange(0, ROWS)
    token_R = first + row_R // GROUP
    is_real_R1 = ((row_R < TOKENS * GROUP) & (token_R < num_tokens))[:, None]
    if WIDTH > HEAD_DIM:
        is_real_R1 = is_real_R1 & is_half_1F
    angle_RF = token_R[:, None] * HEAD_DIM + half_F[None, :]
    cos_RF, sin_RF = _angles(cos, signed_sin, angle_RF, is_real_R1, ROTATES, HALF)
    q_at = q + (token_R.to(tl.int64) * q_stride_t + head * q_stride_k + row_R % GROUP * q_stride_g)[:, None]
    low_RF = tl.load(q_at + half_F[None, :], mask=is_real_R1, other=0.0).to(tl.float32)
    high_RF = tl.load(q_at + HALF + half_F[None, :], mask=is_real_R1, other=0.0).to(tl.float32)
    out_at = q_out + (((token_R.to(tl.int64) * num_kv_heads + head) * GROUP + row_R % GROUP) * HEAD_DIM)[:, None]
    dtype = q_out.dtype.element_ty
    tl.store(out_at + half_F[None, :], (low_RF * cos_RF - high_RF * sin_RF).to(dtype), mask=is_real_R1)
    tl.store(out_at + HALF + half_F[None, :], (high_RF * cos_RF + low_RF * sin_RF).to(dtype), mask=is_real_R1)

    if WRITES:
        token_T = first + tl.arange(0, TOKENS)
        slot_T = tl.load(slots + token_T, mask=token_T < num_tokens, other=-1)
        is_row_T1 = (slot_T >= 0)[:, None]  # -1: fills up a batch, or belongs to another rank's shard
        is_written_T1 = is_row_T1
        if WIDTH > HEAD_DIM:
            is_written_T1 = is_row_T1 & is_half_1F
        pool_T = ((slot_T // PAGE) * num_kv_heads + head) * PAGE + slot_T % PAGE
        angle_TF = token_T[:, None] * HEAD_DIM + half_F[None, :]
        cos_TF, sin_TF = _angles(cos, signed_sin, angle_TF, is_written_T1, ROTATES, HALF)
        k_at = k + (token_T.to(tl.int64) * k_stride_t + head * k_stride_k)[:, None]
        low_TF = tl.load(k_at + half_F[None, :], mask=is_written_T1, other=0.0).to(tl.float32)
        high_TF = tl.load(k_at + HALF + half_F[None, :], mask=is_written_T1, other=0.0).to(tl.float32)
        pool_at = k_pool + (pool_T * HEAD_DIM)[:, None]
        tl.store(pool_at + half_F[None, :], (low_TF * cos_TF - high_TF * sin_TF).to(dtype), mask=is_written_T1)
        tl.store(pool_at + HALF + half_F[None, :], (high_TF * cos_TF + low_TF * sin_TF).to(dtype), mask=is_written_T1)
        if WRITES_VALUES:
            dim_D = tl.arange(0, WIDTH)
            is_value_TD = is_row_T1
            if WIDTH > HEAD_DIM:
                is_value_TD = is_row_T1 & (dim_D < HEAD_DIM)[None, :]
            v_at = v + (token_T.to(tl.int64) * v_stride_t + head * v_stride_k)[:, None]
            v_TD = tl.load(v_at + dim_D[None, :], mask=is_value_TD, other=0.0)
            tl.store(v_pool + (pool_T * HEAD_DIM)[:, None] + dim_D[None, :], v_TD, mask=is_value_TD)


@triton.jit
def _power_of_two_scale(largest):
    """The least power of two that brings `largest` down to 448, or 0: multiplying by it is exact in any float."""
    bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    # Up to the next power of two: the mantissa's bits carry into the exponent.
    rounded = (bits + 0x7FFFFF) & 0x7F800000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _store_quantised(pool_PF, new_PF, is_old_P1, is_new_P1, old_scale, scale):
    """New values, and old ones brought to the new scale where it has grown, as e4m3."""
    inverse = 1.0 / tl.where(scale == 0.0, 1.0, scale)
    old_PF = tl.load(pool_PF, mask=is_old_P1, other=0.0).to(tl.float32)
    if old_scale != scale:
        tl.store(pool_PF, (old_PF * (old_scale * inverse)).to(pool_PF.dtype.element_ty), mask=is_old_P1)
    tl.store(pool_PF, (new_PF * inverse).to(pool_PF.dtype.element_ty), mask=is_new_P1)


@triton.jit
def write_quantised_kernel(
    k, v, cos, signed_sin, pieces, k_pool, v_pool, k_scale, v_scale,
    num_kv_heads, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, ROTATES: tl.constexpr,
    WRITES_VALUES: tl.constexpr,
):  # fmt: skip
    """Program (piece, key/value head): the batch's tokens of one block, scaled by the largest value in the block.

    A block that grows token by token may need a larger scale later. Scales are powers of two, so that bringing its
    old values to the new scale changes their exponents only: no rounding piles up but at e4m3's subnormal end.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    piece = pieces + tl.program_id(0) * 4  # WRITE_COLUMNS
    head = tl.program_id(1)
    block, offset = tl.load(piece).to(tl.int64), tl.load(piece + 1)
    count, first_row = tl.load(piece + 2), tl.load(piece + 3)
    if count == 0:  # fills up a list whose length a CUDA graph has fixed
        return
    slot_P = tl.arange(0, PAGE)
    is_old_P1 = (slot_P < offset)[:, None]
    is_new_P1 = ((slot_P >= offset) & (slot_P < offset + count))[:, None]
    token_P = (first_row + slot_P - offset).to(tl.int64)
    half_F = tl.arange(0, WIDTH // 2)[None, :]
    if WIDTH > HEAD_DIM:
        is_old_P1 = is_old_P1 & (half_F < HALF)
        is_new_P1 = is_new_P1 & (half_F < HALF)

    cos_PF, sin_PF = _angles(cos, signed_sin, token_P[:, None] * HEAD_DIM + half_F, is_new_P1, ROTATES, HALF)
    k_at = k + (token_P * k_stride_t + head * k_stride_k)[:, None] + half_F
    low_PF = tl.load(k_at, mask=is_new_P1, other=0.0).to(tl.float32)
    high_PF = tl.load(k_at + HALF, mask=is_new_P1, other=0.0).to(tl.float32)
    low_PF, high_PF = low_PF * cos_PF - high_PF * sin_PF, high_PF * cos_PF + low_PF * sin_PF
    at = block * num_kv_heads + head
    has_old = offset > 0
    k_old_scale = tl.where(has_old, tl.load(k_scale + at), 0.0)
    k_largest = tl.maximum(tl.max(tl.abs(low_PF)), tl.max(tl.abs(high_PF)))
    k_new_scale = tl.maximum(k_old_scale, _power_of_two_scale(k_largest))
    pool_PF = ((at * PAGE + slot_P) * HEAD_DIM)[:, None] + half_F
    _store_quantised(k_pool + pool_PF, low_PF, is_old_P1, is_new_P1, k_old_scale, k_new_scale)
    _store_quantised(k_pool + pool_PF + HALF, high_PF, is_old_P1, is_new_P1, k_old_scale, k_new_scale)
    tl.store(k_scale + at, k_new_scale)
    if WRITES_VALUES:
        v_at = v + (token_P * v_stride_t + head * v_stride_k)[:, None] + half_F
        v_low_PF = tl.load(v_at, mask=is_new_P1, other=0.0).to(tl.float32)
        v_high_PF = tl.load(v_at + HALF, mask=is_new_P1, other=0.0).to(tl.float32)
        v_old_scale = tl.where(has_old, tl.load(v_scale + at), 0.0)
        v_largest = tl.maximum(tl.max(tl.abs(v_low_PF)), tl.max(tl.abs(v_high_PF)))
        v_new_scale = tl.maximum(v_old_scale, _power_of_two_scale(v_largest))
        _store_quantised(v_pool + pool_PF, v_low_PF, is_old_P1, is_new_P1, v_old_scale, v_new_scale)
        _store_quantised(v_pool + pool_PF + HALF, v_high_PF, is_old_P1, is_new_P1, v_old_scale, v_new_scale)
        tl.store(v_scale + at, v_new_scale)


def rotate_and_write(
    q_TKGD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor | None,
    signed_sin_TD: Tensor | None,
    kv: PagedKV,
    *,
    slots_T: Tensor | None = None,
    pieces_W4: Tensor | None = None,
    writes_values: bool = True,
) -> Tensor:
    """Rotated queries, contiguous [T, K, G, D]; rotated keys and plain values go to the pool.

    q, k, v:       strided views whose last dimension is contiguous, as Megatron's fused projection leaves them.
    cos, signed_sin: fp32 [T, D], contiguous, as model/rotary.py makes them; None where q and k are rotated already.
    slots_T:       int64, for plain pools: block * P + place in it; -1 where nothing is to be written.
    pieces_W4:     int32 [W, WRITE_COLUMNS], for e4m3 pools: a block at most once; slots up to the first one written
                   are taken to hold the same sequence's earlier tokens.
    writes_values: False where attention takes the keys for values.
    Raises ValueError for devices, dtypes, shapes or strides it cannot take.
    """
    _check(q_TKGD, k_TKD, v_TKD, cos_TD, signed_sin_TD, kv, slots_T, pieces_W4)
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    q_out_TKGD = torch.empty(q_TKGD.shape, dtype=q_TKGD.dtype, device=q_TKGD.device)
    if not num_tokens:
        return q_out_TKGD
    width = triton.next_power_of_2(head_dim)
    tokens = max(1, _ROWS_PER_PROGRAM // triton.next_power_of_2(group))
    rotate_and_write_kernel[(triton.cdiv(num_tokens, tokens), num_kv_heads)](
        q_TKGD, k_TKD, v_TKD, cos_TD, signed_sin_TD, slots_T, q_out_TKGD, kv.k_NKPD, kv.v_NKPD,
        num_tokens, num_kv_heads, *q_TKGD.stride()[:3], *k_TKD.stride()[:2], *v_TKD.stride()[:2],
        GROUP=group, HEAD_DIM=head_dim, WIDTH=width, PAGE=kv.block_size, TOKENS=tokens,
        ROWS=triton.next_power_of_2(tokens * group), ROTATES=cos_TD is not None, WRITES=slots_T is not None,
        WRITES_VALUES=writes_values, num_warps=4,
    )  # fmt: skip
    if pieces_W4 is not None and pieces_W4.shape[0]:
        write_quantised_kernel[(pieces_W4.shape[0], num_kv_heads)](
            k_TKD, v_TKD, cos_TD, signed_sin_TD, pieces_W4, kv.k_NKPD, kv.v_NKPD, kv.k_scale_NK, kv.v_scale_NK,
            num_kv_heads, *k_TKD.stride()[:2], *v_TKD.stride()[:2],
            HEAD_DIM=head_dim, WIDTH=width, PAGE=kv.block_size, ROTATES=cos_TD is not None,
            WRITES_VALUES=writes_values, num_warps=8,
        )  # fmt: skip
    return q_out_TKGD


def _check(
    q_TKGD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor | None,
    signed_sin_TD: Tensor | None,
    kv: PagedKV,
    slots_T: Tensor | None,
    pieces_W4: Tensor | None,
) -> None:
    num_tokens, num_kv_heads, _, head_dim = q_TKGD.shape
    check_shapes(q_TKGD, k_TKD, v_TKD)
    kv.check(q_TKGD.dtype, q_TKGD.device)
    if (pieces_W4 if kv.is_quantised else slots_T) is None or (slots_T if kv.is_quantised else pieces_W4) is not None:
        raise ValueError("a plain pool is written by slots, an e4m3 pool by pieces of blocks")
    for name, x in (("q", q_TKGD), ("k", k_TKD), ("v", v_TKD)):
        if x.dtype != q_TKGD.dtype or x.device != q_TKGD.device or x.stride(-1) != 1:
            raise ValueError(f"{name} is {x.dtype} on {x.device} with strides {x.stride()}; q is {q_TKGD.dtype}")
    if (cos_TD is None) != (signed_sin_TD is None):
        raise ValueError("cosines without sines")
    for name, x in (("cos", cos_TD), ("sin", signed_sin_TD)):
        if x is None:
            continue
        if x.shape != (num_tokens, head_dim) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, not contiguous float32 [{num_tokens}, {head_dim}]")
        if x.device != q_TKGD.device:
            raise ValueError(f"{name} is on {x.device}, queries on {q_TKGD.device}")
    if slots_T is not None and (slots_T.shape != (num_tokens,) or slots_T.dtype != torch.int64):
        raise ValueError(f"slots are {slots_T.dtype} {tuple(slots_T.shape)}, not int64 [{num_tokens}]")
    if pieces_W4 is not None and (pieces_W4.dtype != torch.int32 or pieces_W4.shape[1:] != (WRITE_COLUMNS,)):
        raise ValueError(f"pieces are {pieces_W4.dtype} {tuple(pieces_W4.shape)}, not int32 [W, {WRITE_COLUMNS}]")
