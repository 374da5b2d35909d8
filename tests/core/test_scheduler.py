"""A request's way through the scheduler, and over KVP ranks and pipeline stages, event by event."""

from __future__ import annotations

import pytest
from scheduler_bench import Bench, request

from megatron_medha.core.batch import Arrived, Batch, FinishReason, FirstStageDone, Rejected, TokenOut
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.request import Request


def test_a_lone_request_is_prefilled_and_decoded_to_its_length() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=10, num_out=3))
    batch, outputs = bench.step()
    (chunk,) = batch.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples_token) == (0, 10, True)
    assert batch.kv_ops == (append_op("a", 0, [Extent(0, 3)]),)
    assert outputs == [TokenOut("a", 0, None)]
    assert [output.finish_reason for output in bench.run()] == [None, FinishReason.LENGTH]
    bench.assert_empty()


def test_a_stop_token_ends_a_request_early() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=10))
    bench.step()
    _, outputs = bench.step(stopped=("a",))
    assert outputs == [TokenOut("a", 1, FinishReason.STOP)]
    bench.assert_empty()


def test_a_request_that_failed_ends_alone() -> None:
    bench = Bench()
    bench.arrive(request("a"), request("b"))
    _, outputs = bench.step(failed=(("a", "no such token"),))
    assert outputs == [Rejected("a", "no such token", is_client_fault=False), TokenOut("b", 0, None)]
    assert len(bench.run()) == 3
    bench.assert_empty()


def test_a_prompt_that_fills_the_whole_context_is_computed_for_its_own_scores() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=4000, num_out=1))
    outputs = bench.run()
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH]
    bench.assert_empty()


def test_what_ended_is_released_with_the_next_batch_once() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=1), request("b", num_out=3))
    bench.step()
    batches = [bench.step()[0] for _ in range(2)]
    assert [batch.released for batch in batches] == [("a",), ()]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (request("a", num_tokens=0), "at least one prompt token"),
        (request("a", num_out=0), "at least one prompt token"),
        (request("a", num_tokens=3990, num_out=11), "exceed the 4000 tokens"),
        (request("a", num_tokens=4000, num_out=2), "exceed the 4000 tokens"),
        (request("a", num_tokens=4001, num_out=1), "exceed the 4000 tokens"),
    ],
)
def test_what_can_never_run_is_rejected_at_once(bad: Request, why: str) -> None:
    bench = Bench()
    (output,) = bench.handle(Arrived(bad))
    assert isinstance(output, Rejected) and why in output.why and output.is_client_fault
    bench.assert_empty()


def test_an_id_in_use_is_rejected_and_the_first_request_unharmed() -> None:
    bench = Bench()
    bench.arrive(request("a"))
    (output,) = bench.handle(Arrived(request("a")))
    assert isinstance(output, Rejected) and "already in use" in output.why
    assert len(bench.run()) == 4


def test_the_largest_request_that_fits_the_memory_runs() -> None:
    bench = Bench(num_blocks=10)
    bench.arrive(request("a", num_tokens=30, num_out=10))
    assert len(bench.run()) == 10
    bench.assert_empty()




def test_a_chunk_ends_where_its_shard_does_and_the_next_begins_on_another_rank() -> None:
    bench = Bench(num_blocks=20, kvp=2, shard_tokens=40)
    bench.arrive(request("a", num_tokens=60, num_out=2))
    batches = [bench.step()[0] for _ in range(3)]
    first, second, third = (batch.chunks[0] for batch in batches)
    assert (first.start, first.num_tokens, first.kvp_ranks) == (0, 40, (0,))
    assert (second.start, second.num_tokens, second.kvp_ranks) == (40, 20, (0, 1))
    assert (third.num_tokens, third.kvp_ranks) == (1, (0, 1))
    assert [batch.kv_ops for batch in batches] == [
        (append_op("a", 0, [Extent(0, 10)]), append_op("a", 1, [Extent(0, 5)])),
        (),
        (append_op("a", 1, [Extent(5, 1)]),),
    ]  # fmt: skip





def test_the_next_chunk_starts_when_the_last_has_left_the_first_stage() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a", num_tokens=1000))
    first = bench.schedule()
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.handle(FirstStageDone(first.batch_id))
    second = bench.schedule()
    assert second.chunks[0].start == first.chunks[0].num_tokens
    assert bench.sequence("a").num_computed_tokens == 0
    bench.handle(FirstStageDone(second.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None, "as many batches in flight as stages"


def test_a_prompt_decodes_when_its_last_chunk_has_left_the_last_stage() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a"))
    batch = bench.schedule()
    bench.handle(FirstStageDone(batch.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.complete(batch)
    assert bench.schedule().chunks[0].start == 8


def test_asking_when_nothing_can_run_changes_no_later_decision() -> None:
    def batches(num_idle_questions: int) -> list[Batch]:
        bench = Bench(num_blocks=30, spp=2, progress_share=0.5)
        bench.arrive(request("a", num_tokens=100, num_out=3))
        bench.now_s, made = 3.0, []
        bench.arrive(request("b", num_tokens=90, at_s=1.0), request("c", num_tokens=90, at_s=2.0))
        while (batch := bench.scheduler.schedule(bench.now_s)) is not None:
            made.append(batch)
            bench.handle(FirstStageDone(batch.batch_id))
            for _ in range(num_idle_questions):
                idle = bench.scheduler.schedule(bench.now_s)
                assert idle is None
            bench.complete(batch)
        return made

    assert batches(0) == batches(5)


def test_a_decode_is_given_its_next_block_a_token_before_it_needs_it() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=6, num_out=8))
    steps = [bench.step()[0] for _ in range(8)]
    # Blocks hold 4 tokens; the request's last token, at position 13, is never computed.
    assert [(batch.chunks[0].start, op.extents) for batch in steps for op in batch.kv_ops] == [
        (0, ((0, 2),)), (7, ((2, 1),)), (11, ((3, 1),))
    ]  # fmt: skip
    bench.assert_empty()
