"""The stage schedule: both ends of every link agree, nothing waits for ever, chunks of one prompt fill the stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.stage_plan import stage_plan
from tests.core.stage_schedule import GroupCoord, Operation, OperationKind, dry_run, exchanged_tokens, stream_schedule


def batch(batch_id: int, *chunks: Chunk) -> Batch:
    return Batch(batch_id=batch_id, chunks=chunks, released=(), created_s=0.0, budget_s=0.0, predicted_s=0.0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Batch], int, int]:
    """Batches of a few chunks on any subset of kvp ranks, in any order."""
    num_stages, kvp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    found = []
    for batch_id in range(draw(st.integers(1, 6))):
        chunks = []
        for index in range(draw(st.integers(1, 6))):
            ranks = draw(st.permutations(range(kvp)))[: draw(st.integers(1, kvp))]
            chunks.append(Chunk(f"r{index}", 0, draw(st.integers(1, 9)), False, tuple(ranks)))
        found.append(batch(batch_id, *chunks))
    return found, num_stages, kvp


@given(batches())
def test_any_batches_run_without_deadlock_and_both_ends_of_every_link_agree(
    case: tuple[list[Batch], int, int],
) -> None:
    found, num_stages, kvp = case
    schedule = stream_schedule(found, num_stages=num_stages, kvp=kvp, num_layers=2)
    run = dry_run(schedule)
    for place in schedule:
        assert list(run.finished_at[place]) == [b.batch_id for b in found if b.chunks_on(place.kvp)]


@given(batches())
def test_every_row_is_exchanged_with_exactly_the_other_ranks_of_its_chunk(case: tuple[list[Batch], int, int]) -> None:
    found, _, kvp = case
    for b in found:
        for rank in range(kvp):
            plan = stage_plan(b.chunks_on(rank), rank)
            exchanged = exchanged_tokens(plan, b.chunks_on(rank), rank)
            for peer in range(kvp):
                expected = sum(c.num_tokens for c in b.chunks_on(rank) if peer in c.kvp_ranks and peer != rank)
                assert exchanged.get(peer, 0) == expected
            assert sorted(plan.order) == list(range(len(b.chunks_on(rank))))


@pytest.mark.parametrize(("num_chunks", "num_stages"), [(1, 1), (8, 2), (8, 4), (3, 4)])
def test_the_chunks_of_one_prompt_fill_the_stages(num_chunks: int, num_stages: int) -> None:
    prompt = [batch(index, Chunk("a", 32 * index, 32, False)) for index in range(num_chunks)]
    run = dry_run(stream_schedule(prompt, num_stages=num_stages, kvp=1))
    assert run.duration == num_chunks + num_stages - 1


def test_short_requests_of_other_kvp_ranks_do_not_wait_for_one_another() -> None:
    found = [batch(0, Chunk("a", 0, 8, True, (0,)), Chunk("b", 0, 8, True, (1,)))]
    schedule = stream_schedule(found, num_stages=1, kvp=2)
    assert all(operation.kind is OperationKind.COMPUTE for todo in schedule.values() for operation in todo)
    assert dry_run(schedule).duration == 1


def test_a_place_without_work_sends_and_receives_nothing() -> None:
    schedule = stream_schedule([batch(0, Chunk("a", 0, 8, True, (1,)))], num_stages=2, kvp=2)
    assert schedule[GroupCoord(0, 0)] == schedule[GroupCoord(1, 0)] == ()
    assert [operation.kind for operation in schedule[GroupCoord(1, 1)]] == [
        OperationKind.RECEIVE,
        OperationKind.COMPUTE,
    ]


def test_a_link_whose_ends_disagree_is_found() -> None:
    schedule = stream_schedule([batch(0, Chunk("a", 0, 8, True))], num_stages=2, kvp=1)
    first, *rest = schedule[GroupCoord(1, 0)]
    schedule[GroupCoord(1, 0)] = (first._replace(num_tokens=9), *rest)
    with pytest.raises(AssertionError, match="sent"):
        dry_run(schedule)


def test_ranks_that_wait_for_one_another_are_found() -> None:
    here, there = GroupCoord(0, 0), GroupCoord(0, 1)
    schedule = {
        here: (Operation(OperationKind.MERGE, 0, 1, 0, there), Operation(OperationKind.POST, 0, 1, 0, there)),
        there: (Operation(OperationKind.MERGE, 0, 1, 0, here), Operation(OperationKind.POST, 0, 1, 0, here)),
    }
    with pytest.raises(AssertionError, match="deadlock: stage 0 kvp 0 waits"):
        dry_run(schedule)


def test_what_nobody_receives_is_found() -> None:
    with pytest.raises(AssertionError, match="never received"):
        dry_run({GroupCoord(0, 0): (Operation(OperationKind.SEND, 0, 1, peer=GroupCoord(1, 0)),), GroupCoord(1, 0): ()})
