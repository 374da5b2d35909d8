"""The instruction sets that native kernels are tested for."""

from __future__ import annotations

import pytest

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.native_build import NativeUnavailable, usable_targets

TARGETS = ("AMX", "AMX_PLAIN", "AVX512", "AVX2")


def native_of(target: str) -> NativeAttention:
    """The native backend for an instruction set; skips where this machine lacks it."""
    needed = "AVX512" if target == "AMX_PLAIN" else target
    try:
        if needed not in usable_targets():
            pytest.skip(f"this machine has no {needed}")
        return NativeAttention(target)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
