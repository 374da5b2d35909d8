"""Processes that this one has started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def child_processes() -> dict[int, list[bytes]]:
    """The command line of each, by process id."""
    numbers: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            numbers += (task / "children").read_text().split()
    found = {}
    for number in numbers:
        with suppress(FileNotFoundError, ProcessLookupError):  # likewise a process
            found[int(number)] = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    return found
