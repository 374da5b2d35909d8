"""CPU seconds of a server's processes and of the whole machine, from /proc: says how quiet a measurement was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Since some moment long ago; differences of two mean something."""

    server: float
    client: float   # this process
    machine: float  # everything, these two included

    @classmethod
    def now(cls, server_pid: int) -> CpuSeconds:
        """As the kernel counts them. A process that ended takes its seconds along with it."""
        own = os.times()
        return cls(
            server=sum(_seconds_of(pid) for pid in process_tree(server_pid)),
            client=own.user + own.system,
            machine=_machine_seconds(),
        )


def process_tree(root: int) -> set[int]:
    """The process, its session and all their descendants: ranks may have made sessions of their own."""
    children: dict[int, list[int]] = {}
    found: list[int] = [root]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            if int(fields[3]) == root:
                found.append(int(entry.name))
    tree: set[int] = set()
    while found:
        pid = found.pop()
        if pid not in tree:
            tree.add(pid)
            found += children.get(pid, [])
    return tree


def _seconds_of(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold spaces; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _machine_seconds() -> float:
    # user nice system idle iowait irq softirq steal; guests are within user
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS_PER_S
