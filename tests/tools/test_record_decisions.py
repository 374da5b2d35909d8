"""The script that records decisions says how it is called, and takes no flag for a directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_help_writes_no_logs() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tools.record_decisions", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m tools.record_decisions tests/stats/recorded" in done.stdout
    assert not (ROOT / "--help").exists()
