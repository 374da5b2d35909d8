"""Turns of sessions and shared prefixes on real ranks, while something goes wrong: answers are those without a cache.

Every engine audits its KV accounting after each event, and fails all requests where it is wrong.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from clients import TIMEOUT_S, Client, wait_until, wait_until_ready
from real_ranks import make_engine, random_prompt, rank_pids

from megatron_medha.core.batch import Batch, Event, Output, Preempted
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import EngineClient, EnginePhase
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.engine.engine import Engine
from megatron_medha.engine.replicas import Replicas

GRANULE = 16
SYSTEM = random_prompt(0, 300)  # all sessions begin with it
SMALL_STEPS = {"max_batch_tokens": 64, "max_num_sequences": 32}
NUM_SESSIONS, NUM_TURNS, NUM_OUTPUTS = 4, 3, 30

Answers = dict[str, list[int]]


class Watch:
    """An observer that counts preemptions, can hold the engine, and calls `on_batch` before each batch is sent."""

    def __init__(self) -> None:
        self.num_preempted = 0
        self.on_batch: Callable[[Scheduler], None] = lambda scheduler: None
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._scheduler: Scheduler

    def of(self, scheduler: Scheduler) -> Watch:
        """For Engine(watchers=...)."""
        self._scheduler = scheduler
        return self

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        self.num_preempted += sum(isinstance(output, Preempted) for output in outputs)
        assert self._may_go_on.wait(TIMEOUT_S)

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self.on_batch(self._scheduler)

    def hold(self) -> None:
        """The engine stands still after its next event."""
        self._may_go_on.clear()

    def go_on(self) -> None:
        """It runs again."""
        self._may_go_on.set()


class Started:
    """An engine with the cache, and its client."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.watch = Watch()
        self.engine = make_engine(checkpoint, is_audited=True, watchers=(self.watch.of,), **options)


@pytest.fixture
def connect() -> Iterator[Callable[[EngineClient], Client]]:
    """A client of an engine that is ready; the engine is stopped at the end."""
    clients: list[Client] = []

    def run(engine: EngineClient) -> Client:
        clients.append(Client(engine))
        wait_until_ready(engine)
        return clients[-1]

    yield run
    for client in clients:
        phase = client.engine.status.phase
        client.engine.stop(TIMEOUT_S)
        assert phase is EnginePhase.READY, client.engine.status


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Iterator[Client]:
    """One rank, without a cache."""
    client = Client(make_engine(checkpoint, has_cache=False))
    wait_until_ready(client.engine)
    yield client
    client.engine.stop(TIMEOUT_S)


@pytest.fixture(scope="module")
def expected(plain: Client) -> Answers:
    """Of all turns."""
    return play(plain)


def new_tokens(session: int, turn: int) -> list[int]:
    """What the user says."""
    return random_prompt(1000 + 10 * session + turn, 40)


def play(client: Client, on_turn: Callable[[int], None] = lambda turn: None) -> Answers:
    """All sessions at the same time, turn by turn; on_turn is called when a turn's requests were sent."""
    histories = [[*SYSTEM] for _ in range(NUM_SESSIONS)]
    answers: Answers = {}
    for turn in range(NUM_TURNS):
        for session, history in enumerate(histories):
            history += new_tokens(session, turn)
            client.send(f"s{session}-{turn}", history, NUM_OUTPUTS, is_cached=True, session_id=f"s{session}")
        on_turn(turn)
        for session, history in enumerate(histories):
            answer = answers[f"s{session}-{turn}"] = client.tokens(f"s{session}-{turn}")
            history += answer
    return answers


def num_cached(client: Client, request_id: str) -> int:
    first = client.wait(request_id)[0]
    return int(first.num_cached_tokens)


def whole_granules(num_tokens: int) -> int:
    return num_tokens // GRANULE * GRANULE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the rank's process through /proc")
