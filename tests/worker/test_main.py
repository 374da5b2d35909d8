"""The rank as a process: how it comes up, answers, and ends. Each test pays one start of torch and Megatron."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from megatron_medha.cluster.messages import (
    FromRank,
    GrammarPrepared,
    Heartbeat,
    NewRequest,
    PrepareGrammar,
    RankFailed,
    RankLoading,
    RankReady,
    RankStep,
    Shutdown,
    StepDone,
    ToRank,
)
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling

TIMEOUT_S = 120  # for a start on a busy machine


class FrontSocket:
    """The front's end of the wire."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/front"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self.num_heartbeats = 0

    def send(self, message: ToRank, rank: int = 0) -> None:
        self._socket.send_multipart([b"rank-%d" % rank, msgspec.msgpack.encode(message)])

    def receive(self) -> FromRank:
        """The next message that is not a heartbeat."""
        while isinstance(message := self.receive_any(), Heartbeat):
            self.num_heartbeats += 1
        return message

    def receive_any(self) -> FromRank:
        assert self._socket.poll(TIMEOUT_S * 1000), "the rank says nothing"
        _, payload = self._socket.recv_multipart()
        return self._decoder.decode(payload)

    def receive_until(self, kind: type) -> tuple[Any, list[FromRank]]:
        """The first message of that kind, and those before it."""
        before: list[FromRank] = []
        while not isinstance(message := self.receive(), kind):
            before.append(message)
        return message, before

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def front_socket(tmp_path: Path) -> Iterator[FrontSocket]:
    socket = FrontSocket(tmp_path)
    yield socket
    socket.close()


def command(config: RankConfig) -> list[str]:
    return [sys.executable, "-m", "megatron_medha.worker.main", msgspec.json.encode(config).decode()]


def test_a_rank_loads_answers_steps_ignores_ctrl_c_and_ends_when_told(
    front_socket: FrontSocket, rank_config: RankConfig
) -> None:
    config = msgspec.structs.replace(rank_config, server_endpoint=front_socket.endpoint)
    with subprocess.Popen(command(config)) as process:
        ready, before = front_socket.receive_until(RankReady)
        assert before and all(isinstance(message, RankLoading) and 0 <= message.fraction <= 1 for message in before)
        assert ready.num_blocks > 0 and ready.block_size == 16
        assert front_socket.num_heartbeats > 0
        while not isinstance(front_socket.receive_any(), Heartbeat):  # and they go on
            pass

        process.send_signal(signal.SIGINT)
        new = NewRequest(
            "a", array("i", range(5, 25)).tobytes(), 20, Sampling(max_output_tokens=4, temperature=0.0)
        )
        begin = append_op("a", 0, (Extent(0, 2),))
        front_socket.send(RankStep(1, (Chunk("a", 0, 20, True),), (new,), kv_ops=(begin,)))
        done = front_socket.receive()
        assert isinstance(done, StepDone)
        assert done.batch_id == 1 and done.duration_s > 0
        assert [token.request_id for token in done.tokens] == ["a"]

        front_socket.send(PrepareGrammar(7, "no grammar at all"))  # of which its request would hear
        assert front_socket.receive() == GrammarPrepared(0, 7)

        front_socket.send(Shutdown())
        assert process.wait(TIMEOUT_S) == 0


def test_two_ranks_of_a_pipeline_meet_and_stream_a_prompt(
    front_socket: FrontSocket, rank_config: RankConfig, theirs: tuple[Any, Path], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(
        rank_config, layout=ParallelLayout(spp=2), server_endpoint=front_socket.endpoint,
        init_method=f"file://{tmp_path}/meeting",
    )  # fmt: skip
    token_ids = list(range(5, 65))
    new = NewRequest("a", array("i", token_ids).tobytes(), 60, Sampling(max_output_tokens=4, temperature=0.0))
    with (
        subprocess.Popen(command(config)) as first,
        subprocess.Popen(command(msgspec.structs.replace(config, rank=1))) as second,
    ):
        ready = [front_socket.receive_until(RankReady)[0] for _ in range(2)]
        assert {message.rank for message in ready} == {0, 1}
        assert ready[0].num_blocks == ready[1].num_blocks
        begin = append_op("a", 0, (Extent(0, 4),))
        for batch_id in range(3):  # all at once: more than the front would, and nothing gets out of order
            start = 20 * batch_id
            chunk = Chunk("a", start, 20, batch_id == 2)
            begun = RankStep(batch_id, (chunk,), (new,), kv_ops=(begin,))
            for rank in range(2):
                front_socket.send(RankStep(batch_id, (chunk,)) if start else begun, rank)
        done = [front_socket.receive() for _ in range(6)]
        assert all(isinstance(message, StepDone) for message in done)
        for rank in range(2):
            assert [message.batch_id for message in done if message.rank == rank] == [0, 1, 2]
        (token,) = [token for message in done for token in message.tokens]
        with torch.inference_mode():
            assert token.token_id == theirs[0](torch.tensor([token_ids])).logits[0, -1].argmax()
        for rank in range(2):
            front_socket.send(Shutdown(), rank)
        assert first.wait(TIMEOUT_S) == second.wait(TIMEOUT_S) == 0


def test_a_rank_that_cannot_load_says_why_and_exits_with_1(
    front_socket: FrontSocket, rank_config: RankConfig, tmp_path: Path
) -> None:
    missing = tmp_path / "nothing-here"
    config = msgspec.structs.replace(
        rank_config, server_endpoint=front_socket.endpoint, checkpoint=str(missing)
    )
    with subprocess.Popen(command(config), stderr=subprocess.DEVNULL) as process:
        failed, _ = front_socket.receive_until(RankFailed)
        assert failed.kind == "CheckpointError"
        assert str(missing) in failed.message
        assert process.wait(TIMEOUT_S) == 1


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waiting for a process that is not a child needs Linux")
def test_a_rank_does_not_outlive_the_process_that_started_it(
    front_socket: FrontSocket, rank_config: RankConfig
) -> None:
    config = msgspec.structs.replace(rank_config, server_endpoint=front_socket.endpoint)
    starter = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter, *command(config)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        rank_pid = int(parent.stdout.readline())
        rank_fd = os.pidfd_open(rank_pid)
        try:
            front_socket.receive_until(RankLoading)  # by then it has asked for a signal at its parent's end
            parent.kill()
            poll = select.poll()
            poll.register(rank_fd, select.POLLIN)
            assert poll.poll(TIMEOUT_S * 1000), "the rank is still there"
        finally:
            os.close(rank_fd)


def test_a_command_line_without_a_configuration_is_explained() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "megatron_medha.worker.main"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert outcome.returncode == 2
    assert "RankConfig" in outcome.stderr
