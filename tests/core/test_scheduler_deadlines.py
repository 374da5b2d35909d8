"""Deadlines, margins, targets and budgets that the scheduler derives, where a token takes a second and a step two."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from scheduler_bench import Bench, request

from megatron_medha.core.batch import Arrived, FirstStageDone, RanksLost
from megatron_medha.core.cost.step_cost import CostModel, StepLoad
from megatron_medha.core.request import Rejection, Request, rejection

STEP_S = 2.0  # what every step takes whatever it computes


class Learning(CostModel):
    """Two seconds a step and one a token, times a factor that can be changed; it notes what it is shown."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.num_revisions = 0
        self.seen: list[tuple[int, float]] = []

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        return self.factor * (STEP_S + num_tokens)

    def attention_s(self, start: int, num_tokens: int) -> float:
        return 0.0

    def decode_attention_s(self, context: int) -> float:
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None:
        self.seen.append((load.num_tokens, duration_s))

    @property
    def revision(self) -> int:
        return self.num_revisions


def bench_of(spp: int = 1, **more: Any) -> Bench:
    options = {"step_budget_s": 66.0, "tile_tokens": 1, "deadline_multiplier": 3.0, "min_deadline_s": 10.0}
    return Bench(cost=Learning(), spp=spp, num_blocks=20_000, **{**options, **more})


def arrived(bench: Bench, one: Request) -> Any:
    bench.arrive(one)
    return bench.sequence(one.request_id)


@pytest.mark.parametrize("spp", [1, 2, 4])
def test_stages_divide_the_predicted_time_of_a_prefill(spp: int) -> None:
    bench = bench_of(spp)
    assert bench.scheduler.predicted_prefill_s(64) == 66.0 / spp
    seq = arrived(bench, request("a", num_tokens=64))
    assert seq.total_work_s == seq.remaining_work_s == 66.0 / spp


def test_a_target_is_a_multiple_of_the_work_but_never_less_than_the_least() -> None:
    bench = bench_of()
    assert bench.scheduler.ttft_target_s(request("a"), 20.0) == 60.0
    assert bench.scheduler.ttft_target_s(request("a"), 3.0) == 10.0
    assert bench.scheduler.ttft_target_s(request("a", deadline_multiplier=5.0), 20.0) == 100.0
    assert bench.scheduler.ttft_target_s(request("a", deadline_multiplier=0.0), 20.0) == 10.0
    assert bench.scheduler.ttft_target_s(request("a", min_deadline_s=70.0), 20.0) == 70.0
    assert bench.scheduler.ttft_target_s(request("a", min_deadline_s=0.0), 1.0) == 3.0
    assert bench.scheduler.ttft_target_s(request("a", ttft_slo_s=0.5, min_deadline_s=70.0), 20.0) == 0.5


def test_a_deadline_counts_from_the_arrival() -> None:
    bench = bench_of()
    bench.now_s = 9.0
    seq = arrived(bench, request("a", num_tokens=64, at_s=7.0))
    assert seq.deadline_s == 7.0 + 3.0 * 66.0
    assert arrived(bench, request("b", num_tokens=64, at_s=7.0, ttft_slo_s=0.5)).deadline_s == 7.5


def test_the_deadline_that_triage_goes_by_is_the_later_of_the_target_and_of_what_the_work_alone_would_give() -> None:
    bench = bench_of()
    ours = arrived(bench, request("ours", num_tokens=64, at_s=7.0))
    hasty = arrived(bench, request("hasty", num_tokens=64, at_s=7.0, ttft_slo_s=0.5))
    patient = arrived(bench, request("patient", num_tokens=64, at_s=7.0, ttft_slo_s=999.0))
    assert [seq.triage_deadline_s for seq in (ours, hasty, patient)] == [205.0, 205.0, 1006.0]
    assert ours.triage_s == 205.0 - 66.0
    assert arrived(bench_of(has_triage=False), request("a")).triage_deadline_s == inf


