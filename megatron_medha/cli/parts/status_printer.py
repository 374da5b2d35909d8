"""The lines that `medha serve` prints: listening, loading, ready, recovering; and the end if the engine fails."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_medha.core.ports import EnginePhase
from megatron_medha.system.libc import TRIM_INTERVAL_S, malloc_trim

_PROGRESS_INTERVAL_S = 5.0
# What to try, by route. Not greedy: a small model would write nothing but spaces.
_CHAT = ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}')
_COMPLETION = ("/v1/completions", '{"prompt": "def main():", "max_tokens": 100, "temperature": 0.7, "seed": 1}')


class StatusPrinter:
    """Prints when the server listens and when the model is ready, and ends the process if the engine fails."""

    def __init__(self, service: Any, needs_key: bool) -> None:
        self.failure: str | None = None
        self.has_listened = False
        self._service = service
        self._needs_key = needs_key
        self._url = ""
        self._changed = threading.Event()  # the status has, or nothing more is to be printed
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self, url: str) -> None:
        """The server listens there."""
        self._url = url
        self.has_listened = True
        print_line(f"listening on {url} after {process_age_s():.2f} s; loading the model")
        self._service.on_status(self._changed.set)
        self._thread.start()

    def end(self) -> None:
        """Print nothing more."""
        self._has_ended = True
        self._changed.set()
        status = self._service.status
        if status.phase is EnginePhase.FAILED and self.failure is None:
            self.failure = status.detail

    def _run(self) -> None:
        is_ready, lost_s, due_s = False, None, time.monotonic() + _PROGRESS_INTERVAL_S
        while not self._has_ended:
            status = self._service.status
            match status.phase:
                case EnginePhase.FAILED:
                    return self._fail(status.detail)
                case EnginePhase.STOPPED:
                    return None
                case EnginePhase.READY if not is_ready:
                    is_ready, due_s = True, time.monotonic() + TRIM_INTERVAL_S
                    self._print_ready()
                case EnginePhase.RECOVERING if is_ready and lost_s is None:
                    lost_s = time.monotonic()
                    print_line(f"recovering: {status.detail}; requests wait")
                case EnginePhase.READY if lost_s is not None:
                    print_line(f"ready again after {time.monotonic() - lost_s:.1f} s")
                    lost_s = None
                case _:
                    pass
            if time.monotonic() >= due_s:
                due_s = time.monotonic() + (TRIM_INTERVAL_S if is_ready else _PROGRESS_INTERVAL_S)
                if is_ready:
                    malloc_trim()
                else:
                    share = f", {100 * status.fraction:.0f}%" if status.fraction else ""
                    print_line(f"loading: {status.detail}{share}; {process_age_s():.0f} s so far")
            self._changed.wait(max(0.0, due_s - time.monotonic()))
            self._changed.clear()
        return None

    def _fail(self, detail: str) -> None:
        # A server without an engine can answer nothing but 503: it exits, so that its supervisor starts it again.
        if not self._has_ended:
            self.failure = detail
            os.kill(os.getpid(), signal.SIGTERM)

    def _print_ready(self) -> None:
        facts = self._service.engine.facts
        num_tokens = facts.num_blocks * facts.block_size
        key = " -H \"Authorization: Bearer $MEDHA_API_KEY\"" if self._needs_key else ""
        route, body = _COMPLETION if self._service.has_no_template else _CHAT
        print_line(
            f"ready after {process_age_s():.2f} s: {facts.shape.name} on {facts.device}; "
            f"KV for {num_tokens:,} tokens, requests up to {facts.max_request_tokens:,}\n\n"
            f"  curl {self._url}{route} -H 'Content-Type: application/json'{key} \\\n"
            f"    -d '{body}'\n"
            f"  {own_command()} chat url={self._url}\n"
            f"  dashboard: {self._url}/dashboard\n"
        )


def own_command() -> str:
    """What the user types to run this program: medha, where that is found, or a path."""
    program = Path(sys.argv[0])
    if program.name != "medha":  # python -m megatron_medha, or a test
        return f"{sys.executable} -m megatron_medha"
    found = shutil.which("medha")
    if found is not None and Path(found).resolve() == program.resolve():
        return "medha"
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)


def print_line(text: str) -> None:
    """Print to stdout. Without a reader or disk space the server continues, and can still be stopped."""
    try:
        print(text, flush=True)
    except OSError:
        # Of what is left in the buffer Python would complain again at exit.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included where the system tells."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stat:
            start_ticks = int(stat.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not on Linux
        return time.perf_counter() - _IMPORTED_S


_IMPORTED_S = time.perf_counter()
