"""`medha serve` as a process of an experiment: started, waited for, stopped for certain."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    port: int
    process: subprocess.Popen[bytes]


@contextmanager
def serving(*overrides: str, timeout_s: float = 300.0) -> Iterator[int]:
    """The port of a server with these overrides, ready to answer; it is gone when the block ends."""
    with serving_process(*overrides, timeout_s=timeout_s) as server:
        yield server.port


@contextmanager
def serving_process(
    *overrides: str, timeout_s: float = 300.0, core: int | None = None, checkout: Path | None = None
) -> Iterator[Server]:
    """As serving(), with its process.

    core: the only one it may run on. checkout: another working copy, with an environment of its own, to compare with.
    """
    port = free_port()
    python = sys.executable if checkout is None else str(checkout / ".venv" / "bin" / "python")
    pin = [] if core is None else ["taskset", "--cpu-list", str(core)]
    command = [*pin, python, "-m", "megatron_medha", "serve", f"server.port={port}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=checkout)  # errors and warnings stay visible
    try:
        deadline_s = time.monotonic() + timeout_s
        while not _is_ready(port):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}: {' '.join(command)}")
            if time.monotonic() > deadline_s:
                raise SystemExit(f"the server was not ready within {timeout_s:.0f} s")
            time.sleep(0.1)
        yield Server(port, process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def vocab_size(port: int) -> int:
    """Token ids below this are valid, as far as the model's own listing says; 256 if it does not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
        return int(json.load(response)["data"][0].get("vocab_size", 256))


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