@pytest.mark.parametrize(("slo_s", "margin_s"), [(1000.0, 8 * 66.0), (660.0, 528.0), (500.0, 400.0), (1.0, 0.8)])
def test_slack_keeps_eight_steps_in_hand_and_of_a_short_target_four_fifths(slo_s: float, margin_s: float) -> None:
    assert arrived(bench_of(), request("a", ttft_slo_s=slo_s)).margin_s == margin_s


def test_the_margin_counts_in_steps_that_are_possible() -> None:
    bench = bench_of(step_budget_s=1.0, slack_margin_steps=2.0)
    assert arrived(bench, request("a", ttft_slo_s=1000.0)).margin_s == 2.0 * 2 * (STEP_S + 1)


def test_a_prefill_is_deprioritised_if_it_is_late_and_takes_more_than_a_step() -> None:
    bench = bench_of(progress_share=0.0)
    one, more = (arrived(bench, request(f"a{count}", num_tokens=count, ttft_slo_s=1.0)) for count in (64, 65))
    for seq in (one, more):
        seq.triage_deadline_s, seq.remaining_work_s = 50.0, 20.0
    assert not bench.scheduler.is_deprioritized(more, 30.0)
    assert bench.scheduler.is_deprioritized(more, 30.1)
    assert not bench.scheduler.is_deprioritized(one, 30.1)
    more.num_scheduled_tokens = 1
    assert not bench.scheduler.is_deprioritized(more, 30.1)


def test_what_is_left_of_a_prefill_falls_with_every_chunk_and_the_deadline_stays() -> None:
    bench = bench_of()
    seq = arrived(bench, request("a", num_tokens=192))
    deadline_s, whole_s = seq.deadline_s, seq.total_work_s
    assert whole_s == pytest.approx(3 * 66.0)
    bench.step()
    assert (seq.deadline_s, seq.total_work_s, seq.last_chunk_tokens) == (deadline_s, whole_s, 64)
    assert seq.remaining_work_s == pytest.approx(2 * 66.0)
    bench.step()
    bench.schedule()
    assert seq.remaining_work_s == 0.0


def slower(bench: Bench, factor: float) -> None:
    """The machine turns out to be slower than believed."""
    assert isinstance(bench.scheduler.cost, Learning)
    bench.scheduler.cost.factor *= factor
    bench.scheduler.cost.num_revisions += 1


def test_deadlines_derived_from_work_follow_the_belief_of_the_work_with_the_next_chunk() -> None:
    bench = bench_of(spp=2)
    ours = arrived(bench, request("ours", num_tokens=192, at_s=1.0))
    bench.arrive(request("late", num_tokens=30, at_s=1.0))
    first = bench.schedule()
    slower(bench, 1.5)
    bench.handle(FirstStageDone(first.batch_id))
    assert ours.deadline_s == pytest.approx(1.0 + 3.0 * 99.0), "nothing has been learnt yet"
    bench.complete(first)
    bench.run_until(lambda: ours.total_work_s > 100.0)
    assert ours.total_work_s == pytest.approx(bench.scheduler.predicted_prefill_s(192))
    assert ours.deadline_s == ours.triage_deadline_s == 1.0 + 3.0 * ours.total_work_s
    assert ours.margin_s == pytest.approx(0.8 * 3.0 * ours.total_work_s)


def test_a_deadline_that_a_client_named_stays_whatever_is_learnt() -> None:
    bench = bench_of()
    seq = arrived(bench, request("a", num_tokens=192, ttft_slo_s=40.0))
    margin_s = seq.margin_s
    bench.step()
    slower(bench, 2.0)
    bench.step()
    bench.step()
    assert (seq.deadline_s, seq.margin_s) == (40.0, margin_s) and seq.total_work_s > 300.0
    assert seq.triage_deadline_s == 3.0 * seq.total_work_s


def test_a_request_that_comes_after_something_was_learnt_is_judged_by_it() -> None:
    bench = bench_of()
    slower(bench, 2.0)
    assert arrived(bench, request("a", num_tokens=8)).total_work_s == 20.0
    assert bench.scheduler._prefills.num_step_tokens == 31


