"""What Linux tells of a process: its CPU time, its memory, its children. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads; to a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Memory of a process that is resident, shared pages included."""
    return _kb(pid, "smaps_rollup", "Rss:")


def pss_bytes(pid: int) -> int:
    """Memory of a process that is resident, each shared page divided by those who share it."""
    return _kb(pid, "smaps_rollup", "Pss:")


def children(pid: int) -> list[int]:
    """Processes started by any thread of this one, oldest first."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.update(map(int, (task / "children").read_text(encoding="utf-8").split()))
    return sorted(found)


def _kb(pid: int, file: str, name: str) -> int:
    text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name))
