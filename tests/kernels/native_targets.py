"""The instruction sets that native kernels are tested for."""

from __future__ import annotations

import pytest

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.native_build import NativeUnavailable, usable_targets

TARGETS = ("AMX", "AMX_PLAIN", "AVX512_BF16", "AVX512", "AVX2")
_NEEDED = {"AMX_PLAIN": "AVX512", "AVX512_BF16_PLAIN": "AVX512"}


def native_of(target: str) -> NativeAttention:
    """The native backend for an instruction set; skips where this machine lacks it."""
    needed = _NEEDED.get(target, target)
    try:
        if needed not in usable_targets():
            pytest.skip(f"this machine has no {needed}")
        return NativeAttention(target)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
