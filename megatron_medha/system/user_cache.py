"""Where what can be made anew is kept between runs; kernels, which import nothing of ours, say the same again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, a directory of the project's own in it. RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megatron_medha"
