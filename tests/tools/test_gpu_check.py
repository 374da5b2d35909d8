"""The script for GPU machines, rehearsed on a CPU: every part runs to its end and the results are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton==3.6.0; 640 MB)")
SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_every_part_runs_in_a_rehearsal_and_leaves_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = run("--device", "cpu", "--tiny", "--minutes", "30", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["is_rehearsal"]
    assert list(results["parts"]) == [
        "rates", "correctness", "same_as_cpu", "attention", "decode", "linear", "tpot", "prefill", "convoy", "million"
    ]  # fmt: skip
    for name, part in results["parts"].items():
        assert part["error"] is None, name
        assert part["rows"], name
    for row in (*results["parts"]["correctness"]["rows"], *results["parts"]["same_as_cpu"]["rows"]):
        assert row["verdict"] != "MISSED", row


def test_a_part_nobody_knows_is_refused_with_the_list() -> None:
    done = run("--device", "cpu", "--tiny", "--part", "attentoin")
    assert done.returncode == 2
    assert "no part attentoin; known: rates, correctness" in done.stderr
