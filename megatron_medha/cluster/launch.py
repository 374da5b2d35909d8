"""The ranks of one replica as processes on this machine: started together, watched, and ended for certain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import zmq

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_link import Context, RankLink
from megatron_medha.system.secret_values import child_environment

WORKER_COMMAND = (sys.executable, "-m", "megatron_medha.worker.main")


class RankExit(NamedTuple):
    """A rank's process has ended."""

    rank: int
    code: int  # negative: the signal that ended it

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it; otherwise it said why, or its peers will."""
        return self.code < 0

    def __str__(self) -> str:
        if not self.was_killed:
            return f"rank {self.rank} ended with exit code {self.code}"
        try:
            return f"rank {self.rank} was ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"rank {self.rank} was ended by signal {-self.code}"


class Ranks(Protocol):
    """The ranks of one replica, here or elsewhere."""

    sockets: Sequence[zmq.Socket[bytes]] = ()  # others to wait for: poll() is due when one of them is readable
    _link: RankLink | None = None

    @property
    def link(self) -> RankLink:
        """To the ranks started last."""
        assert self._link is not None, "no rank has been started"
        return self._link

    def start(self) -> None:
        """Bring all ranks up, on a link of their own."""

    def missing(self) -> str | None:
        """What start() still waits for, in words; None once every process has been started. Raises RankError."""
        return None

    def poll(self) -> None:
        """Take note of what happened to the processes."""
        return

    def exits(self) -> list[RankExit]:
        """The processes that have ended by themselves."""

    def end(self, patience_s: float) -> None:
        """End every process: give it that long to end by itself, then kill it. Returns when none is left."""

    def close(self) -> None:
        """Give the sockets back."""


@dataclass(slots=True)
class RankProcess:
    """One rank's process; it dies with us, whatever happens to us (worker/main.py asks the kernel for that)."""

    rank: int
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls, config: RankConfig, command: Sequence[str] = WORKER_COMMAND, environment: Mapping[str, str] | None = None
    ) -> RankProcess:
        """Start the command with the configuration as its last argument.

        environment: None: ours without what looks like a secret.
        """
        argument = msgspec.json.encode(config).decode()
        # A session of its own, so that Ctrl-C at the terminal reaches only the API server, which ends the ranks.
        process = subprocess.Popen(
            [*command, argument],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment() if environment is None else environment,
        )
        return cls(config.rank, process)

    @property
    def exit_code(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self.process.poll()

    def kill(self) -> None:
        """Send it, and whatever it started, the signal no process can refuse; stopped ones take it too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


class LocalRanks(Ranks):
    """Ranks that we start ourselves."""

    def __init__(
        self,
        configs: Sequence[RankConfig],
        context: Context,
        directory: Path,
        *,
        first_local_rank: int = 0,
        command: Sequence[str] = WORKER_COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """configs: of each rank; addresses are filled in here. directory: ours alone, for sockets.

        first_local_rank: how many ranks of other replicas come before ours on this machine.
        environment: of the processes; None: ours without what looks like a secret.
        """
        self._configs = configs
        self._context = context
        self._directory = directory
        self._first_local_rank = first_local_rank
        self._command = command
        self._environment = child_environment() if environment is None else environment
        self._processes: list[RankProcess] = []
        self._num_starts = 0

    def start(self) -> None:
        """See Ranks."""
        assert not self._processes, "ranks are still there"
        self.close()
        self._num_starts += 1
        self._link = RankLink(self._context, f"ipc://{self._directory}/front-{self._num_starts}", len(self._configs))
        meeting = f"file://{self._directory}/meeting-{self._num_starts}" if len(self._configs) > 1 else None
        for config in self._configs:
            environment = {
                **self._environment,
                "LOCAL_RANK": str(self._first_local_rank + config.rank),  # as torchrun says which device is whose
                **loopback_environment(),
            }
            config = msgspec.structs.replace(
                config, server_endpoint=self._link.endpoint, link_token=self._link.token, init_method=meeting
            )
            self._processes.append(RankProcess.start(config, self._command, environment))

    def exits(self) -> list[RankExit]:
        """See Ranks."""
        return [
            RankExit(process.rank, code) for process in self._processes if (code := process.exit_code) is not None
        ]

    def end(self, patience_s: float) -> None:
        """See Ranks."""
        deadline_s = time.monotonic() + patience_s
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.process.wait(max(0.0, deadline_s - time.monotonic()))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.process.wait()
        self._processes.clear()

    def close(self) -> None:
        """See Ranks."""
        if self._link is not None:
            self._link.close()
            self._link = None


def loopback_environment() -> dict[str, str]:
    """Lets gloo connect the ranks of one machine over its loopback; by itself it asks what the host's name means."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    names = {name for _, name in socket.if_nameindex()}
    return next(({"GLOO_SOCKET_IFNAME": name} for name in ("lo", "lo0") if name in names), {})
