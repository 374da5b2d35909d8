"""How the ranks come into being."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_medha.core.errors import ConfigError, check_range

_ADDRESS = re.compile(r"tcp://(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


class LaunchKind(Enum):
    """Who starts the ranks."""

    LOCAL = "local"    # the API server, on its own machine
    ATTACH = "attach"  # a launcher of several machines (deepspeed, torchrun, srun); they come to the API server


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Who starts the ranks, and how those that others start find the API server."""

    kind: LaunchKind = LaunchKind.LOCAL
    address: str | None = None       # tcp://HOST:PORT the API server listens on; replica i has PORT + i
    key_file: Path | None = None     # keys of the encrypted connections; written where it is not there
    attach_timeout_s: float = 600.0  # how long to wait for ranks to attach, at the start and after a fault

    def __post_init__(self) -> None:
        check_range("launch.attach_timeout_s", self.attach_timeout_s, 1.0, 1e6)
        if self.kind is LaunchKind.LOCAL:
            for key in ("address", "key_file"):
                if (value := getattr(self, key)) is not None:
                    raise ConfigError(f"launch.{key}={value}: ranks of this machine need none; use launch=attach")
            return
        if self.address is None:
            raise ConfigError("launch.address=null: ranks that attach need one; give tcp://HOST:PORT")
        split_address("launch.address", self.address)
        if self.key_file is None:
            raise ConfigError("launch.key_file=null: connections between machines are encrypted; name a file")


def split_address(key: str, address: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT. Raises ConfigError naming `key`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"{key}={address}: must be tcp://HOST:PORT")
    return match["host"], int(match["port"])
