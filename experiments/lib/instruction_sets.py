"""The instruction sets of this machine's CPU that matter for speed."""

from __future__ import annotations

import re
from pathlib import Path

_KNOWN = (
    "avx2", "avx_vnni", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_fp16", "avx512_bf16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "sve", "bf16", "i8mm",
)  # fmt: skip


def instruction_sets(*, with_bf16: bool = True) -> list[str]:
    """By the kernel's names, oldest first; without those of bf16 and tiles if these are switched off."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    return [name for name in _KNOWN if name in flags and (with_bf16 or not re.search("bf16|amx", name))]
