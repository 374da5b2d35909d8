"""Starting ranks on this machine as processes, and ending them for certain."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import msgspec

from megatron_medha.cluster.rank_config import RankConfig


@dataclass(slots=True)
class RankProcess:
    """One rank's process; it dies with us, whatever happens to us (worker/main.py asks the kernel for that)."""

    rank: int
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, config: RankConfig) -> RankProcess:
        """Start `python -m megatron_medha.worker.main` with its configuration as the one argument."""
        argument = msgspec.json.encode(config).decode()
        # A session of its own, so that Ctrl-C at the terminal reaches the front alone, which ends the ranks in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_medha.worker.main", argument],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return cls(config.rank, process)

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        return self.process.poll()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, waiting at most that long."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
