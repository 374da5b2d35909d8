"""What is counted and noted of a request on its way: when it was first scheduled, what it lost, how often."""

from __future__ import annotations

import pickle
from math import inf

import pytest
from scheduler_bench import COST, Bench, request

from megatron_medha.core.batch import Aborted, Arrived, FirstStageDone, Output, Preempted, RanksLost, Rejected, TokenOut
from megatron_medha.core.kv.sequence import LIFECYCLE, Sequence, Status
from megatron_medha.core.scheduling.step_budget import min_efficient_step_s


def test_it_is_first_scheduled_once_however_often_it_starts_again() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=1000, num_out=5))
    assert bench.sequence("a").first_scheduled_s is None
    bench.now_s = 3.0
    bench.step()
    assert bench.sequence("a").first_scheduled_s == 3.0
    bench.step()
    bench.handle(RanksLost("test"))
    bench.step()
    assert bench.sequence("a").first_scheduled_s == 3.0


def test_every_loss_of_its_kv_is_counted_and_a_wait_is_none() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=10, num_out=9), request("b", num_tokens=10))
    counts = []
    for _ in range(3):
        bench.step()
        bench.handle(RanksLost("test"))
        counts.append(bench.sequence("a").num_preemptions)
        bench.handle(RanksLost("again"))  # nothing is left to be lost
    assert counts == [1, 2, 3]


def test_a_decode_that_gives_up_its_memory_counts_it_and_starts_from_nothing() -> None:
    bench = Bench(num_blocks=4)
    bench.arrive(request("a", num_tokens=7, num_out=8), request("b", num_tokens=7, num_out=8))
    lost: list[Output] = []
    while not lost:
        lost = [output for output in bench.step()[1] if isinstance(output, Preempted)]
    (preempted,) = lost
    seq = bench.sequence(preempted.request_id)
    assert isinstance(preempted, Preempted) and preempted.num_tokens_lost == 8
    assert (seq.num_preemptions, seq.status, seq.num_output_tokens) == (1, Status.WAITING, 2)
    assert (seq.num_scheduled_tokens, seq.num_first_stage_tokens, seq.num_computed_tokens) == (0, 0, 0)
    assert seq.remaining_work_s == bench.scheduler.predicted_prefill_s(9)
    (other,) = (one for one in bench.scheduler.sequences if one is not seq)
    assert other.num_preemptions == 0


def test_nobody_gives_up_somebody_whose_answer_is_being_read() -> None:
    bench = Bench(min_deadline_s=0.01)
    bench.arrive(request("a", num_tokens=2000, num_out=9))
    assert bench.sequence("a").triage_deadline_s < inf
    bench.run_until(lambda: bench.sequence("a").num_output_tokens == 1)
    bench.handle(RanksLost("test"))
    assert bench.sequence("a").triage_deadline_s == inf


def test_a_prompt_that_lost_its_ranks_before_its_first_token_keeps_its_deadline() -> None:
    bench = Bench(min_deadline_s=0.01)
    bench.arrive(request("a", num_tokens=2000, num_out=9))
    bench.step()
    triage_deadline_s = bench.sequence("a").triage_deadline_s
    bench.handle(RanksLost("test"))
    assert bench.sequence("a").triage_deadline_s == triage_deadline_s < inf


def test_cursors_follow_a_chunk_through_the_stages() -> None:
    bench = Bench(spp=3)
    bench.arrive(request("a", num_tokens=1000))
    first = bench.schedule()
    count = first.num_tokens
    seq = bench.sequence("a")

    def cursors() -> tuple[int, int, int, int]:
        return (
            seq.num_scheduled_tokens, seq.num_first_stage_tokens, seq.num_computed_tokens, seq.num_batches_in_flight
        )  # fmt: skip

    assert (cursors(), seq.last_chunk_tokens) == ((count, 0, 0, 1), count)
    bench.handle(FirstStageDone(first.batch_id))
    assert cursors() == (count, count, 0, 1)
    second = bench.schedule()
    assert cursors() == (count + second.num_tokens, count, 0, 2)
    bench.complete(first)
    assert cursors() == (count + second.num_tokens, count, count, 1)
    assert seq.num_unscheduled_tokens == 1000 - count - second.num_tokens
    bench.complete(second)  # it also tells that the first stage is free
    assert cursors() == (count + second.num_tokens, count + second.num_tokens, count + second.num_tokens, 0)


def test_batches_in_flight_are_those_that_have_not_left_the_last_stage() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a", num_tokens=1000))
    assert bench.scheduler.num_batches_in_flight == 0
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    second = bench.schedule()
    assert bench.scheduler.num_batches_in_flight == 2
    bench.complete(first)
    bench.complete(second)
    assert bench.scheduler.num_batches_in_flight == 0
    assert (first.batch_id, second.batch_id, bench.schedule().batch_id) == (0, 1, 2)


def test_the_scheduler_tells_who_lives() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a"), request("b"))
    assert (bench.scheduler.num_sequences, bench.scheduler.spp) == (2, 2)
    assert bench.scheduler.sequence("b") is bench.sequence("b")
    assert bench.scheduler.sequence("c") is None
    bench.handle(Aborted("b"))
    assert bench.scheduler.num_sequences == 1 and bench.scheduler.sequence("b") is None


