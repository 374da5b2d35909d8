"""What this machine has to offer: usable cores, free memory, and a low guess of its speed. Standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path

GIB = 2**30

# fp32 operations per core and clock: two per fused multiply-add, vector width, and one vector unit. Most cores
# have two such units, but virtual cores share them; and the first prediction had better be slow than fast.
_FLOPS_PER_CLOCK = {"avx512f": 32.0, "avx2": 16.0, "asimd": 8.0}
_OTHER_FLOPS_PER_CLOCK = 8.0
_DEFAULT_CLOCK_HZ = 2.0e9
# One core streams about as much from server memory; all together are bound by the channels of a socket.
_BYTES_PER_S_OF_CORE = 8.0e9
_MAX_BYTES_PER_S = 1.0e11


def num_usable_cores() -> int:
    """Cores this process may run on, which a container or taskset may have narrowed."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def cpu_flops_per_s() -> float:
    """fp32 FLOP/s of dense matrix products over all usable cores, guessed low."""
    cpuinfo = _read("/proc/cpuinfo")
    words = set(cpuinfo.split())
    per_clock = next((flops for flag, flops in _FLOPS_PER_CLOCK.items() if flag in words), _OTHER_FLOPS_PER_CLOCK)
    megahertz = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", cpuinfo, re.MULTILINE)
    # Cores at rest report a low clock; work wakes them.
    clock_hz = max(float(megahertz.group(1)) * 1e6, _DEFAULT_CLOCK_HZ) if megahertz else _DEFAULT_CLOCK_HZ
    return num_usable_cores() * clock_hz * per_clock


def memory_bytes_per_s() -> float:
    """Bytes per second that all usable cores read from memory together, guessed low."""
    return min(num_usable_cores() * _BYTES_PER_S_OF_CORE, _MAX_BYTES_PER_S)


def has_cuda_device() -> bool:
    """Whether the driver shows an NVIDIA GPU; whether torch can use it, the rank finds out."""
    return Path("/dev/nvidiactl").exists() and any(Path("/dev").glob("nvidia[0-9]*"))


def free_memory_bytes() -> int | None:
    """Bytes that could be allocated now without swapping, within the container's limit; None where that is unknown."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if available is None:
        return None
    free_bytes = int(available.group(1)) * 1024
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read(limit_file).strip(), _read(usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            free_bytes = min(free_bytes, max(0, int(limit) - int(usage)))
    return free_bytes


def directory_bytes(directory: Path) -> int:
    """Size of all files below a directory, or of a file."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
