"""Ranks that others start: agents attach over encrypted TCP, on this machine and from another network namespace."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from clients import TIMEOUT_S, wait_until, wait_until_ready
from fake_cluster import FakeCluster, assert_all_are_answered, mixed_load
from fake_rank import continuation

from megatron_medha.cluster.curve_keys import CurveKeys
from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.launch_config import LaunchConfig, LaunchKind
from megatron_medha.cluster.messages import Heartbeat, RankFailed, StepDone
from megatron_medha.cluster.rank_link import RankLink, router_socket
from megatron_medha.cluster.remote.agent_messages import AgentShutdown, AgentState, ToAgent
from megatron_medha.cluster.remote.attach import attached_ranks
from megatron_medha.cluster.wire import protocol_version
from megatron_medha.core.errors import ConfigError, RankError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import EnginePhase
from megatron_medha.engine.replicas import Replicas
from megatron_medha.worker.message_inbox import SocketInbox

FAKE_AGENT = (sys.executable, str(Path(__file__).with_name("fake_agent.py")))
AGENT = (sys.executable, "-m", "megatron_medha.worker.main")


def free_port(num_ports: int = 1) -> int:
    """The first of so many that nobody listens on, nor is given by the system to those who ask for any port."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with ExitStack() as probes:
            try:
                for offset in range(num_ports):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except OSError:
                continue
        return port


