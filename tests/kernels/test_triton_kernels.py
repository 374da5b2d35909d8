"""The Triton kernels where there is no GPU: interpreted in a process of their own, as Triton wants it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton==3.6.0; 640 MB)")


def test_the_triton_kernels_agree_with_plain_attention() -> None:
    cases = [str(Path(__file__).with_name(f"{name}_cases.py")) for name in ("triton", "flash3")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=5", *cases],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
