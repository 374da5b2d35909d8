"""Watches the process that computes the cases of a GPU check, and begins another where that one is lost. No torch here.

The process says what it does on a pipe, a JSON line each: the machine, the case it begins and how long that may take,
facts, and a case's rows once they are there.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpu.results import Case, Results

START_S = 150.0  # for imports and the first touch of the device
_MAX_LOST_STARTS = 2  # processes in a row that end before they have begun a case


def run(
    command: Sequence[str], parts: Sequence[str], results: Results, *, deadline_s: float, cwd: Path, started_s: float
) -> int:
    """Run all cases of the parts that have no result yet; how many have failed.

    command: what starts the process; it reads parts, cases to leave out, facts and seconds from its standard input.
    """
    num_lost_starts = 0
    tried: set[Case] = set(results.done)
    failed: set[Case] = set()
    while num_lost_starts < _MAX_LOST_STARTS:
        ended = _watched(command, parts, results, sorted(tried), deadline_s, cwd, started_s)
        tried |= ended.cases
        failed |= ended.failed
        if ended.is_over:
            return len(failed)
        num_lost_starts = 0 if ended.cases else num_lost_starts + 1
        if time.monotonic() > deadline_s:
            print("--- no time left; the same command goes on from here", flush=True)
            return len(failed)
    print("--- the process does not get as far as its first case: given up", flush=True)
    return len(failed) + 1


class _Ended:
    """What one process has got done."""

    def __init__(self) -> None:
        self.cases: set[Case] = set()
        self.failed: set[Case] = set()
        self.is_over = False  # nothing is left


def _watched(
    command: Sequence[str],
    parts: Sequence[str],
    results: Results,
    leave_out: Sequence[Case],
    deadline_s: float,
    cwd: Path,
    started_s: float,
) -> _Ended:
    ended = _Ended()
    reading, writing = os.pipe()
    told = {
        "parts": list(parts), "leave_out": list(leave_out), "facts": results.facts,
        "seconds": deadline_s - time.monotonic(), "pipe": writing,
    }  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writing], cwd=cwd, text=True) as process:
        os.close(writing)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(told))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already; the pipe says the rest
        current: Case | None = None
        limit_s = min(START_S, max(deadline_s - time.monotonic(), 0.0))
        lost = ""
        lines = _Lines(reading)
        while True:
            text = lines.next(limit_s)
            if text is None:
                lost = f"took longer than {limit_s:.0f} s"
                process.kill()
                break
            if not text:
                break
            message: dict[str, Any] = json.loads(text)
            if "machine" in message:
                results.begin(message["machine"])
            elif "begin" in message:
                current = (message["part"], message["begin"])
                limit_s = message["limit_s"]
                print(f"--- {current[0]}: {current[1]} ({time.monotonic() - started_s:.0f} s)", flush=True)
            elif "over" in message:
                ended.is_over = True
            else:
                results.take(message)
                if "case" in message:
                    case = (message["part"], message["case"])
                    ended.cases.add(case)
                    if message["error"] is not None:
                        ended.failed.add(case)
                    current, limit_s = None, START_S
    os.close(reading)
    if current is not None:
        why = lost or f"the process ended, exit code {process.returncode}"
        print(f"{current[1]}: {why}", flush=True)
        results.take({"part": current[0], "case": current[1], "rows": [], "error": why})
        ended.cases.add(current)
        ended.failed.add(current)
    return ended


class _Lines:
    """Lines of a pipe, each waited for as long as the caller says."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._rest = pipe, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def next(self, limit_s: float) -> str | None:
        """The next line; "" where there will be none; None where none has come in time."""
        end_s = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            if not self._selector.select(max(end_s - time.monotonic(), 0.0)):
                return None
            more = os.read(self._pipe, 1 << 16)
            if not more:
                return ""
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()