class Site:
    """A front that ranks attach to, and the agents that were started for it."""

    def __init__(self, directory: Path, host: str = "127.0.0.1", num_replicas: int = 1) -> None:
        self.directory = directory
        self.address = f"tcp://{host}:{free_port(num_replicas)}"
        self.key_file = directory / "medha.key"
        self.num_replicas = num_replicas
        self.launch = LaunchConfig(
            kind=LaunchKind.ATTACH, address=self.address, key_file=self.key_file, attach_timeout_s=TIMEOUT_S
        )
        self.agents: dict[int, subprocess.Popen[str]] = {}
        self._exits = ExitStack()

    def cluster(self, layout: ParallelLayout, replica: int = 0, **options: Any) -> FakeCluster:
        open_ranks = attached_ranks(self.launch, replica, self.num_replicas)
        cluster = FakeCluster(self.directory, layout, open_ranks=open_ranks, **options)
        self._exits.callback(cluster.engine.stop, TIMEOUT_S)
        return cluster

    def start_agent(
        self, rank: int, *, key_file: Path | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """As a launcher does: which rank it is stands in the environment."""
        agent = self._exits.enter_context(
            subprocess.Popen(
                [*prefix, *FAKE_AGENT, "--attach", self.address, "--key", str(key_file or self.key_file)],
                env={**os.environ, "RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        self._exits.callback(agent.kill)
        self.agents[rank] = agent
        return agent

    def rank_pid(self, rank: int) -> int:
        """The rank's process: its agent's only child."""
        agent = self.agents[rank].pid
        (child,) = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        return int(child)

    def close(self) -> None:
        self._exits.close()


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**options: Any) -> Site:
        sites.append(Site(tmp_path, **options))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank's process through /proc")
def test_attached_ranks_serve_come_back_after_a_kill_and_leave_with_the_front(make_site: Callable[..., Site]) -> None:
    site = make_site()
    # Both losses are seen without waiting for silence, which a busy machine makes, too.
    recovery = RecoveryConfig(heartbeat_timeout_s=60.0)
    cluster = site.cluster(ParallelLayout(tp=2), recovery=recovery).connect()
    site.start_agent(0)
    wait_until(lambda: "waiting for ranks 1 to attach" in cluster.engine.status.detail, lambda: cluster.engine.status)
    site.start_agent(1)
    wait_until_ready(cluster.engine)
    load = {**mixed_load(11, 20), "long": ([1, 2, 3], 2000)}
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    cluster.client.wait("long", num_deliveries=20)
    os.kill(site.rank_pid(1), signal.SIGKILL)
    wait_until(lambda: cluster.engine.status.num_recoveries == 1, lambda: cluster.engine.status)
    # And a whole "machine": the agent takes its rank with it, and the launcher starts another.
    site.agents[0].kill()
    wait_until(lambda: cluster.engine.status.phase is EnginePhase.RECOVERING)
    site.start_agent(0)
    assert_all_are_answered(cluster.client, load)
    assert cluster.engine.status.num_recoveries == 2
    cluster.engine.stop(TIMEOUT_S)
    assert [site.agents[rank].wait(TIMEOUT_S) for rank in (0, 1)] == [0, 0]


def test_agents_find_the_replica_they_belong_to(make_site: Callable[..., Site]) -> None:
    site = make_site(num_replicas=2)
    clusters = [site.cluster(ParallelLayout(), replica) for replica in range(2)]
    engine = Replicas([cluster.engine for cluster in clusters])
    deliveries: list[object] = []
    engine.start(deliveries.extend)
    surplus = site.start_agent(2)
    for rank in (1, 0):
        site.start_agent(rank)
    wait_until_ready(engine)
    assert surplus.wait(TIMEOUT_S) == 2
    assert surplus.stderr is not None and "one too many: the server has 2" in surplus.stderr.read()


def test_a_rank_with_other_keys_is_refused_and_told_so(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site()
    cluster = site.cluster(ParallelLayout()).connect()
    right = CurveKeys.load(site.key_file)
    strangers = CurveKeys.load_or_make(tmp_path / "stranger.key")
    # One knows nothing of the front; the other knows its public key, but holds no key the front trusts.
    half = CurveKeys(**{**{field: getattr(strangers, field) for field in strangers.__struct_fields__},
                   "front_public": right.front_public})
    (tmp_path / "half.key").write_bytes(msgspec.json.encode(half))
    for name in ("stranger.key", "half.key"):
        agent = site.start_agent(0, key_file=tmp_path / name)
        assert agent.wait(TIMEOUT_S) == 2
        assert agent.stderr is not None and "has other keys" in agent.stderr.read()
    wait_until(lambda: "waiting for ranks 0" in cluster.engine.status.detail, lambda: cluster.engine.status)
    site.start_agent(0)
    wait_until_ready(cluster.engine)
    cluster.client.send("after", [4], 5)
    assert cluster.client.tokens("after") == continuation([4], 5)


# ---- messages that no rank of ours sends ----


class Holder:
    """Somebody with the ranks' key, who may send anything."""

    def __init__(self, keys: CurveKeys, endpoint: str, name: bytes) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IDENTITY, name)
        keys.secure_rank_socket(self.socket)
        self.socket.connect(endpoint)

    def say(self, **fields: Any) -> None:
        state = AgentState(**{**STATE, **fields})
        self.socket.send(msgspec.msgpack.encode(state))

    def hears(self) -> object:
        assert self.socket.poll(TIMEOUT_S * 1000), "no answer"
        return msgspec.msgpack.decode(self.socket.recv(), type=ToAgent)

    def close(self) -> None:
        self.context.destroy(linger=0)


STATE: dict[str, Any] = {
    "rank": 0, "address": "127.0.0.1", "free_port": 9, "running": None, "ended": None, "version": protocol_version(),
}  # fmt: skip


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def make(*arguments: Any) -> Holder:
        holders.append(Holder(*arguments))
        return holders[-1]

    yield make
    for holder in holders:
        holder.close()


def _encoded(*values: object) -> list[bytes]:
    return [msgspec.msgpack.encode(value) for value in values]


HOSTILE: dict[str, list[bytes]] = {
    "no message": [b""],
    "not msgpack": [b"\xc1\xff nonsense"],
    "cut off": [msgspec.msgpack.encode(AgentState(**STATE))[:-9]],
    "three frames": [b"a", b"b", b"c"],
    "another message twice": _encoded(AgentState(**STATE)) * 2,
    "an array without its tag": _encoded([99, "1.2.3.4", 1, None, None]),
    "an unknown tag": _encoded(["agent_of_another_kind", 0]),
    "a map": _encoded({"rank": 0}),
    "nested deeply": [b"\x91" * 60_000 + b"\xc0"],
    "of wrong types": _encoded(["agent_state", "0", 7, "port", [], {}, 5]),
    "text that is no UTF-8": [b"\x97\xabagent_state\x00\xa2\xff\xfe\x09\xc0\xc0\xa1x"],
    "an integer beyond 64 bits": [b"\x97\xabagent_state\xcf" + b"\xff" * 8 + b"\xa11\x09\xc0\xc0\xa1x"],
    "rank 99": _encoded(AgentState(**{**STATE, "rank": 99})),
    "rank -1": _encoded(AgentState(**{**STATE, "rank": -1})),
    "rank -2**63": _encoded(AgentState(**{**STATE, "rank": -(2**63)})),
    "an address that is none": _encoded(AgentState(**{**STATE, "address": "x; rm"})),
    "a port that is none": _encoded(AgentState(**{**STATE, "free_port": 1 << 20})),
    "an agent without a version": _encoded(["agent_state", 0, "127.0.0.1", 9, None, None]),
    "an agent of another version": _encoded(AgentState(**{**STATE, "version": "0.0.9/ffffffff"})),
}


def test_no_message_of_a_holder_of_the_key_ends_the_wait_for_ranks_or_the_server(
    make_site: Callable[..., Site], hold: Callable[..., Holder]
) -> None:
    site = make_site()
    cluster = site.cluster(ParallelLayout()).connect()
    keys = CurveKeys.load(site.key_file)

    def send_all(prefix: str) -> None:
        for name, frames in HOSTILE.items():
            # Some call themselves what an agent of before would.
            holder = hold(keys, site.address, f"{prefix}{name}".encode())
            holder.socket.send_multipart(frames)
            answer = holder.hears()
            assert isinstance(answer, AgentShutdown) and answer.is_error, name
            assert protocol_version() in answer.why
        hold(keys, site.address, f"{prefix}huge".encode()).socket.send(b"\0" * 2**20)

    send_all("agent-0")
    wait_until(lambda: "waiting for ranks 0" in cluster.engine.status.detail, lambda: cluster.engine.status)
    site.start_agent(0)
    wait_until_ready(cluster.engine)
    send_all("agent-1")
    cluster.client.send("after", [4], 5)
    assert cluster.client.tokens("after") == continuation([4], 5)
    assert cluster.engine.status.num_recoveries == 0


def test_agent_and_server_of_other_versions_both_say_so(
    make_site: Callable[..., Site], hold: Callable[..., Holder], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    site = make_site()
    site.cluster(ParallelLayout()).connect()
    keys = CurveKeys.load(site.key_file)
    holder = hold(keys, site.address, b"agent-0")
    holder.say(version="0.0.9/ffffffff")
    answer = holder.hears()
    assert isinstance(answer, AgentShutdown) and answer.is_error
    for text in (answer.why, caplog.text):
        assert "0.0.9/ffffffff" in text and protocol_version() in text
    # The other way round: a server that does not look at versions.
    with zmq.Context() as context:
        old_server = router_socket(context, f"tcp://127.0.0.1:{free_port()}", keys, max_message_bytes=1000)
        site.address = old_server.getsockopt_string(zmq.LAST_ENDPOINT)
        agent = site.start_agent(0)
        assert old_server.poll(TIMEOUT_S * 1000)
        peer, _ = old_server.recv_multipart()
        for frames in ([b"\xc1"], [b"a", b"b"], _encoded(["want", "x"]), _encoded(["want", 0, None])):
            old_server.send_multipart([peer, *frames])
        assert agent.wait(TIMEOUT_S) == 2
        old_server.close(linger=0)
    assert agent.stderr is not None
    said = agent.stderr.read()
    assert "cannot be read: " in said and f"is of version unknown, this agent of {protocol_version()}" in said


def test_a_second_agent_of_a_rank_is_refused_while_the_first_is_there(make_site: Callable[..., Site]) -> None:
    site = make_site()
    cluster = site.cluster(ParallelLayout()).connect()
    site.start_agent(0)
    wait_until_ready(cluster.engine)
    second = site.start_agent(0)
    assert second.wait(TIMEOUT_S) == 2
    assert second.stderr is not None and "rank 0 is attached already, from 127.0.0.1" in second.stderr.read()
    cluster.client.send("after", [4], 5)
    assert cluster.client.tokens("after") == continuation([4], 5)
    assert cluster.engine.status.num_recoveries == 0


def test_what_no_rank_sends_is_dropped_by_the_link_to_the_ranks(
    hold: Callable[..., Holder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = CurveKeys.load_or_make(tmp_path / "key")
    done = StepDone(0, 0, 0.1)
    with zmq.Context() as context:
        link = RankLink(context, "tcp://127.0.0.1:*", 2, keys)
        name_of_rank = f"rank-0-{link.token}".encode()
        for name, frames in {
            **HOSTILE,
            "rank-7": _encoded(Heartbeat(7)),
            "rank--1": _encoded(Heartbeat(-1)),
            "rank-1": _encoded(Heartbeat(0)),
            "rank-0-heartbeat": _encoded(done),
            "rank-0-grammars": _encoded(done),
            "rank-0": _encoded(RankFailed(0, "Error", "of somebody who does not know the token")),
            f"rank-0-heartbeat-{link.token}": _encoded(RankFailed(0, "Error", "of another connection")),
        }.items():
            hold(keys, link.endpoint, name.encode()).socket.send_multipart(frames)
        rank = hold(keys, link.endpoint, name_of_rank)
        heard: list[object] = []

        def receive() -> bool:
            while (message := link.receive()) is not None:
                heard.append(message)
            return caplog.text.count("message_rejected") >= len(HOSTILE) + 7

        wait_until(receive, lambda: caplog.text)
        # Connections take names in the order they come: a second one of a name that is taken is not heard.
        rank.socket.send_multipart(_encoded(done))
        wait_until(lambda: receive() and bool(heard))
        impostor = hold(keys, link.endpoint, name_of_rank)
        impostor.socket.send_multipart(_encoded(RankFailed(0, "Error", "of an impostor")))
        rank.socket.send_multipart(_encoded(done))
        wait_until(lambda: receive() and len(heard) == 2)
        assert heard == [done, done]
        link.close()
        for holder in [rank]:
            holder.close()


def test_a_rank_that_cannot_read_its_server_says_so_instead_of_a_traceback(tmp_path: Path) -> None:
    with zmq.Context() as context:
        front, socket_ = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        front.bind("inproc://front")
        socket_.connect("inproc://front")
        inbox = SocketInbox(socket_, os.getppid(), lambda prepare: None)
        for frames in ([b"\xc1"], [b"a", b"b"], _encoded(["step", "x"])):
            front.send_multipart(frames)
            with pytest.raises(RankError):
                inbox.poll()
        front.close(linger=0)
        socket_.close(linger=0)


def test_ranks_that_never_come_end_the_start_with_their_numbers(tmp_path: Path) -> None:
    launch = LaunchConfig(
        kind=LaunchKind.ATTACH, address=f"tcp://127.0.0.1:{free_port()}", key_file=tmp_path / "key",
        attach_timeout_s=1.0,
    )  # fmt: skip
    cluster = FakeCluster(tmp_path, ParallelLayout(tp=2), open_ranks=attached_ranks(launch)).connect()
    wait_until(lambda: cluster.engine.status.phase is EnginePhase.FAILED)
    assert "nothing heard of the agents of ranks 0, 1" in cluster.engine.status.detail
    cluster.engine.stop(TIMEOUT_S)


def test_the_key_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "medha.key"
    made = CurveKeys.load_or_make(path)
    assert CurveKeys.load_or_make(path) == made == CurveKeys.load(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not one that the API server wrote"):
        CurveKeys.load(path)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--attach", "nowhere", "--key", "KEY"], {"RANK": "0"}, "--attach=nowhere: must be tcp://HOST:PORT"),
        (["--attach", "tcp://127.0.0.1:9", "--key", "none"], {"RANK": "0"}, "key file none: cannot be read"),
        (["--attach", "tcp://127.0.0.1:9", "--key", "KEY"], {}, "no launcher says which rank this is"),
        (["--attach", "tcp://127.0.0.1:9", "--key", "KEY"], {"SLURM_PROCID": "x"}, "SLURM_PROCID=x"),
        (["--attach", "tcp://127.0.0.1:9", "--key", "KEY", "--timeout", "0.5"], {"RANK": "0"}, "nothing heard"),
    ],
)
def test_an_agent_that_cannot_attach_says_why(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    CurveKeys.load_or_make(tmp_path / "key")
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    outcome = subprocess.run(
        [*AGENT, *(str(tmp_path / "key") if word == "KEY" else word for word in arguments)],
        env={**clean, **environment}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert outcome.returncode in (1, 2) and words in outcome.stderr


@pytest.fixture
def other_host() -> Iterator[tuple[str, str]]:
    """A network namespace that reaches this one over a pair of virtual cables, as another machine would.

    Its name, and this machine's address as seen from there.
    """
    name, here, there = f"medha-{os.getpid()}", f"mh{os.getpid()}", f"mt{os.getpid()}"
    if shutil.which("ip") is None:
        pytest.skip("the ip command is not installed")
    # A network of this process alone: others may run the same test beside it.
    network = 4 * (os.getpid() % (1 << 14))
    ours, theirs = (f"10.213.{(network + host) >> 8}.{(network + host) & 255}" for host in (1, 2))
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no privilege to make a network namespace: {made.stderr.strip()}")
    try:
        for command in (
            f"ip link add {here} type veth peer name {there} netns {name}",
            f"ip addr add {ours}/30 dev {here}",
            f"ip link set {here} up",
            f"ip -n {name} addr add {theirs}/30 dev {there}",
            f"ip -n {name} link set {there} up",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no privilege to connect a network namespace: {done.stderr.strip()}")
        yield name, ours
    finally:
        subprocess.run(["ip", "link", "del", here], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ranks_of_two_hosts_serve_together_and_survive_the_loss_of_one(
    other_host: tuple[str, str], make_site: Callable[..., Site]
) -> None:
    namespace, address = other_host
    site = make_site(host=address)
    elsewhere = ("ip", "netns", "exec", namespace)
    cluster = site.cluster(ParallelLayout(spp=2), recovery=RecoveryConfig()).connect()
    site.start_agent(0)
    site.start_agent(1, prefix=elsewhere)
    wait_until_ready(cluster.engine)
    load = {**mixed_load(12, 20), "long": ([1, 2, 3], 2000)}
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    cluster.client.wait("long", num_deliveries=20)
    site.agents[1].kill()
    wait_until(lambda: cluster.engine.status.phase is EnginePhase.RECOVERING)
    site.start_agent(1, prefix=elsewhere)
    assert_all_are_answered(cluster.client, load)