def test_the_cost_model_is_shown_what_each_step_had_and_took() -> None:
    bench = bench_of()
    bench.arrive(request("a", num_tokens=100, num_out=2))
    bench.run()
    assert isinstance(bench.scheduler.cost, Learning)
    assert bench.scheduler.cost.seen == [(64, 66.0), (36, 38.0), (1, 3.0)]


def test_a_client_that_wants_tokens_sooner_shortens_steps_while_it_decodes() -> None:
    bench = bench_of()
    bench.arrive(request("eager", num_tokens=8, num_out=9, tpot_slo_s=20.0), request("other", num_tokens=8, num_out=9))
    assert bench.step()[0].budget_s == 66.0, "it does not decode yet"
    assert bench.step()[0].budget_s == 20.0
    bench.arrive(request("hasty", num_tokens=8, num_out=9, tpot_slo_s=1.0, at_s=bench.now_s))
    bench.step()
    assert bench.step()[0].budget_s == 6.0


def test_while_others_prefill_such_a_step_is_no_shorter_than_is_fair_to_them() -> None:
    bench = bench_of()
    bench.arrive(request("eager", num_tokens=8, num_out=99, tpot_slo_s=20.0))
    bench.step()
    bench.arrive(request("long", num_tokens=1000, at_s=bench.now_s))
    fair_s = 3.0 / (1 - 0.98 * (1 - 3.0 / 66.0))
    assert bench.step()[0].budget_s == pytest.approx(fair_s)
    assert fair_s > 20.0


def test_when_the_last_of_those_has_ended_steps_are_whole_again() -> None:
    bench = bench_of()
    bench.arrive(request("eager", num_tokens=8, num_out=3, tpot_slo_s=20.0), request("other", num_tokens=8, num_out=9))
    assert [bench.step()[0].budget_s for _ in range(4)] == [66.0, 20.0, 20.0, 66.0]
    assert bench.scheduler._num_tpot_slos == 0


def test_lost_ranks_forget_batches_in_flight_and_what_waited_for_memory() -> None:
    bench = bench_of(spp=2)
    bench.arrive(request("a", num_tokens=500, num_out=2))
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    bench.schedule()
    assert bench.scheduler.schedule(bench.now_s) is None
    bench.handle(RanksLost("test"))
    assert bench.scheduler.num_batches_in_flight == 0 and bench.memory.num_owners == 0
    assert bench.sequence("a").remaining_work_s == bench.scheduler.predicted_prefill_s(500)
    again = bench.schedule()
    assert (again.batch_id, again.chunks[0].start, again.chunks[0].num_tokens) == (2, 0, 64)


def test_a_batch_that_ends_frees_the_first_stage_once_and_not_while_the_next_one_is_in_it() -> None:
    bench = bench_of(spp=3)
    bench.arrive(request("a", num_tokens=1000))
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    second = bench.schedule()
    bench.complete(first)
    assert bench.scheduler.schedule(bench.now_s) is None, "the second is in the first stage"
    bench.complete(second)
    assert bench.schedule().batch_id == 2


def test_a_request_of_one_output_token_may_fill_all_of_the_memory_with_its_prompt() -> None:
    bench = Bench(cost=Learning(), num_blocks=10)
    assert bench.handle(Arrived(request("a", num_tokens=40, num_out=1))) == []
    (rejected,) = bench.handle(Arrived(request("b", num_tokens=39, num_out=2)))
    assert "39 prompt tokens and up to 2 output tokens exceed the 40 tokens" in rejected.why
    assert bench.handle(Arrived(request("c", num_tokens=38, num_out=2))) == []


def test_a_rejection_has_a_reason_for_programs_beside_the_words_for_people() -> None:
    assert rejection(request("a", num_out=0), False, 100) == Rejection(
        reason="request_rejected", message="a request needs at least one prompt token and one output token"
    )
    assert rejection(request("a"), False, 100) is None
