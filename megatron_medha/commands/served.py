"""A server that lives as long as one bench run: `medha serve` as a process of its own, on a free port."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_medha.core.errors import ConfigError, MedhaError

LOG, OPTIONS = "server.log", "server.yaml"
_READY_S = 600.0   # a big checkpoint takes minutes to load
_POLL_S = 0.1
_STOP_S = 30.0
_TAIL_LINES = 5


class ServerError(MedhaError):
    """The server of a run did not come up."""


@contextmanager
def served(words: str, directory: Path) -> Iterator[str]:
    """The URL of a server with these words of `medha serve`, ready to answer; it is gone when the block ends.

    Leaves its composed options and its log in `directory`. Raises ConfigError if the words do not compose, and
    ServerError, with the last lines of its log, if it ends before it is ready.
    """
    overrides = shlex.split(words)
    if any(word.startswith(("server.port=", "server.host=", "-")) for word in overrides):
        raise ConfigError(f"serve={words}: give options of medha serve without flags, address and port")
    (directory / OPTIONS).write_text(_composed(overrides), encoding="utf-8")
    port = _free_port()
    command = [sys.executable, "-m", "megatron_medha", "serve", *overrides, "server.host=127.0.0.1",
               f"server.port={port}"]  # fmt: skip
    with (directory / LOG).open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        print(f"starting medha serve {words}")
        _wait_until_ready(process, url, directory / LOG)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _composed(overrides: list[str]) -> str:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from omegaconf import OmegaConf

    from megatron_medha.commands.serve_parts import public_options
    from megatron_medha.compose import compose, freeze
    from megatron_medha.config import ServeOptions

    # The job of a sweep runs inside of Hydra, which allows one composition at a time.
    outer = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        options = freeze(compose("serve", ServeOptions, overrides), ServeOptions)
    finally:
        Singleton.set_state(outer)
    return OmegaConf.to_yaml(OmegaConf.create(public_options(options)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    while not _is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
            what = f"was not ready within {_READY_S:.0f} s" if process.poll() is None else \
                f"ended with code {process.returncode}"
            raise ServerError(f"the server of this run {what}; {log} ends with:\n{tail}")
        time.sleep(_POLL_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5.0):
            return True
    except (urllib.error.URLError, OSError):
        return False
