"""Several replicas behind one front: where requests go, and what a fault of one means for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import TIMEOUT_S, Client, wait_until, wait_until_ready
from fake_cluster import FakeCluster, assert_all_are_answered, mixed_load
from fake_rank import continuation

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import EnginePhase, ErrorDelivery
from megatron_medha.engine.replicas import Replicas


class Pair:
    """Two replicas of one rank each, and a client of both."""

    def __init__(self, directory: Path, recovery: RecoveryConfig) -> None:
        self.clusters = [FakeCluster(directory, ParallelLayout(), recovery=recovery) for _ in range(2)]
        self.engine = Replicas([cluster.engine for cluster in self.clusters])
        self.client = Client(self.engine)
        wait_until_ready(self.engine)

    def num_live(self, replica: int) -> int:
        """Requests the replica has."""
        load = self.clusters[replica].engine.load
        return load.num_waiting + load.num_prefilling + load.num_decoding


@pytest.fixture
def start_pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def run(**recovery: float) -> Pair:
        pairs.append(Pair(tmp_path, RecoveryConfig(**recovery)))
        return pairs[-1]

    yield run
    for pair in pairs:
        pair.engine.stop(TIMEOUT_S)
        assert pair.engine.status.phase in (EnginePhase.STOPPED, EnginePhase.FAILED)


def test_requests_spread_over_both_replicas_and_all_are_answered(start_pair: Callable[..., Pair]) -> None:
    pair = start_pair()
    facts, load = pair.engine.facts, pair.engine.load
    assert facts is not None and facts.num_blocks == 400 and "2 replicas" in facts.device
    assert load.num_blocks == load.num_free_blocks == 800
    requests = mixed_load(5, 60)
    places = set()
    for name, (prompt, num_outputs) in requests.items():
        pair.client.send(name, prompt, num_outputs)
        places.add(pair.engine._places.get(name))
    assert {pair.clusters[0].engine, pair.clusters[1].engine} <= places
    assert_all_are_answered(pair.client, requests)
    wait_until(lambda: not pair.engine._places)


def test_a_replica_that_recovers_keeps_its_requests_and_gets_no_new_ones(start_pair: Callable[..., Pair]) -> None:
    pair = start_pair()
    first, second = pair.clusters
    pair.client.send("long", [1, 2, 3], 1500)
    pair.client.wait("long", num_deliveries=2)
    assert pair.engine._places["long"] is first.engine
    with first.holding_starts():
        first.kill(0)
        wait_until(lambda: first.engine.status.phase is EnginePhase.RECOVERING)
        assert pair.engine.status.phase is EnginePhase.READY and "replica 0 is recovering" in pair.engine.status.detail
        for index in range(5):
            pair.client.send(f"new-{index}", [index], 3)
            assert pair.engine._places.get(f"new-{index}") in (second.engine, None)
    for index in range(5):
        assert pair.client.tokens(f"new-{index}") == continuation([index], 3)
    assert pair.client.tokens("long") == continuation([1, 2, 3], 1500)
    assert pair.engine.status.num_failures == pair.engine.status.num_recoveries == 1


def test_a_replica_that_is_lost_for_good_fails_its_own_requests_and_the_other_serves_on(
    start_pair: Callable[..., Pair],
) -> None:
    pair = start_pair(max_failures=1)
    pair.client.send("doomed", [1, 2, 3], 3000)
    pair.client.wait("doomed", num_deliveries=2)
    pair.clusters[0].kill(0)
    assert isinstance(pair.client.wait("doomed")[-1], ErrorDelivery)
    wait_until(lambda: pair.clusters[0].engine.status.phase is EnginePhase.FAILED)
    pair.client.send("after", [4], 5)
    assert pair.client.tokens("after") == continuation([4], 5)
    assert pair.engine.status.phase is EnginePhase.READY and "replica 0 is failed" in pair.engine.status.detail


def test_an_abort_reaches_the_replica_that_has_the_request(start_pair: Callable[..., Pair]) -> None:
    pair = start_pair()
    for index in range(4):
        pair.client.send(f"r{index}", [index] * 300, 3000)
        pair.client.wait(f"r{index}", num_deliveries=1)
    for index in range(4):
        pair.engine.abort(f"r{index}")
    wait_until(lambda: pair.engine.load.num_free_blocks == 800, lambda: pair.engine.load)
