"""`medha bench` on a server of its own, as a process of an experiment: what its clients saw and what the server did."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.lib.served_log import ServedLog


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A run that has ended."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # of requests, in order of their ends
    log: ServedLog


def bench_sessions(checkpoint: Path, server_words: Sequence[str], bench_words: Sequence[str]) -> BenchRun:
    """Sessions that are played once; words are options of medha serve and medha bench."""
    with tempfile.TemporaryDirectory() as directory:
        log, run = Path(directory) / "decisions.jsonl", Path(directory) / "run"
        server = " ".join([f"checkpoint={checkpoint.resolve()}", f"tracking.decision_log={log}", *server_words])
        command = [
            sys.executable, "-m", "megatron_medha", "bench", f"serve={server!r}", "workload=sessions", *bench_words,
            "idle=skip", "slo.ttft_s=1", "plots=never", f"out={run}",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            server_log = run / "server.log"
            tail = server_log.read_text(errors="replace")[-2000:] if server_log.is_file() else ""
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{tail}")
        rows = [json.loads(line) for line in (run / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
        return BenchRun(json.loads((run / "summary.json").read_text(encoding="utf-8")), rows, ServedLog.read(log))
