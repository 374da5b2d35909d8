"""A checkpoint whose reader needs torch, checked by a process of its own while the server is put together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import msgspec

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.system.secret_values import child_environment

_COMMAND = (sys.executable, "-m", "megatron_medha.worker.startup.checkpoint_check")


def begin_check(config: RankConfig) -> Callable[[], None]:
    """Start checking what `medha serve --check` does.

    What is returned waits for the result and raises ConfigError with the reasons if the ranks would refuse to load
    it. A check that itself breaks refuses nothing: the ranks will tell.
    """
    process = subprocess.Popen(
        [*_COMMAND, msgspec.json.encode(config).decode(), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )

    def wait() -> None:
        with process:
            try:
                reasons, _ = process.communicate()
            except BaseException:  # Ctrl-C: leaving this block would wait for torch
                process.kill()
                raise
        if process.returncode == 2 and reasons:
            raise ConfigError(reasons.strip())

    return wait
