"""The engine over a real rank process: what clients get, in good times and in bad."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import TIMEOUT_S, Client, wait_until_ready
from real_ranks import VOCAB_SIZE, make_engine, random_prompt, rank_pids

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.core.batch import FinishReason
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import EnginePhase, ErrorDelivery, TokenDelivery
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.stats.decision_log import read_log, replay


@pytest.fixture(scope="module")
def shared_client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(make_engine(checkpoint, log=tmp_path_factory.mktemp("log") / "decisions.jsonl"))
    wait_until_ready(client.engine)
    yield client
    client.engine.stop(TIMEOUT_S)
    assert client.engine.status.phase is EnginePhase.STOPPED


def assert_all_blocks_come_back(client: Client) -> None:
    """Once idle, every block is free again."""
    client.send("probe-for-idle", random_prompt(0, 5), 1)
    client.wait("probe-for-idle")
    del client.deliveries["probe-for-idle"]
    idle = threading.Event()

    def look() -> None:
        load = client.engine.load
        if load.num_free_blocks == load.num_blocks and not load.num_decoding and not load.num_prefilling:
            idle.set()
        else:
            threading.Timer(0.02, look).start()

    look()
    assert idle.wait(TIMEOUT_S), client.engine.load


def test_requests_of_all_lengths_finish_together_and_give_every_block_back(shared_client: Client) -> None:
    for length in (1, 15, 16, 17, 500, 1500):
        shared_client.send(f"len-{length}", random_prompt(length, length), 20)
    for length in (1, 15, 16, 17, 500, 1500):
        assert len(shared_client.tokens(f"len-{length}")) == 20
    assert_all_blocks_come_back(shared_client)


def test_the_answer_does_not_depend_on_what_else_is_running(shared_client: Client) -> None:
    prompt = random_prompt(7, 300)
    shared_client.send("alone", prompt, 30)
    alone = shared_client.tokens("alone")
    for index in range(8):
        shared_client.send(f"other-{index}", random_prompt(index, 700), 30)
    shared_client.send("beside", prompt, 30)
    assert shared_client.tokens("beside") == alone
    for index in range(8):
        shared_client.wait(f"other-{index}")


def test_an_aborted_request_ends_and_gives_its_blocks_back(shared_client: Client) -> None:
    shared_client.send("doomed", random_prompt(1, 100), 1900)
    shared_client.wait("doomed", num_deliveries=3)
    shared_client.engine.abort("doomed")
    assert_all_blocks_come_back(shared_client)
    assert len(shared_client.deliveries["doomed"]) < 1900


def test_an_abort_of_an_unknown_or_finished_request_harms_nobody(shared_client: Client) -> None:
    shared_client.engine.abort("never heard of")
    shared_client.send("after", random_prompt(2, 10), 2)
    shared_client.tokens("after")
    shared_client.engine.abort("after")
    shared_client.send("after that", random_prompt(2, 10), 2)
    assert len(shared_client.tokens("after that")) == 2


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(shared_client: Client) -> None:
    shared_client.send("huge", random_prompt(3, 2000), 100)
    (delivery,) = shared_client.wait("huge")
    assert isinstance(delivery, ErrorDelivery) and delivery.is_client_fault
    assert "2000" in delivery.message and "2048" in delivery.message


def test_a_token_id_out_of_range_fails_only_its_own_request(shared_client: Client) -> None:
    shared_client.send("bad", [5, VOCAB_SIZE + 7], 4)
    shared_client.send("good", random_prompt(4, 20), 4)
    assert isinstance(shared_client.wait("bad")[-1], ErrorDelivery)
    assert len(shared_client.tokens("good")) == 4


def test_a_stop_token_ends_the_request(shared_client: Client) -> None:
    prompt = random_prompt(5, 40)
    shared_client.send("unstopped", prompt, 10)
    stop = shared_client.tokens("unstopped")[4]
    shared_client.send("stopped", prompt, 10, stop_token_ids=(stop,))
    got = shared_client.wait("stopped")
    assert got[-1].finish_reason is FinishReason.STOP and got[-1].token_id == stop
    assert len(got) <= 5


def test_prompt_logprobs_come_whole_however_the_prompt_was_chunked(shared_client: Client) -> None:
    shared_client.send("scored", random_prompt(6, 900), 1, num_prompt_logprobs=0)
    (delivery,) = shared_client.wait("scored")
    assert isinstance(delivery, TokenDelivery) and delivery.prompt_logprobs is not None
    assert [entry.token_id for entry in delivery.prompt_logprobs] == random_prompt(6, 900)[1:]


def test_a_request_that_lost_its_memory_and_was_recomputed_answers_the_same(checkpoint: Path) -> None:
    prompts = [random_prompt(seed, 100) for seed in range(4)]
    answers: list[list[list[int]]] = []
    for kv_blocks in (2048, 40):  # 40 blocks hold 640 tokens; the four come to 4 x 300
        client = Client(make_engine(checkpoint, kv_blocks=kv_blocks))
        wait_until_ready(client.engine)
        for index, prompt in enumerate(prompts):
            client.send(f"r{index}", prompt, 200)
        answers.append([client.tokens(f"r{index}") for index in range(4)])
        assert_all_blocks_come_back(client)
        client.engine.stop(TIMEOUT_S)
    assert answers[0] == answers[1]


def test_what_a_real_run_decided_replays_to_identical_batches(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    client = Client(make_engine(checkpoint, kv_blocks=60, log=log, step_budget_s=0.01))
    wait_until_ready(client.engine)
    for index in range(12):
        client.send(f"r{index}", random_prompt(index, 20 + 60 * index), 40)
    client.wait("r3", num_deliveries=5)
    client.engine.abort("r3")
    for index in range(12):
        if index != 3:
            client.wait(f"r{index}")
    client.engine.stop(TIMEOUT_S)
    with log.open(encoding="utf-8") as lines:
        header, records = read_log(lines)
        assert replay(records, SchedulerSetup.from_header(header).build()) > 40


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the rank's process through /proc")
def test_two_ranks_answer_as_one_does_also_when_one_is_killed_on_the_way(
    checkpoint: Path, shared_client: Client
) -> None:
    requests = {f"k{seed}": (random_prompt(seed, 100 + 200 * seed), 60) for seed in range(5)}
    for name, (prompt, num_outputs) in requests.items():
        shared_client.send(name, prompt, num_outputs)
    answers = {name: shared_client.tokens(name) for name in requests}

    others = rank_pids()
    # Two of them end up on both ranks.
    engine = make_engine(checkpoint, layout=ParallelLayout(kvp=2), shard_tokens=512)
    client = Client(engine)
    wait_until_ready(engine)
    for name, (prompt, num_outputs) in requests.items():
        client.send(name, prompt, num_outputs, num_prompt_logprobs=0)
    client.wait("k1", num_deliveries=5)
    os.kill(max(rank_pids() - others), signal.SIGKILL)
    assert {name: client.tokens(name) for name in requests} == answers
    for name, (prompt, _) in requests.items():
        first, *rest = client.deliveries[name]
        assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
        assert all(delivery.prompt_logprobs is None for delivery in rest)
    assert engine.status.num_failures == engine.status.num_recoveries == 1
    engine.stop(TIMEOUT_S)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the rank's process through /proc")
def test_a_killed_rank_that_may_not_start_again_ends_every_request_with_an_error(checkpoint: Path) -> None:
    others = rank_pids()
    engine = make_engine(checkpoint, recovery=RecoveryConfig(max_failures=1))
    client = Client(engine)
    wait_until_ready(engine)
    client.send("running", random_prompt(1, 50), 1900)
    client.wait("running", num_deliveries=2)
    (pid,) = rank_pids() - others
    os.kill(pid, signal.SIGKILL)
    last = client.wait("running")[-1]
    assert isinstance(last, ErrorDelivery) and not last.is_client_fault
    client.send("late", random_prompt(1, 5), 5)
    assert isinstance(client.wait("late")[-1], ErrorDelivery)
    assert engine.status.phase is EnginePhase.FAILED and "rank 0" in engine.status.detail
    engine.stop(TIMEOUT_S)


def test_a_checkpoint_that_is_not_there_fails_the_start_with_its_path(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "nowhere")
    Client(engine)
    done = threading.Event()

    def look() -> None:
        if engine.status.phase is EnginePhase.LOADING:
            threading.Timer(0.05, look).start()
        else:
            done.set()

    look()
    assert done.wait(TIMEOUT_S)
    assert engine.status.phase is EnginePhase.FAILED and "nowhere" in engine.status.detail
