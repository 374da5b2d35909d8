"""Ranks that die, hang or fall silent under load: nobody loses a token, and nobody gets one twice.

The ranks are processes without a model (fake_rank.py): what each request must get is known beforehand.
"""

from __future__ import annotations

import errno
import math
import random
from pathlib import Path

import pytest
import zmq
from clients import TIMEOUT_S, wait_until
from fake_cluster import POISON, StartCluster, assert_all_are_answered, mixed_load
from fake_rank import continuation

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.launch import RankProcess
from megatron_medha.cluster.runtime import ClusterRuntime
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import EnginePhase, ErrorDelivery


@pytest.mark.parametrize(
    ("layout", "shard_tokens"),
    [
        (ParallelLayout(), None),
        (ParallelLayout(tp=2), None),
        (ParallelLayout(spp=3), None),
        (ParallelLayout(kvp=3), 256),
        (ParallelLayout(tp=2, spp=2, kvp=2), 384),
    ],
    ids=["single", "tp2", "spp3", "kvp3", "tp2-spp2-kvp2"],
)
def test_every_layout_answers_a_mixed_load_in_little_memory(
    start: StartCluster, layout: ParallelLayout, shard_tokens: int | None
) -> None:
    cluster = start(layout, num_blocks=60, shard_tokens=shard_tokens)
    load = mixed_load(1, 40)
    for place, (name, (prompt, num_outputs)) in enumerate(load.items()):
        # The ranks see to it that no grammar comes before they were asked to compile it.
        grammar = f"grammar {place % 3}" if place % 2 else None
        cluster.client.send(name, prompt, num_outputs, grammar=grammar)
    assert_all_are_answered(cluster.client, load)
    assert cluster.engine.facts is not None and cluster.engine.facts.num_blocks == 60


def test_each_rank_killed_in_turn_at_random_moments_costs_nobody_a_token(start: StartCluster) -> None:
    cluster = start(ParallelLayout(spp=2, kvp=2), shard_tokens=384)
    rng = random.Random(2)
    load = mixed_load(2, 100)
    num_tokens = sum(num_outputs for _, num_outputs in load.values())
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    for rank in range(4):
        # Somewhere in this rank's quarter of the work.
        cluster.client.wait_for_tokens(int(num_tokens * (rank + rng.random()) / 4 * 0.95))
        cluster.kill(rank)
        wait_until(lambda: cluster.engine.status.num_recoveries == rank + 1, lambda: cluster.engine.status)  # noqa: B023
    assert_all_are_answered(cluster.client, load)
    assert cluster.engine.status.num_failures == 4


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        # Whose it is to find; no shorter, or a busy machine's pauses are found too.
        ("hang", {"min_step_timeout_s": 3.0, "heartbeat_timeout_s": 3600.0}),
        ("stop", {"min_step_timeout_s": 3600.0, "heartbeat_timeout_s": 4.0}),
        ("close", {"min_step_timeout_s": 3600.0, "heartbeat_timeout_s": 4.0}),
        ("exit", {"min_step_timeout_s": 3600.0, "heartbeat_timeout_s": 3600.0}),
    ],
)
def test_a_rank_that_fails_in_any_way_is_found_and_replaced(
    start: StartCluster, kind: str, limits: dict[str, float]
) -> None:
    recovery = RecoveryConfig(step_timeout_factor=1.0, **limits)
    cluster = start(ParallelLayout(spp=2), recovery=recovery)
    load = {**mixed_load(3, 10), "poisoned": ([*range(200), POISON], 20)}
    cluster.poison(1, kind)
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    assert_all_are_answered(cluster.client, load)
    assert cluster.engine.status.num_failures == cluster.engine.status.num_recoveries == 1


