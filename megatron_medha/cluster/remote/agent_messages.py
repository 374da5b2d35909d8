"""Messages between the API server and the agents: state, not commands, so that a lost message costs only a second.

An agent (cluster/remote/agent.py) looks after one rank on a machine the API server cannot start processes on.
"""

from __future__ import annotations

import msgspec

from megatron_medha.cluster.rank_config import RankConfig


class AgentState(msgspec.Struct, frozen=True, array_like=True, tag="agent_state"):
    """Agent to API server, every second and at every change."""

    rank: int                      # over all replicas, as the launcher counts
    address: str                   # of its machine, as seen on the way to the API server
    free_port: int                 # there; for ranks to meet at
    running: int | None            # which start its rank's process belongs to
    ended: tuple[int, int] | None  # start and exit code of a process that ended by itself
    version: str = ""              # protocol_version() of its machine; agents of 0.1.0 at first had none


class DesiredState(msgspec.Struct, frozen=True, array_like=True, tag="want"):
    """API server to agent, every second and at every change: the rank that should run now."""

    start: int
    config: RankConfig | None  # None: no process
    version: str = ""          # protocol_version() of the API server's machine


class Redirect(msgspec.Struct, frozen=True, array_like=True, tag="redirect"):
    """API server to agent: its replica listens that many ports higher."""

    port_offset: int


class AgentShutdown(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """API server to agent: end your process, and yourself."""

    why: str
    is_error: bool


ToAgent = DesiredState | Redirect | AgentShutdown
