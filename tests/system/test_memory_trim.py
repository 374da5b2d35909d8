"""Memory that was freed goes back to the system, though something that lives on lies behind it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from megatron_medha.system.libc import malloc_trim

BLOCK_BYTES, NUM_BLOCKS = 100_000, 640  # below what glibc maps by itself


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_lies_before_a_living_piece_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    *freed, living = sorted(blocks)
    for block in freed:
        libc.free(block)
    before = anonymous_bytes()
    malloc_trim()
    assert before - anonymous_bytes() > BLOCK_BYTES * NUM_BLOCKS // 2
    libc.free(living)


def anonymous_bytes() -> int:
    """Of this process, resident."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