class NoProcesses:
    """A machine that starts no process for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, num_failures: float = math.inf) -> None:
        self._start, self._error, self._num_left = RankProcess.start, error, num_failures
        self.num_failed = 0
        monkeypatch.setattr(RankProcess, "start", self)

    def __call__(self, *arguments: object) -> RankProcess:
        """As RankProcess.start."""
        if self._num_left <= 0:
            return self._start(*arguments)  # type: ignore[arg-type]
        self._num_left -= 1
        self.num_failed += 1
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        zmq.ZMQError(errno.EMFILE),
    ],
    ids=["EMFILE", "EAGAIN", "zmq"],
)  # fmt: skip
def test_ranks_that_cannot_be_started_just_now_are_started_later(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("megatron_medha.cluster.rank_starts._RESTART_DELAY_S", 0.01)
    cluster = start(ParallelLayout(tp=2), recovery=RecoveryConfig(heartbeat_timeout_s=60.0, max_starts=1))
    load = mixed_load(4, 10)
    for name, (prompt, num_outputs) in load.items():
        cluster.client.send(name, prompt, num_outputs)
    NoProcesses(monkeypatch, error, num_failures=3)
    cluster.kill(1)
    # All may have been answered before the loss is found.
    wait_until(lambda: cluster.engine.status.num_recoveries, lambda: cluster.engine.status)
    assert_all_are_answered(cluster.client, load)
    assert cluster.engine.status.num_failures == cluster.engine.status.num_recoveries == 1


def test_a_machine_that_starts_no_process_for_long_ends_the_server(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_medha.cluster.rank_starts._RESTART_DELAY_S", 0.01)
    cluster = start(ParallelLayout(), recovery=RecoveryConfig(heartbeat_timeout_s=3600.0))
    tries = NoProcesses(monkeypatch, OSError(errno.EMFILE, "Too many open files"))
    now_s = ClusterRuntime.now_s
    # Each try takes a quarter of the time there is.
    monkeypatch.setattr(ClusterRuntime, "now_s", lambda runtime: now_s(runtime) + 15.0 * tries.num_failed)
    cluster.kill(0)
    wait_until(lambda: cluster.engine.status.phase is EnginePhase.FAILED, lambda: cluster.engine.status)
    assert "cannot be started: [Errno 24] Too many open files" in cluster.engine.status.detail


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_ranks_find_no_secret_in_their_environment_or_on_their_command_line(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHA_API_KEY", "sk-very-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    monkeypatch.setenv("MEDHA_PLAIN", "handed-on")
    cluster = start(ParallelLayout(tp=2))
    for process in cluster.processes:
        found = b"".join(Path(f"/proc/{process.process.pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
        assert b"very-secret" not in found and b"handed-on" in found and b"LOCAL_RANK=" in found


def test_while_ranks_come_up_again_requests_are_taken_and_aborts_are_heard(start: StartCluster) -> None:
    cluster = start(ParallelLayout(tp=2))
    client = cluster.client
    client.send("early", [1, 2, 3], 30)
    client.send("doomed", [4, 5, 6], 3000)
    client.wait("doomed", num_deliveries=3)
    with cluster.holding_starts():
        cluster.kill(1)
        wait_until(lambda: cluster.engine.status.phase is EnginePhase.RECOVERING)
        client.send("late", [7, 8, 9], 30)
        client.engine.abort("doomed")
        assert cluster.engine.status.phase is EnginePhase.RECOVERING
    assert client.tokens("early") == continuation([1, 2, 3], 30)
    assert client.tokens("late") == continuation([7, 8, 9], 30)
    assert cluster.engine.status.phase is EnginePhase.READY
    wait_until(lambda: cluster.engine.load.num_free_blocks == cluster.engine.load.num_blocks)
    assert len(client.deliveries["doomed"]) < 3000


def test_failures_that_come_too_often_end_every_request_with_the_reason(start: StartCluster) -> None:
    cluster = start(ParallelLayout(), recovery=RecoveryConfig(max_failures=2, failure_window_s=3600.0))
    cluster.client.send("endless", [1, 2, 3], 4000)
    cluster.client.wait("endless", num_deliveries=2)
    cluster.kill(0)
    wait_until(lambda: cluster.engine.status.num_recoveries == 1)
    cluster.kill(0)
    last = cluster.client.wait("endless")[-1]
    assert isinstance(last, ErrorDelivery) and not last.is_client_fault
    assert "SIGKILL" in last.message and "failure 2 within 3600 s" in last.message
    assert cluster.engine.status.phase is EnginePhase.FAILED


@pytest.mark.parametrize("max_starts", [1, 2])
def test_ranks_that_cannot_start_again_are_tried_as_often_as_configured(start: StartCluster, max_starts: int) -> None:
    cluster = start(ParallelLayout(spp=2), recovery=RecoveryConfig(max_starts=max_starts))
    cluster.client.send("patient", [1, 2, 3], 1000)
    cluster.client.wait("patient", num_deliveries=2)
    cluster.poison(1, "load")
    cluster.kill(0)
    if max_starts == 2:
        assert cluster.client.tokens("patient") == continuation([1, 2, 3], 1000)
        return
    last = cluster.client.wait("patient")[-1]
    assert isinstance(last, ErrorDelivery)
    assert "told to fail" in last.message and "SIGKILL" in last.message
    assert cluster.engine.status.phase is EnginePhase.FAILED


def test_an_engine_that_is_stopped_while_its_ranks_come_up_leaves_no_process(start: StartCluster) -> None:
    cluster = start(ParallelLayout(tp=2))
    processes = cluster.processes
    with cluster.holding_starts():
        cluster.kill(0)
        wait_until(lambda: len(new := cluster.processes) == 2 and new[0] is not processes[0])
        processes += cluster.processes
        cluster.engine.stop(TIMEOUT_S)
    assert cluster.engine.status.phase is EnginePhase.STOPPED
    assert all(process.exit_code is not None for process in processes)


@pytest.mark.parametrize(
    ("layout", "shard_tokens"),
    [(ParallelLayout(spp=2, kvp=2), 128), (ParallelLayout(spp=3), None)],
    ids=["spp2-kvp2", "spp3"],
)
def test_requests_aborted_between_stages_and_while_shards_grow_leave_nothing_on_any_rank(
    start: StartCluster, layout: ParallelLayout, shard_tokens: int | None
) -> None:
    # The audit compares each rank's requests and blocks with the scheduler's after every step.
    cluster = start(layout, shard_tokens=shard_tokens)
    client, rng = cluster.client, random.Random(4)
    kept = {}
    for number in range(60):
        prompt = [rng.randrange(900) for _ in range(rng.choice((10, 120, 127, 200)))]
        client.send(f"r{number}", prompt, 40)
        if number % 4:
            client.wait_for_tokens(rng.randrange(3 * number + 1))
            cluster.engine.abort(f"r{number if number % 4 != 1 else max(1, number - 3)}")
        else:
            kept[f"r{number}"] = (prompt, 40)
    assert_all_are_answered(client, kept)
    client.send("last", [1, 2, 3], 2)
    assert client.tokens("last") == continuation([1, 2, 3], 2)
    assert cluster.engine.status.phase is EnginePhase.READY


def test_a_rank_whose_blocks_differ_from_the_schedulers_ends_the_server(start: StartCluster) -> None:
    cluster = start(ParallelLayout(kvp=2), shard_tokens=256)
    cluster.poison(1, "lose")
    cluster.client.send("poisoned", [*range(300), POISON], 20)
    (last,) = cluster.client.wait("poisoned")[-1:]
    assert isinstance(last, ErrorDelivery)
    assert "a rank of KVP index 1 has HeldKV(" in cluster.engine.status.detail
