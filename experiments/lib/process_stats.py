"""What Linux says of processes: their CPU time, memory, descendants. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads, to a hundredth of a second; 0 if it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def tree_cpu_s(pid: int) -> float:
    """Of a process and all its descendants. One that ended takes its seconds along with it."""
    return sum(map(cpu_s, process_tree(pid)))


def machine_cpu_s() -> float:
    """Of everything on the machine, since it was started."""
    # user nice system idle iowait irq softirq steal; guests are within user
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS_PER_S


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is no file: what it has allocated itself.

    RSS and PSS count pages of libraries as well, which come and go with other processes that use them.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:"))


def children(pid: int) -> list[int]:
    """Processes started by any thread of this one, oldest first."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.update(map(int, (task / "children").read_text(encoding="utf-8").split()))
    return sorted(found)


def process_tree(root: int) -> set[int]:
    """The process, its session and all their descendants: ranks may have made sessions of their own."""
    below: dict[int, list[int]] = {}
    found = [root]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            below.setdefault(int(fields[1]), []).append(int(entry.name))
            if int(fields[3]) == root:
                found.append(int(entry.name))
    tree: set[int] = set()
    while found:
        pid = found.pop()
        if pid not in tree:
            tree.add(pid)
            found += below.get(pid, [])
    return tree


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold spaces; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
