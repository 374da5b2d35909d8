"""The script for GPU machines, rehearsed on a CPU: every part runs to its end and the results are kept."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

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
        "rates", "correctness", "same_as_cpu", "attention", "decode", "linear", "tpot", "prefill", "convoy", "million",
        "profile",
    ]  # fmt: skip
    for name, part in results["parts"].items():
        assert part["error"] is None, name
        assert part["rows"], name
    for row in (*results["parts"]["correctness"]["rows"], *results["parts"]["same_as_cpu"]["rows"]):
        assert row["verdict"] != "MISSED", row


def test_after_a_part_that_breaks_the_device_the_rest_runs_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec.loader.exec_module(gpu_check)
    begun: list[list[str]] = []

    def begin(program: str, words: list[str]) -> None:
        begun.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", begin)

    class LostDevice:
        rows: ClassVar[list[object]] = []
        facts: ClassVar[dict[str, float]] = {"copy_bytes_per_s": 4e12}
        deadline_s = time.monotonic() + 300

        def has_time(self, seconds: float) -> bool:
            return True

        def device_answers(self) -> bool:
            return False

    def breaks(check: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    out = tmp_path / "check.json"
    parts = [("attention", breaks), ("decode", breaks), ("linear", breaks)]
    with pytest.raises(SystemExit):
        gpu_check.run_parts(parts, LostDevice(), {"parts": {}}, out, 1)
    assert "illegal memory access" in json.loads(out.read_text())["parts"]["attention"]["error"]
    (words,) = begun
    assert words[words.index("--part") + 1] == "decode,linear"
    assert words[words.index("--also-failed") + 1] == "2"
    assert float(words[words.index("--minutes") + 1]) <= 5.0


def test_a_part_nobody_knows_is_refused_with_the_list() -> None:
    done = run("--device", "cpu", "--tiny", "--part", "attentoin")
    assert done.returncode == 2
    assert "no part attentoin; known: rates, correctness" in done.stderr
