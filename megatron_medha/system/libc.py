"""Calls of the C library that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# glibc keeps what is freed between pieces that live on. What lies there depends on which sizes met by chance, and its
# record grows as long as chance plays: a rank grew by 34 MiB in an hour in which nothing leaked (experiments/soak).
TRIM_INTERVAL_S = 60.0
_M_MMAP_THRESHOLD = -3
_PR_SET_PDEATHSIG = 1


def malloc_trim() -> None:
    """Return free pages of all heaps to the system, from any thread; nothing where the C library has no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(ctypes.c_size_t(0))


def set_mmap_threshold() -> None:
    """Have blocks of 1 MiB and more returned to the system as soon as they are freed, from here on.

    By default glibc raises that limit up to 32 MiB as such blocks come and go: bodies of 16 MiB left 50 MiB behind.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    set_option(_M_MMAP_THRESHOLD, 2**20)


def set_pdeathsig(parent_pid: int) -> None:
    """Ask Linux to kill this process when the one that started it ends, however that ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before we had asked
        sys.exit(1)
