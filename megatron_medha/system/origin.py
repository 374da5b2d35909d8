"""Where a result comes from: the commit of this package and the machine. No clock."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from megatron_medha.system.machine import num_usable_cores


@functools.cache
def source_commit() -> str | None:
    """The commit of the checkout that this package lies in, with -dirty if files differ; None if it lies in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def machine_facts() -> dict[str, Any]:
    """The machine, as far as it changes how long something takes."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {
        "cpu": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "num_cores": num_usable_cores(),
        "platform": platform.platform(),
    }
