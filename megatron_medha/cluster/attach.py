"""Ranks on other machines: a launcher (deepspeed, torchrun, srun) starts an agent for each; the agents come to us."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import zmq

from megatron_medha.cluster.agent_messages import AgentState, Leave, Redirect, ToAgent, Want
from megatron_medha.cluster.engine import OpenRanks
from megatron_medha.cluster.keys import Keys
from megatron_medha.cluster.launch import Exit, Ranks
from megatron_medha.cluster.launch_config import LaunchConfig, split_address
from megatron_medha.cluster.link import Context, RankLink, router_socket
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import RankError

_log = logging.getLogger(__name__)

_SAY_INTERVAL_S = 1.0
_AGENT_TIMEOUT_S = 5.0  # an agent that has been silent that long is not there
_END_TIMEOUT_S = 5.0    # an agent that has not ended its process by then has lost its machine, or us
_LEAVE_LINGER_MS = 1000


def attached_ranks(launch: LaunchConfig, replica: int = 0, num_replicas: int = 1) -> OpenRanks:
    """Ranks that a launcher starts; launch.kind is ATTACH."""
    assert launch.address is not None and launch.key_file is not None
    host, port = split_address("launch.address", launch.address)
    keys = Keys.load_or_make(launch.key_file)

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


class AttachedRanks:
    """The ranks of one replica, each looked after by an agent."""

    def __init__(
        self,
        configs: Sequence[RankConfig],
        context: Context,
        keys: Keys,
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
        self._agents = router_socket(context, self._address, keys, takes_over=True)
        self._states: dict[int, AgentState] = {}  # by rank within the replica
        self._heard_s: dict[int, float] = {}
        self._decoder = msgspec.msgpack.Decoder(AgentState)
        self._encoder = msgspec.msgpack.Encoder()
        self._link: RankLink | None = None
        self._start = 0
        self._start_s = 0.0
        self._wanted: list[RankConfig] | None = None
        self._said_s = 0.0

    @property
    def link(self) -> RankLink:
        """See Ranks."""
        assert self._link is not None, "no rank has been started"
        return self._link

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """See Ranks."""
        return (self._agents,)

    def start(self) -> None:
        """See Ranks."""
        assert self._wanted is None, "ranks are still there"
        if self._link is not None:
            self._link.close()
        # Any port: agents are told which.
        self._link = RankLink(self._context, f"tcp://{self._host}:*", self._keys)
        self._start += 1
        self._start_s = time.monotonic()

    def missing(self) -> str | None:
        """See Ranks."""
        absent = [rank for rank in range(len(self._configs)) if not self._is_there(rank)]
        if absent:
            first = self._replica * len(self._configs)
            names = ", ".join(str(first + rank) for rank in absent)
            # Once it has started its rank, an agent that is gone is a failure like any other.
            if self._wanted is not None or time.monotonic() - self._start_s > self._timeout_s:
                raise RankError(f"nothing heard of the agents of ranks {names} at {self._address}")
            return f"waiting for ranks {names} to attach to {self._address}"
        if self._wanted is None:
            self._wanted = self._described()
            self._say(is_due=True)
        if all(self._states[rank].running == self._start or self._ended(rank) for rank in self._states):
            return None
        return "starting processes"

    def poll(self) -> None:
        """See Ranks: hear the agents, and tell them what should be."""
        while self._receive():
            pass
        self._say(is_due=time.monotonic() - self._said_s >= _SAY_INTERVAL_S)

    def exits(self) -> list[Exit]:
        """See Ranks."""
        return [Exit(rank, code) for rank in sorted(self._states) if (code := self._ended(rank)) is not None]

    def end(self, patience_s: float) -> None:
        """See Ranks. An agent that does not answer has to attach anew; it ends its process when it hears nothing."""
        deadline_s = time.monotonic() + patience_s
        while patience_s and self._running() and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)
        self._wanted = None
        self._say(is_due=True)
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while self._running() and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)
        for rank in self._running():
            self._drop(rank)

    def close(self) -> None:
        """See Ranks; the agents end too."""
        for rank in self._states:
            self._answer(self._replica * len(self._configs) + rank, Leave("the server has ended", is_error=False))
        if self._link is not None:
            self._link.close()
        self._agents.close(linger=_LEAVE_LINGER_MS)

    def _described(self) -> list[RankConfig]:
        """What each rank is to be, and where they meet: on the machine of the first."""
        first = self._states[0]
        meeting = f"tcp://{first.address}:{first.free_port}" if len(self._configs) > 1 else None
        # The agents know the way to us better than we do.
        port = self.link.endpoint.rpartition(":")[2]
        return [
            msgspec.structs.replace(config, front_endpoint=f"tcp://*:{port}", init_method=meeting)
            for config in self._configs
        ]

    def _is_there(self, rank: int) -> bool:
        return rank in self._states and time.monotonic() - self._heard_s[rank] < _AGENT_TIMEOUT_S

    def _running(self) -> list[int]:
        return [rank for rank, state in self._states.items() if state.running is not None]

    def _ended(self, rank: int) -> int | None:
        ended = self._states[rank].ended
        return ended[1] if ended is not None and ended[0] == self._start else None

    def _say(self, *, is_due: bool) -> None:
        if not is_due:
            return
        self._said_s = time.monotonic()
        for rank in list(self._states):
            want = Want(self._start, None if self._wanted is None else self._wanted[rank])
            if not self._answer(self._replica * len(self._configs) + rank, want):
                self._drop(rank)

    def _drop(self, rank: int) -> None:
        """Its rank ends with the agent, or when the agent hears nothing from us; to take part it attaches anew."""
        _log.warning("agent_lost rank=%d", self._replica * len(self._configs) + rank)
        del self._states[rank]

    def _answer(self, global_rank: int, message: ToAgent) -> bool:
        """Whether the agent's connection is still there."""
        try:
            self._agents.send_multipart((b"agent-%d" % global_rank, self._encoder.encode(message)))
        except zmq.ZMQError:
            return False
        return True

    def _wait(self, timeout_s: float) -> None:
        self._agents.poll(int(min(timeout_s, _SAY_INTERVAL_S) * 1000) + 1)
        self.poll()

    def _receive(self) -> bool:
        try:
            _, payload = self._agents.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        state = self._decoder.decode(payload)
        replica, rank = divmod(state.rank, len(self._configs))
        num_ranks = self._num_replicas * len(self._configs)
        if state.rank >= num_ranks:
            why = f"rank {state.rank} is one too many: the server has {num_ranks}"
            self._answer(state.rank, Leave(why, is_error=True))
        elif replica != self._replica:
            self._answer(state.rank, Redirect(replica - self._replica))
        else:
            if rank not in self._states:
                _log.info("rank_attached rank=%d address=%s", state.rank, state.address)
            self._states[rank] = state
            self._heard_s[rank] = time.monotonic()
        return True
