"""The agent of one rank on a machine of its own: attaches to the API server, starts the rank it is assigned, ends it.

Started by a launcher of several machines, which says by environment variables which rank it is. No torch here: the
agent outlives the ranks that fail, and starts them again when the API server says so.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from megatron_medha.cluster.curve_keys import CurveKeys
from megatron_medha.cluster.health import MAX_CHECK_INTERVAL_S
from megatron_medha.cluster.launch import WORKER_COMMAND, RankProcess
from megatron_medha.cluster.launch_config import split_address
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.remote.addresses import free_port, interface_of, local_address
from megatron_medha.cluster.remote.agent_messages import AgentShutdown, AgentState, DesiredState, Redirect, ToAgent
from megatron_medha.cluster.wire import UnreadableMessage, protocol_version, read_message
from megatron_medha.core.errors import ConfigError, RankError
from megatron_medha.system.secret_values import child_environment

_STATE_INTERVAL_S = 1.0
_CHECK_MS = 100           # how soon the end of the rank's process is noticed
_FRONT_TIMEOUT_S = 30.0   # silence of the API server after which it counts as gone
_MAX_FAILED_HANDSHAKES = 3  # one may be the API server's end in the middle of it
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_MAX_MESSAGE_BYTES = 2**20  # of the API server; a rank's configuration is a few kilobytes
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


def attach(argv: Sequence[str], command: Sequence[str] = WORKER_COMMAND) -> int:
    """`--attach tcp://HOST:PORT --key FILE`: be a rank until the API server has ended; 1 if it is lost, 2 if refused.

    command: what a rank is started with.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_medha.worker.main",
        description="Attach to `medha serve launch=attach` as one of its ranks.",
        epilog="example: torchrun --nproc-per-node 8 -m megatron_medha.worker.main --attach tcp://HOST:5570 "
        "--key medha.key",
    )
    parser.add_argument("--attach", required=True, metavar="tcp://HOST:PORT", help="where the API server listens")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="the key file of the API server")
    parser.add_argument(
        "--rank", type=int, help=f"which rank; by default what the launcher says in {', '.join(_RANK_VARIABLES)}"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long to wait for the API server")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers add it
    arguments = parser.parse_args(argv)
    try:
        rank = _rank_of_launcher() if arguments.rank is None else arguments.rank
        with closing(Agent(arguments.attach, arguments.key, rank, arguments.timeout, command)) as agent:
            agent.run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    return 0


class Agent:
    """Keeps one rank as the API server wants it."""

    def __init__(self, address: str, key_file: Path, rank: int, timeout_s: float, command: Sequence[str]) -> None:
        """Raises ConfigError for an address or a key file that cannot be."""
        self._host, self._port = split_address("--attach", address)
        self._keys = CurveKeys.load(key_file)
        self._key_file = key_file
        self._rank = rank
        self._command = command
        self._timeout_s = timeout_s  # for the first word of the API server
        self._local_address = local_address(self._host, self._port)
        self._process: RankProcess | None = None
        self._start: int | None = None            # that the process belongs to
        self._ended: tuple[int, int] | None = None
        self._free_port = free_port(self._local_address)
        # The name of one agent's connections: a second agent of this rank has another, so that neither takes the
        # other's messages.
        self._identity = f"agent-{rank}-{secrets.token_hex(8)}".encode()
        self._unreadable: str | None = None  # why the API server's last message could not be read
        self._context = zmq.Context()
        self._connect(self._port)
        self._decoder: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
        self._num_failed_handshakes = 0
        self._is_attached = False

    def run(self) -> None:
        """Until the API server has ended. Raises RankError if it is lost, ConfigError if it refuses us."""
        looked_s = time.monotonic()
        silent_s = said_s = 0.0
        while True:
            now_s = time.monotonic()
            # As in Heartbeats: time in which we did not look, stopped or put aside, is not the API server's silence.
            silent_s += min(now_s - looked_s, MAX_CHECK_INTERVAL_S)
            looked_s = now_s
            limit_s = _FRONT_TIMEOUT_S if self._is_attached else self._timeout_s
            if silent_s > limit_s:
                why = f"; its last message could not be read: {self._unreadable}" if self._unreadable else ""
                raise RankError(f"nothing heard from the API server at {self._endpoint} for {limit_s:g} s{why}")
            if self._check_process() or now_s - said_s >= _STATE_INTERVAL_S:
                said_s = now_s
                self._send_state()
            self._check_handshakes()
            if not self._socket.poll(_CHECK_MS):
                continue
            try:
                message = read_message(self._decoder, self._socket.recv_multipart())
            except UnreadableMessage as error:
                self._log_unreadable(str(error))
                continue
            silent_s = 0.0
            match message:
                case DesiredState():
                    if message.version != protocol_version():
                        raise ConfigError(
                            f"the API server at {self._endpoint} is of version {message.version or 'unknown'}, "
                            f"this agent of {protocol_version()}; install the same on both machines"
                        )
                    self._log_attached()
                    if self._apply_desired(message):
                        said_s = 0.0
                case Redirect():
                    self._disconnect()
                    self._connect(self._port + message.port_offset)
                    said_s = 0.0
                case AgentShutdown(why, is_error):
                    if is_error:
                        raise ConfigError(why)
                    print(f"rank {self._rank}: {why}", file=sys.stderr)
                    return

    def close(self) -> None:
        """End the rank, and the connection."""
        self._end_process()
        self._disconnect()
        self._context.term()

    # ---- the process ----

    def _apply_desired(self, want: DesiredState) -> bool:
        """Make it so; whether anything had to be done."""
        if want.config is None:
            if self._process is None:
                return False
            self._end_process()
            return True
        if want.start == self._start or (self._ended is not None and self._ended[0] == want.start):
            return False
        self._end_process()
        config = msgspec.structs.replace(
            want.config,
            server_endpoint=want.config.server_endpoint.replace("*", self._host),
            key_file=str(self._key_file),
        )
        try:
            self._process = RankProcess.start(config, self._command, self._environment(config))
        except OSError as error:  # no descriptor, process or memory; the API server says again what it wants
            print(f"rank {self._rank}: no process can be started just now: {error}", file=sys.stderr)
            self._process = self._start = None
            return False
        self._start = want.start
        self._ended = None
        return True

    def _check_process(self) -> bool:
        """Whether the process has ended by itself since last time."""
        if self._process is None or (code := self._process.exit_code) is None:
            return False
        assert self._start is not None
        self._ended = (self._start, code)
        self._process = self._start = None
        return True

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.process.wait()
            self._process = self._start = None
            self._free_port = free_port(self._local_address)

    def _environment(self, config: RankConfig) -> dict[str, str]:
        environment = {
            **child_environment(),
            # The launcher's count is over all replicas, and its own meeting is not ours.
            "RANK": str(config.rank),
            "WORLD_SIZE": str(config.layout.world_size),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }
        interface = interface_of(self._local_address)
        if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            environment["GLOO_SOCKET_IFNAME"] = interface
        return environment

    # ---- the connection ----

    def _connect(self, port: int) -> None:
        self._endpoint = f"tcp://{self._host}:{port}"
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._identity)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._keys.secure_rank_socket(self._socket)
        self._monitor = self._socket.get_monitor_socket(_HANDSHAKE_FAILED)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"--attach {self._endpoint}: {error}") from None

    def _disconnect(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _check_handshakes(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._num_failed_handshakes += 1
            is_refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            if not self._is_attached and (is_refused or self._num_failed_handshakes >= _MAX_FAILED_HANDSHAKES):
                raise ConfigError(
                    f"--key {self._key_file}: the API server at {self._endpoint} has other keys; copy its key file here"
                )

    def _log_attached(self) -> None:
        if not self._is_attached:
            self._is_attached = True
            print(f"rank {self._rank}: attached to {self._endpoint}", file=sys.stderr)

    def _log_unreadable(self, why: str) -> None:
        if self._unreadable is None:
            print(f"rank {self._rank}: a message of {self._endpoint} cannot be read: {why}", file=sys.stderr)
        self._unreadable = why

    def _send_state(self) -> None:
        state = AgentState(
            self._rank, self._local_address, self._free_port, self._start, self._ended, protocol_version()
        )
        try:
            self._socket.send(msgspec.msgpack.encode(state), zmq.NOBLOCK)
        except zmq.Again:
            pass  # the API server has not read the last thousand; it gets the state of another second


def _rank_of_launcher() -> int:
    for name in _RANK_VARIABLES:
        if (value := os.environ.get(name)) is not None:
            if not value.isdigit():
                raise ConfigError(f"{name}={value}: not the number of a rank")
            return int(value)
    raise ConfigError(
        f"no launcher says which rank this is ({', '.join(_RANK_VARIABLES)}); start it with torchrun, deepspeed or "
        "srun, or give --rank N"
    )
