"""Where a nucleus ends, without sorting the vocabulary: a program per row, in Triton.

Shapes: R rows, V vocabulary. A row of 128K logits is half a megabyte, which the GPU's cache holds for all 31 passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["vocab_size"])
def nucleus_cut_kernel(logits, masses, cuts, vocab_size, row_stride, BLOCK: tl.constexpr):
    """Program (row,). The largest bit pattern of -logit below which less than the row's mass lies, as a logit."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    mass = tl.load(masses + row)
    low = tl.zeros([1], tl.int32)
    high = tl.full([1], 0x7F800000, tl.int32)  # infinity's
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        above = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab_size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            logit = tl.load(start + at, mask=at < vocab_size, other=-float("inf"))
            bits = tl.abs(logit).to(tl.int32, bitcast=True)
            above += tl.where(bits < middle, tl.exp(logit), 0.0)
        is_kept = tl.sum(above.to(tl.float64)) < mass
        low = tl.where(is_kept, middle, low)
        high = tl.where(is_kept, high, middle - 1)
    tl.store(cuts + row + tl.arange(0, 1), -(low.to(tl.float32, bitcast=True)))


def nucleus_cut(logits_RV: Tensor, masses_R1: Tensor) -> Tensor:
    """(R, 1) fp32: the least logit kept; see `nucleus_cut_of_unsorted` of model/draw.py.

    logits_RV: fp32, at most 0, columns next to each other. masses_R1: fp64.
    """
    if logits_RV.dtype != torch.float32 or logits_RV.stride(1) != 1 or masses_R1.dtype != torch.float64:
        raise ValueError(f"logits are {logits_RV.dtype} {logits_RV.stride()}, masses {masses_R1.dtype}")
    cuts_R1 = torch.empty(logits_RV.shape[0], 1, dtype=torch.float32, device=logits_RV.device)
    nucleus_cut_kernel[(logits_RV.shape[0],)](
        logits_RV, masses_R1.contiguous(), cuts_R1, logits_RV.shape[1], logits_RV.stride(0), BLOCK=_BLOCK, num_warps=8
    )
    return cuts_R1