@pytest.mark.parametrize(
    ("layout", "shard_tokens"),
    [
        pytest.param(ParallelLayout(), None, id="single"),
        pytest.param(ParallelLayout(spp=2), None, id="spp2", marks=pytest.mark.slow),
        pytest.param(ParallelLayout(kvp=2), 320, id="kvp2", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_between_hits_changes_no_answer(
    checkpoint: Path, connect: Callable[..., Client], expected: Answers, layout: ParallelLayout,
    shard_tokens: int | None,
) -> None:  # fmt: skip
    others = rank_pids()
    client = connect(Started(checkpoint, layout=layout, shard_tokens=shard_tokens, **SMALL_STEPS).engine)

    def kill(turn: int) -> None:
        if turn == 2:  # it is played on what the ranks have computed since
            return
        # First while some wait for the prefix that another computes, then in the middle of decodes behind hits.
        client.wait_for_tokens(1 if turn == 0 else NUM_SESSIONS * NUM_OUTPUTS * 3 // 2)
        os.kill(max(rank_pids() - others), signal.SIGKILL)
        wait_until(lambda: client.engine.status.num_recoveries == turn + 1, lambda: client.engine.status)

    assert play(client, kill) == expected
    assert client.engine.status.num_failures == 2
    assert all(num_cached(client, f"s{session}-2") > 0 for session in range(NUM_SESSIONS))
    wait_until(lambda: client.engine.load.num_free_blocks == client.engine.load.num_blocks)


def test_turns_go_to_the_replica_that_has_the_turn_before(
    checkpoint: Path, connect: Callable[..., Client], plain: Client
) -> None:
    started = [Started(checkpoint) for _ in range(2)]
    first, second = (one.engine for one in started)
    replicas = Replicas([first, second])
    client = connect(replicas)

    def send(name: str, prompt: list[int], num_outputs: int = NUM_OUTPUTS) -> Engine:
        for one in started:  # or it may have ended before we look
            one.watch.hold()
        client.send(name, prompt, num_outputs, is_cached=True)
        place = replicas._places[name]
        for one in started:
            one.watch.go_on()
        return place

    def answer(name: str, prompt: list[int]) -> list[int]:
        plain.send(name, prompt, NUM_OUTPUTS)
        assert client.tokens(name) == plain.tokens(name)
        return client.tokens(name)

    # Two sessions that do not begin alike, one on each replica.
    started[0].watch.hold()
    histories = {name: random_prompt(seed, 400) for seed, name in enumerate("ab", 50)}
    client.send("a-0", histories["a"], NUM_OUTPUTS, is_cached=True)
    homes = {"a": replicas._places["a-0"], "b": send("b-0", histories["b"])}
    assert homes == {"a": first, "b": second}
    started[0].watch.go_on()
    for turn in range(3):
        for name, history in histories.items():
            history += answer(f"{name}-{turn}", history)
            num_known = len(history) - 1  # the last output token is never computed
            history += random_prompt(60 + turn, 30)
            assert send(f"{name}-{turn + 1}", history) is homes[name]
            client.wait(f"{name}-{turn + 1}")
            assert num_cached(client, f"{name}-{turn + 1}") == whole_granules(num_known)


def test_sessions_that_begin_alike_are_answered_the_same_by_two_replicas(
    checkpoint: Path, connect: Callable[..., Client], expected: Answers
) -> None:
    client = connect(Replicas([Started(checkpoint, **SMALL_STEPS).engine for _ in range(2)]))
    assert play(client) == expected
    # Wherever they ran first, both replicas have the common prefix by then.
    assert all(num_cached(client, f"s{session}-2") >= whole_granules(len(SYSTEM)) for session in range(NUM_SESSIONS))
    wait_until(lambda: client.engine.load.num_free_blocks == client.engine.load.num_blocks)


@pytest.mark.parametrize(
    ("layout", "shard_tokens"),
    [(ParallelLayout(), None), (ParallelLayout(spp=2), None), (ParallelLayout(kvp=2), 1024)],
    ids=["single", "spp2", "kvp2"],
)
def test_siblings_of_a_request_that_is_aborted_while_it_computes_their_prefix_are_answered(
    checkpoint: Path, connect: Callable[..., Client], plain: Client, layout: ParallelLayout, shard_tokens: int | None
) -> None:
    started = Started(checkpoint, layout=layout, shard_tokens=shard_tokens, **SMALL_STEPS)
    client = connect(started.engine)
    stem = random_prompt(80, 1000)
    names = [f"sibling-{index}" for index in range(3)]
    prompts = {name: [*stem, *random_prompt(81 + index, 50)] for index, name in enumerate(names)}
    were_waiting: list[int] = []

    def abort_lead(scheduler: Scheduler) -> None:
        lead = scheduler.sequence("lead")
        if lead is not None and lead.num_computed_tokens > 200 and not were_waiting:
            waiting = [seq for seq in scheduler.sequences if scheduler.awaited(seq) is lead]
            were_waiting.append(len(waiting))
            client.engine.abort("lead")

    started.watch.on_batch = abort_lead
    started.watch.hold()
    client.send("lead", [*stem, 5, 6, 7], 500, is_cached=True)
    for name, prompt in prompts.items():
        client.send(name, prompt, NUM_OUTPUTS, is_cached=True)
        plain.send(f"{layout} {name}", prompt, NUM_OUTPUTS)
    started.watch.go_on()
    for name in names:
        assert client.tokens(name) == plain.tokens(f"{layout} {name}")
        # They go on behind what the aborted one had computed.
        assert num_cached(client, name) >= 192
    assert were_waiting == [3]
    assert client.deliveries.get("lead", []) == []
    wait_until(lambda: client.engine.load.num_free_blocks == client.engine.load.num_blocks)


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_turn_after_one_whose_decode_was_preempted_is_answered_the_same(
    checkpoint: Path, connect: Callable[..., Client], plain: Client, has_cache: bool
) -> None:
    # 40 blocks hold 640 tokens; the first turns come to 4 x 300, the second ones to 4 x 350.
    started = Started(checkpoint, kv_blocks=40, has_cache=has_cache)
    client = connect(started.engine)
    histories = [random_prompt(90 + session, 100) for session in range(4)]
    for turn, num_outputs in enumerate((200, 30)):
        for session, history in enumerate(histories):
            name = f"{session}-{turn}"
            client.send(name, history, num_outputs, is_cached=True, session_id=f"s{session}")
            plain.send(f"{has_cache} {name}", history, num_outputs)
        for session, history in enumerate(histories):
            answer = client.tokens(f"{session}-{turn}")
            assert answer == plain.tokens(f"{has_cache} {session}-{turn}")
            history += [*answer, *random_prompt(95 + session, 20)]
    assert started.watch.num_preempted > 0
    # How much of it is left depends on which turns came to compute first.
    assert any(num_cached(client, f"{session}-1") for session in range(4)) == has_cache
    wait_until(lambda: client.engine.load.num_free_blocks == client.engine.load.num_blocks)
