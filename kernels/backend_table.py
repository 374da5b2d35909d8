"""The attention backends there are: a line each, and where to find it. Nothing is imported here."""

from __future__ import annotations

import os
from typing import NamedTuple


class BackendEntry(NamedTuple):
    """One backend."""

    device: str            # that it runs on: cpu or cuda
    address: str           # module:class, below megatron_medha.kernels
    packages: tuple[str, ...] = ()  # that it needs


# The best of each device first; the last one of each can always be had. On Hopper flash_attn_3 is measured
# against triton (worker/startup/attention_trials.py).
BACKENDS = {
    "native": BackendEntry("cpu", "attention.native_attention:NativeAttention"),
    "aten": BackendEntry("cpu", "attention.aten_attention:AtenAttention"),
    "triton": BackendEntry("cuda", "triton.triton_backend:TritonAttention", ("triton",)),
    "flash_attn_3": BackendEntry("cuda", "flash.flash3_backend:Flash3Attention", ("flash_attn_interface", "triton")),
    "flash_attn": BackendEntry("cuda", "attention.flash_backend:FlashAttention", ("flash_attn",)),
    "torch": BackendEntry("cuda", "attention.flash_backend:FlashAttention"),
}


def is_rehearsal() -> bool:
    """Whether Triton's kernels are interpreted, for tests of them on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


REHEARSED = ("triton", "flash_attn_3")  # whose own kernels are Triton's
