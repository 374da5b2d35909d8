"""Aborts, in every state a request can be in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scheduler_bench import Bench, request

from megatron_medha.core.batch import Aborted, Batch, FirstStageDone, RanksLost, TokenOut
from megatron_medha.core.kv.sequence import Status


def waiting(bench: Bench) -> Batch | None:
    bench.arrive(request("a"))
    return None


def prefill_in_flight(bench: Bench) -> Batch:
    bench.arrive(request("a"))
    return bench.schedule()


def paused_between_chunks(bench: Bench) -> None:
    bench.arrive(request("a", num_tokens=1000))
    bench.step()
    assert bench.sequence("a").status is Status.PREFILLING


def chunk_in_flight(bench: Bench) -> Batch:
    paused_between_chunks(bench)
    return bench.schedule()


def decoding(bench: Bench) -> None:
    bench.arrive(request("a"))
    bench.step()
    assert bench.sequence("a").status is Status.DECODING


def decode_in_flight(bench: Bench) -> Batch:
    decoding(bench)
    return bench.schedule()


def memory_preempted(bench: Bench) -> None:
    bench.arrive(request("a", num_out=30))
    bench.step()
    bench.handle(RanksLost("test"))
    assert bench.sequence("a").status is Status.WAITING and bench.sequence("a").num_output_tokens == 1


def finished_in_flight(bench: Bench) -> Batch:
    """Already aborted, but its last batch is still out: nothing more may happen to it."""
    batch = decode_in_flight(bench)
    bench.handle(Aborted("a"))
    return batch


STATES = [
    waiting, prefill_in_flight, paused_between_chunks, chunk_in_flight, decoding, decode_in_flight, memory_preempted,
    finished_in_flight,
]  # fmt: skip


@pytest.mark.parametrize("reach", STATES, ids=lambda reach: reach.__name__)
def test_an_abort_ends_a_request_in_every_state_and_returns_its_blocks(reach: Callable[[Bench], Batch | None]) -> None:
    bench = Bench(num_blocks=400)
    batch = reach(bench)
    assert bench.handle(Aborted("a")) == []
    if batch is not None:
        assert bench.memory.num_free_blocks < 400, "blocks in use by a batch in flight stay taken"
        assert bench.complete(batch) == []
    bench.assert_empty()


def test_an_abort_ends_a_request_that_waits_for_a_block() -> None:
    bench = Bench(num_blocks=3, spp=2)
    bench.arrive(request("a", num_tokens=4, num_out=5))
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    bench.arrive(request("b", num_tokens=8, num_out=4))
    second = bench.schedule()
    assert bench.complete(first) == [TokenOut("a", 0, None)]
    bench.handle(FirstStageDone(second.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None, "a waits for a block, b is in flight"
    bench.handle(Aborted("a"))
    assert bench.complete(second) == [TokenOut("b", 1, None)]
    assert len(bench.run()) == 3
    bench.assert_empty()


def test_an_abort_of_an_unknown_request_changes_nothing() -> None:
    bench = Bench()
    assert bench.handle(Aborted("nobody")) == []
    bench.assert_empty()
