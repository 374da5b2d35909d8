"""Ranks on other machines: a launcher (deepspeed, torchrun, srun) starts an agent for each; the agents come to us."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import zmq

from megatron_medha.cluster.curve_keys import CurveKeys
from megatron_medha.cluster.launch import RankExit, Ranks
from megatron_medha.cluster.launch_config import LaunchConfig, split_address
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_engine import OpenRanks
from megatron_medha.cluster.rank_link import Context, RankLink, router_socket
from megatron_medha.cluster.remote.agent_messages import AgentShutdown, AgentState, DesiredState, Redirect, ToAgent
from megatron_medha.cluster.wire import RejectedPeers, UnreadableMessage, protocol_version, read_message
from megatron_medha.core.errors import RankError

_log = logging.getLogger(__name__)

_DESIRED_STATE_INTERVAL_S = 1.0
_AGENT_TIMEOUT_S = 5.0  # an agent that has been silent that long is not there
_END_TIMEOUT_S = 5.0    # an agent that has not ended its process by then has lost its machine, or us
_SHUTDOWN_LINGER_MS = 1000
_MAX_MESSAGE_BYTES = 2**16   # of an agent, which says a few numbers
_MAX_MESSAGES_WAITING = 64   # of one agent
_MAX_MESSAGES_AT_ONCE = 1000  # read before anything else has its turn


@dataclass(slots=True)
class _AttachedAgent:
    """An agent that looks after a rank of ours, by the name of its connection."""

    peer: bytes
    state: AgentState
    heard_s: float
    rival: bytes | None = None  # another that says it is this rank ...
    rival_since_s: float = 0.0  # ... since then

    def is_alive(self) -> bool:
        return time.monotonic() - self.heard_s < _AGENT_TIMEOUT_S


def attached_ranks(launch: LaunchConfig, replica: int = 0, num_replicas: int = 1) -> OpenRanks:
    """Ranks that a launcher starts; launch.kind is ATTACH."""
    assert launch.address is not None and launch.key_file is not None
    host, port = split_address("launch.address", launch.address)
    keys = CurveKeys.load_or_make(launch.key_file)

    @contextmanager
    def open_ranks(configs: Sequence[RankConfig]) -> Iterator[Ranks]:
        with zmq.Context() as context:
            guard = keys.guard(context)
            try:
                yield AttachedRanks(
                    configs,
                    context,
                    keys,
                    host=host,
                    port=port + replica,
                    replica=replica,
                    num_replicas=num_replicas,
                    timeout_s=launch.attach_timeout_s,
                )
            finally:
                guard.stop()

    return open_ranks


class AttachedRanks(Ranks):
    """The ranks of one replica, each looked after by an agent."""

    def __init__(
        self,
        configs: Sequence[RankConfig],
        context: Context,
        keys: CurveKeys,
        *,
        host: str,
        port: int,
        replica: int,
        num_replicas: int,
        timeout_s: float,
    ) -> None:
        """Listens at once, on host and port. Raises RankError if that cannot be."""
        self._configs = configs
        self._context = context
        self._keys = keys
        self._host = host
        self._replica = replica
        self._num_replicas = num_replicas
        self._timeout_s = timeout_s
        self._address = f"tcp://{host}:{port}"
        self._agents = router_socket(
            context, self._address, keys, max_message_bytes=_MAX_MESSAGE_BYTES, queue_length=_MAX_MESSAGES_WAITING
        )
        self._attached: dict[int, _AttachedAgent] = {}  # by rank within the replica
        self._refused = RejectedPeers("agents")
        self._decoder = msgspec.msgpack.Decoder(AgentState)
        self._encoder = msgspec.msgpack.Encoder()
        self.sockets = (self._agents,)
        self._start = 0
        self._start_s = 0.0
        self._desired: list[RankConfig] | None = None
        self._sent_s = 0.0

    def start(self) -> None:
        """See Ranks."""
        assert self._desired is None, "ranks are still there"
        if self._link is not None:
            self._link.close()
        # Any port: agents learn which.
        self._link = RankLink(self._context, f"tcp://{self._host}:*", len(self._configs), self._keys)
        self._start += 1
        self._start_s = time.monotonic()

    def missing(self) -> str | None:
        """See Ranks."""
        absent = [rank for rank in range(len(self._configs)) if not self._is_attached(rank)]
        if absent:
            first = self._replica * len(self._configs)
            names = ", ".join(str(first + rank) for rank in absent)
            # Once it has started its rank, an agent that is gone is a failure like any other.
            if self._desired is not None or time.monotonic() - self._start_s > self._timeout_s:
                raise RankError(f"nothing heard of the agents of ranks {names} at {self._address}")
            return f"waiting for ranks {names} to attach to {self._address}"
        if self._desired is None:
            self._desired = self._rank_configs()
            self._send_desired(is_due=True)
        if all(agent.state.running == self._start or self._ended(rank) for rank, agent in self._attached.items()):
            return None
        return "starting processes"

    def poll(self) -> None:
        """See Ranks: hear the agents, and tell them what should be."""
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            if not self._receive():
                break
        self._send_desired(is_due=time.monotonic() - self._sent_s >= _DESIRED_STATE_INTERVAL_S)

    def exits(self) -> list[RankExit]:
        """See Ranks."""
        return [RankExit(rank, code) for rank in sorted(self._attached) if (code := self._ended(rank)) is not None]

    def end(self, patience_s: float) -> None:
        """See Ranks. An agent that does not answer has to attach again; it ends its process when it hears nothing."""
        deadline_s = time.monotonic() + patience_s
        while patience_s and self._running() and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)
        self._desired = None
        self._send_desired(is_due=True)
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while self._running() and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)
        for rank in self._running():
            self._drop(rank)

    def close(self) -> None:
        """See Ranks; the agents end too."""
        for agent in self._attached.values():
            self._reply(agent.peer, AgentShutdown("the server has ended", is_error=False))
        if self._link is not None:
            self._link.close()
        self._agents.close(linger=_SHUTDOWN_LINGER_MS)

    def _rank_configs(self) -> list[RankConfig]:
        """What each rank is to be, and where they meet: on the machine of the first."""
        first = self._attached[0].state
        meeting = f"tcp://{first.address}:{first.free_port}" if len(self._configs) > 1 else None
        # The agents know the way to us better than we do.
        port = self.link.endpoint.rpartition(":")[2]
        return [
            msgspec.structs.replace(
                config, server_endpoint=f"tcp://*:{port}", link_token=self.link.token, init_method=meeting
            )
            for config in self._configs
        ]

    def _is_attached(self, rank: int) -> bool:
        return rank in self._attached and self._attached[rank].is_alive()

    def _running(self) -> list[int]:
        return [rank for rank, agent in self._attached.items() if agent.state.running is not None]

    def _ended(self, rank: int) -> int | None:
        ended = self._attached[rank].state.ended
        return ended[1] if ended is not None and ended[0] == self._start else None

    def _send_desired(self, *, is_due: bool) -> None:
        if not is_due:
            return
        self._sent_s = time.monotonic()
        for rank, agent in list(self._attached.items()):
            want = DesiredState(self._start, None if self._desired is None else self._desired[rank], protocol_version())
            if not self._reply(agent.peer, want):
                self._drop(rank)

    def _drop(self, rank: int) -> None:
        """Its rank ends with the agent, or when the agent hears nothing from us; to take part it attaches again."""
        _log.warning("agent_lost rank=%d", self._replica * len(self._configs) + rank)
        del self._attached[rank]

    def _reply(self, peer: bytes, message: ToAgent) -> bool:
        """Whether the agent's connection is still there."""
        try:
            self._agents.send_multipart((peer, self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _wait(self, timeout_s: float) -> None:
        self._agents.poll(int(min(timeout_s, _DESIRED_STATE_INTERVAL_S) * 1000) + 1)
        self.poll()

    def _receive(self) -> bool:
        """Take one message up; False if there is none. One that cannot be read ends its peer's try."""
        try:
            peer, *frames = self._agents.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            state = self._checked(read_message(self._decoder, frames))
        except UnreadableMessage as error:
            self._refuse(peer, f"this server, version {protocol_version()}, refuses this agent: {error}")
            return True
        replica, rank = divmod(state.rank, len(self._configs))
        if replica != self._replica:
            self._reply(peer, Redirect(replica - self._replica))
        else:
            self._note_agent(rank, peer, state)
        return True

    def _checked(self, state: AgentState) -> AgentState:
        num_ranks = self._num_replicas * len(self._configs)
        if state.version != protocol_version():
            raise UnreadableMessage(f"it is of version {state.version or 'unknown'}; install the same on both machines")
        if state.rank >= num_ranks:
            raise UnreadableMessage(f"rank {state.rank} is one too many: the server has {num_ranks}")
        if state.rank < 0:
            raise UnreadableMessage(f"there is no rank {state.rank}")
        try:
            ipaddress.ip_address(state.address)
        except ValueError as error:
            raise UnreadableMessage(f"its own address: {error}") from None
        if not 0 < state.free_port < 65536:
            raise UnreadableMessage(f"there is no port {state.free_port}")
        return state

    def _note_agent(self, rank: int, peer: bytes, state: AgentState) -> None:
        now_s = time.monotonic()
        agent = self._attached.get(rank)
        if agent is None or (agent.peer != peer and not agent.is_alive()):
            _log.info("rank_attached rank=%d address=%s", state.rank, state.address)
            self._attached[rank] = _AttachedAgent(peer, state, now_s)
        elif agent.peer == peer:
            agent.state, agent.heard_s = state, now_s
        elif agent.rival != peer:
            # After a fault of its machine the old agent may seem to be there for a while; so the new one waits.
            agent.rival, agent.rival_since_s = peer, now_s
        elif now_s - agent.rival_since_s > _AGENT_TIMEOUT_S:
            agent.rival = None
            self._refuse(peer, f"rank {state.rank} is attached already, from {agent.state.address}")

    def _refuse(self, peer: bytes, why: str) -> None:
        self._refused.refuse(peer, why)
        self._reply(peer, AgentShutdown(why, is_error=True))
