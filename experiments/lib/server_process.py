"""A server as a process of an experiment: started, waited for, ended for certain with all its descendants."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.process_stats import process_tree


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
    ready_after_s: float


@contextmanager
def started(
    command: Sequence[str], port: int, *, ready_path: str = "/ready", environment: Mapping[str, str] | None = None,
    log: Path | None = None, directory: Path | None = None, timeout_s: float = 300.0,
) -> Iterator[Server]:  # fmt: skip
    """A server of any kind, once it is ready; it is gone when the block ends.

    log: for what it prints; without one, errors and warnings stay visible. directory: it runs in.
    """
    output = subprocess.DEVNULL if log is None else log.open("wb")
    began_s = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, cwd=directory, start_new_session=True, stdout=output,
        stderr=None if log is None else subprocess.STDOUT,
    )  # fmt: skip
    try:
        while not answers(f"http://127.0.0.1:{port}{ready_path}"):
            if process.poll() is not None or time.monotonic() - began_s > timeout_s:
                tail = "" if log is None else "\n" + log.read_text(errors="replace")[-2000:]
                how = "was not ready in time" if process.returncode is None else f"ended with {process.returncode}"
                raise SystemExit(f"the server {how}: {' '.join(command)}{tail}")
            time.sleep(0.1)
        yield Server(port, process, time.monotonic() - began_s)
    finally:
        tree = process_tree(process.pid)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in tree - {process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def serving_process(
    *overrides: str, timeout_s: float = 300.0, core: int | None = None, checkout: Path | None = None
) -> Iterator[Server]:
    """`medha serve` with these overrides.

    core: the only one it may run on. checkout: another working copy, with an environment of its own, to compare with.
    """
    port = free_port()
    pin = [] if core is None else ["taskset", "--cpu-list", str(core)]
    python = sys.executable if checkout is None else str(checkout / ".venv" / "bin" / "python")
    command = [*pin, python, "-m", "megatron_medha", "serve", f"server.port={port}", *overrides]
    with started(command, port, directory=checkout, timeout_s=timeout_s) as server:
        yield server


@contextmanager
def serving(*overrides: str, timeout_s: float = 300.0) -> Iterator[int]:
    """As serving_process(), the port alone."""
    with serving_process(*overrides, timeout_s=timeout_s) as server:
        yield server.port


def vocab_size(port: int) -> int:
    """Token ids below this are valid, as far as the model's own listing says; 256 if it does not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
        return int(json.load(response)["data"][0].get("vocab_size", 256))


def answers(url: str) -> bool:
    """Whether it does, with success."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