def test_a_batch_tells_when_it_was_made_and_what_was_believed_of_it() -> None:
    bench = Bench(step_budget_s=0.07)
    bench.arrive(request("a", num_tokens=10))
    bench.now_s = 2.0
    batch = bench.schedule()
    assert (batch.created_s, batch.budget_s, batch.num_tokens) == (2.0, 0.07, 10)
    assert batch.predicted_s == COST.linear_s(10, 1) + COST.attention_s(0, 10)


def test_a_request_that_fails_is_told_that_it_is_not_its_fault_and_one_that_cannot_run_that_it_is() -> None:
    bench = Bench(num_blocks=10)
    bench.arrive(request("a"))
    (rejected,) = bench.handle(Arrived(request("a")))
    assert rejected == Rejected("a", "request id a is already in use", True)
    (rejected,) = bench.handle(Arrived(request("b", num_tokens=0)))
    assert rejected == Rejected("b", "a request needs at least one prompt token and one output token", True)
    (rejected,) = bench.handle(Arrived(request("c", num_tokens=30, num_out=11)))
    assert rejected == Rejected(
        "c", "30 prompt tokens and up to 11 output tokens exceed the 40 tokens one request may have", True
    )
    _, outputs = bench.step(failed=(("a", "no such token"),))
    assert outputs == [Rejected("a", "no such token", False)]


def test_a_stop_token_goes_before_a_length_reached_by_the_same_token() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=2))
    bench.step()
    _, (output,) = bench.step(stopped=("a",))
    assert isinstance(output, TokenOut) and output.finish_reason is not None and output.finish_reason.value == "stop"


def test_a_decode_is_in_no_batch_while_the_last_one_runs() -> None:
    bench = Bench(spp=2)
    bench.arrive(request("a", num_out=5))
    bench.step()
    batch = bench.schedule()
    bench.handle(FirstStageDone(batch.batch_id))
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.complete(batch)
    assert bench.sequence("a").num_output_tokens == 2


def test_a_request_survives_a_pickle_and_keeps_every_field() -> None:
    full = request(
        "a", num_tokens=3, num_out=2, at_s=1.5, ttft_slo_s=0.5, tpot_slo_s=0.1, priority=-2, deadline_multiplier=2.0,
        min_deadline_s=0.3, slo_class="chat",
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(full)) == full


def fresh(status: Status = Status.WAITING) -> Sequence:
    seq = Sequence(request=request("a", num_tokens=7), deadline_s=3.0, total_work_s=2.0)
    seq.status = status
    return seq


def test_a_new_sequence_has_done_nothing() -> None:
    seq = fresh()
    assert (seq.num_known_tokens, seq.num_unscheduled_tokens, seq.request_id) == (7, 7, "a")
    assert (seq.triage_deadline_s, seq.margin_s, seq.triage_s) == (inf, 0.0, inf)
    assert (seq.num_scheduled_tokens, seq.num_first_stage_tokens, seq.num_computed_tokens) == (0, 0, 0)
    assert (seq.num_output_tokens, seq.num_preemptions, seq.num_batches_in_flight) == (0, 0, 0)
    assert (seq.last_chunk_tokens, seq.capacity_tokens, seq.grow_tokens) == (0, 0, 0)
    assert (seq.remaining_work_s, seq.first_scheduled_s) == (0.0, None)
    assert (seq.block_table.num_blocks, seq.block_table.kvp_ranks, seq.block_table.unsent) == (0, (), [])


def test_its_known_tokens_are_those_of_the_prompt_and_the_answer_so_far() -> None:
    seq = fresh()
    seq.num_output_tokens, seq.num_scheduled_tokens = 3, 4
    assert (seq.num_known_tokens, seq.num_unscheduled_tokens) == (10, 6)


def test_it_is_lost_when_what_is_left_takes_longer_than_there_is_time() -> None:
    seq = fresh()
    seq.triage_deadline_s, seq.remaining_work_s = 5.0, 2.0
    assert seq.triage_s == 3.0


@pytest.mark.parametrize("status", Status)
def test_what_a_status_says_of_a_sequence(status: Status) -> None:
    seq = fresh(status)
    assert seq.is_waiting == (status is Status.WAITING)
    assert seq.is_prefill == (status in (Status.WAITING, Status.PREFILLING))
    assert seq.is_done == (status in (Status.FINISHED, Status.ABORTED)) == (not LIFECYCLE[status])


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("to", Status)
def test_a_sequence_moves_along_its_life_only(status: Status, to: Status) -> None:
    ways = {
        "waiting": {"prefilling", "aborted"},
        "prefilling": {"decoding", "finished", "waiting", "aborted"},
        "decoding": {"finished", "waiting", "aborted"},
        "finished": set(),
        "aborted": set(),
    }
    seq = fresh(status)
    if to.value in ways[status.value]:
        seq.move_to(to)
        assert seq.status is to
    else:
        with pytest.raises(AssertionError, match=f"^a: {status.value} -> {to.value}"):
            seq.move_to(to)


def test_the_shortest_fair_step_spends_98_of_100_of_the_time_that_a_full_one_spends_on_tokens() -> None:
    shortest_s = min_efficient_step_s(0.05, 0.01)
    assert (shortest_s - 0.01) / shortest_s == pytest.approx(0.98 * (0.05 - 0.01) / 0.05)

