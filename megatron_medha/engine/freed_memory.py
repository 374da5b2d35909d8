"""Memory that a long-running process has freed and the C library keeps."""

from __future__ import annotations

import ctypes

# glibc keeps what is freed between pieces that live on. What lies there depends on which sizes met by chance, and its
# record grows as long as chance plays: a rank grew by 34 MiB in an hour in which nothing leaked (experiments/soak).
GIVE_BACK_INTERVAL_S = 60.0


def give_back_freed_memory() -> None:
    """Return free pages of all heaps to the system, from any thread; nothing where the C library has no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(ctypes.c_size_t(0))
