"""A server that lives as long as one run: `medha serve` as a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.system.libc import set_pdeathsig
from megatron_medha.system.secret_values import hide_secrets

LOG, OPTIONS = "server.log", "server.yaml"
_READY_S = 600.0   # a big checkpoint takes minutes to load
_POLL_S = 0.1
_LISTENING = re.compile(r"^listening on (\S+)", re.MULTILINE)  # what `medha serve` prints
_LOADING = re.compile(r"^loading: .*(?=\n)", re.MULTILINE)   # whole lines; a big checkpoint takes minutes
_READY = re.compile(r"^ready after ", re.MULTILINE)
_STOP_S = 30.0
_TAIL_LINES = 5


class ServerError(MedhaError):
    """The server of a run did not come up."""


@contextmanager
def served(words: str, directory: Path) -> Iterator[str]:
    """The URL of a server with these words of `medha serve`, ready to answer; it is gone when the block ends.

    Leaves its composed options and its log in `directory`. Raises ConfigError if the words do not compose, and
    ServerError as server_process() does.
    """
    overrides = shlex.split(words)
    if any(word.startswith(("server.port=", "server.host=", "-")) for word in overrides):
        shown = hide_secrets(words, overrides)
        raise ConfigError(f"serve={shown}: give options of medha serve without flags, address and port")
    (directory / OPTIONS).write_text(_composed(overrides), encoding="utf-8")
    print(f"starting medha serve {hide_secrets(words, overrides)}")
    with server_process([*overrides, "server.host=127.0.0.1"], directory / LOG) as url:
        yield url


@contextmanager
def server_process(overrides: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a `medha serve` with these overrides on a free port, ready to answer; gone when the block ends.

    It ends with this process, too, however that ends. Raises ServerError, with the last lines of its log, if it ends
    before it is ready.
    """
    command = [sys.executable, "-m", "megatron_medha", "serve", *overrides, "server.port=0"]
    # A session of its own: Ctrl-C is ours, and the server ends when we say.
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True,
            preexec_fn=partial(set_pdeathsig, os.getpid()),
        )  # fmt: skip
    try:
        yield _wait_until_ready(process, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _composed(overrides: list[str]) -> str:
    from megatron_medha.cli.parts.serve_parts import public_options
    from megatron_medha.options.compose import compose, freeze
    from megatron_medha.options.serve_options import ServeOptions
    from megatron_medha.options.yaml_text import to_yaml

    return to_yaml(public_options(freeze(compose("serve", ServeOptions, overrides), ServeOptions)))


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + _READY_S
    num_told = 0
    while True:
        has_ended, is_late = process.poll() is not None, time.monotonic() > deadline_s
        said = log.read_text(encoding="utf-8", errors="replace")
        progress = _LOADING.findall(said)
        for line in progress[num_told:]:
            print(line, file=sys.stderr)
        num_told = len(progress)
        url = _LISTENING.search(said)
        if url is not None and _READY.search(said) is not None:
            return url.group(1)
        if has_ended or is_late:
            tail = "\n".join(said.splitlines()[-_TAIL_LINES:])
            what = f"ended with code {process.returncode}" if has_ended else f"was not ready within {_READY_S:.0f} s"
            raise ServerError(f"the server of this run {what}; {log} ends with:\n{tail}")
        time.sleep(_POLL_S)
