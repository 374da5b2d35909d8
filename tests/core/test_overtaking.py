"""Which batches may be held, what overtakes them, and when."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from scheduler_bench import COST, Bench, request

from megatron_medha.core.batch import Aborted, Batch, FirstStageDone, Woken
from megatron_medha.core.cost.step_cost import CostModel, StepLoad
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.scheduling.chunking import Chunking, efficient_chunk_tokens
from megatron_medha.core.scheduling.overtaking import resolved
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig


class DearChunks(CostModel):
    """A step costs 1 ms, each prefill chunk in it 10 ms, a token 0.1 ms. The context costs nothing."""

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        return 1e-3 + 1e-4 * num_tokens

    def attention_s(self, start: int, num_tokens: int) -> float:
        return 1e-2 if num_tokens else 0.0

    def decode_attention_s(self, context: int) -> float:
        return 0.0

    def observe(self, load: StepLoad, duration_s: float) -> None:
        pass

    @property
    def revision(self) -> int:
        return 0


def interruptible(**options: object) -> Bench:
    return Bench(num_blocks=20_000, interruptible=True, **{"cost": DearChunks(), **options})  # type: ignore[arg-type]


def held(bench: Bench, num_tokens: int = 5000, **more: object) -> Batch:
    """A long prompt's first batch, in flight."""
    bench.arrive(request("long", num_tokens=num_tokens, **more))
    batch = bench.schedule()
    assert batch.may_be_held and batch.overtakes is None
    return batch


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [chunk.request_id for chunk in batch.chunks]


def test_a_lone_prompt_is_computed_in_chunks_as_large_as_is_efficient() -> None:
    batch = held(interruptible())
    assert batch.predicted_s > 4 * 0.05
    assert batch.predicted_s <= batch.budget_s, "such a chunk has a budget of its own"
    (chunk,) = held(interruptible(max_chunk_tokens=640)).chunks
    assert chunk.num_tokens == 640


def test_a_batch_is_not_held_where_the_option_is_off() -> None:
    bench = Bench(num_blocks=20_000)
    bench.arrive(request("long", num_tokens=5000))
    assert not bench.schedule().may_be_held
    bench.arrive(request("short"))
    assert bench.scheduler.schedule(bench.now_s) is None
    assert bench.scheduler.wakes_at_s() == inf


def test_a_short_prompt_overtakes_a_large_chunk_at_once() -> None:
    bench = interruptible()
    large = held(bench)
    bench.now_s += 0.05
    bench.arrive(request("short", at_s=bench.now_s))
    batch = bench.schedule()
    assert names(batch) == ["short"] and batch.overtakes == large.batch_id and not batch.may_be_held


def test_one_batch_overtakes_at_a_time_and_the_next_when_it_has_completed() -> None:
    bench = interruptible()
    large = held(bench)
    bench.arrive(request("s0"))
    first = bench.schedule()
    bench.arrive(request("s1"))
    assert bench.scheduler.schedule(bench.now_s) is None
    assert [out.request_id for out in bench.complete(first)] == ["s0"]
    assert names(bench.schedule()) == ["s1"]
    assert bench.scheduler.num_batches_in_flight == 2
    bench.complete(large)
    assert bench.scheduler.schedule(bench.now_s) is None, "the one that overtook is still on the first stage"


def test_nothing_overtakes_a_batch_that_is_about_to_end() -> None:
    bench = interruptible()
    large = held(bench)
    bench.now_s += large.predicted_s - 0.005
    bench.arrive(request("short", at_s=bench.now_s))
    assert bench.scheduler.schedule(bench.now_s) is None


def test_a_batch_that_takes_longer_than_predicted_is_overtaken_all_the_same() -> None:
    bench = interruptible()
    large = held(bench)
    bench.now_s += 3 * large.predicted_s
    bench.arrive(request("short", at_s=bench.now_s))
    assert names(bench.schedule()) == ["short"]


def test_an_overtaking_that_would_make_the_held_one_late_is_not_made() -> None:
    bench = interruptible()
    work_s = bench.scheduler.predicted_prefill_s(1000)
    large = held(bench, 1000, ttft_slo_s=work_s + 0.1)
    assert large.predicted_s <= 0.1, "nor is a chunk longer than the slack that is left to give"
    bench.complete(large)
    bench = interruptible()
    held(bench, 1000, ttft_slo_s=work_s + 1.0)
    bench.arrive(request("medium", num_tokens=150))
    medium = bench.schedule()
    assert names(medium) == ["medium"]
    seq = bench.sequence("long")
    seq.deadline_s = bench.now_s + large.predicted_s  # as if the cost model had learnt otherwise
    bench.complete(medium)
    seq.deadline_s = bench.now_s + 0.3 + seq.remaining_work_s
    bench.arrive(request("other", num_tokens=150, at_s=bench.now_s))
    flight = bench.scheduler._in_flight[0]
    rest_s = bench.scheduler._overtaking._rest_s(flight, bench.now_s)
    seq.deadline_s = bench.now_s + rest_s + seq.remaining_work_s + 0.01
    assert bench.scheduler.schedule(bench.now_s) is None
    seq.deadline_s = bench.now_s + rest_s + seq.remaining_work_s + 1.0
    assert names(bench.schedule()) == ["other"]


def test_an_overtaking_that_costs_more_than_it_saves_is_not_made() -> None:
    bench = interruptible()
    held(bench, 400)
    bench.now_s += 0.02
    bench.arrive(request("alike", num_tokens=380, at_s=bench.now_s))
    assert bench.scheduler.schedule(bench.now_s) is None, "each would delay the other by about as much"
    bench.arrive(request("short", num_tokens=20, at_s=bench.now_s))
    assert names(bench.schedule()) == ["short"]


def test_under_first_come_first_served_nobody_overtakes() -> None:
    bench = interruptible(policy="fcfs")
    held(bench)
    bench.arrive(request("short", at_s=0.001))
    assert bench.scheduler.schedule(bench.now_s) is None


@pytest.mark.parametrize(("level", "overtakes"), [(-1, True), (0, True), (1, False)])
def test_a_lower_class_does_not_overtake(level: int, overtakes: bool) -> None:
    bench = interruptible()
    held(bench)
    bench.arrive(request("short", priority=level))
    assert (bench.scheduler.schedule(bench.now_s) is not None) is overtakes


def test_a_prompt_too_long_for_the_rest_of_the_held_batch_waits_for_it() -> None:
    bench = interruptible()
    large = held(bench)
    bench.now_s += 0.5 * large.predicted_s
    bench.arrive(request("longer", num_tokens=6000, at_s=bench.now_s))
    assert bench.scheduler.schedule(bench.now_s) is None


def decoding_beside_a_long_prompt() -> tuple[Bench, Batch]:
    bench = interruptible()
    bench.arrive(request("reader", num_out=100))
    bench.step()
    return bench, held(bench)


def test_running_decodes_leave_a_large_chunk_and_overtake_it_when_they_are_due() -> None:
    bench, large = decoding_beside_a_long_prompt()
    since_s = bench.now_s
    assert names(large) == ["long"]
    assert bench.scheduler.schedule(bench.now_s) is None, "they are not due"
    due_s = bench.scheduler.wakes_at_s()
    assert since_s < due_s < since_s + 0.05
    bench.now_s = due_s
    assert bench.handle(Woken()) == []
    assert bench.scheduler.wakes_at_s() == inf, "it has come"
    batch = bench.schedule()
    assert names(batch) == ["reader"] and batch.overtakes == large.batch_id
    bench.complete(batch)
    assert bench.now_s <= since_s + 0.05, "within the budget"
    assert bench.scheduler.wakes_at_s() > bench.now_s


def test_decodes_stay_beside_a_chunk_where_steps_of_their_own_would_cost_more() -> None:
    bench = interruptible(cost=COST)
    bench.arrive(request("reader", num_out=100))
    bench.step()
    bench.arrive(request("long", num_tokens=5000))
    batch = bench.schedule()
    assert names(batch) == ["reader", "long"] and not batch.may_be_held and batch.predicted_s <= batch.budget_s


def test_decodes_stay_beside_a_chunk_where_a_pipeline_is_too_long_to_overtake_in_within_the_budget() -> None:
    bench = interruptible(spp=8)  # 10 ms on each stage, until a point comes
    bench.arrive(request("reader", num_out=100))
    bench.step()
    bench.arrive(request("long", num_tokens=5000))
    assert names(bench.schedule()) == ["reader", "long"]


def test_decodes_that_nobody_woke_are_in_the_next_batch() -> None:
    bench, large = decoding_beside_a_long_prompt()
    bench.complete(large)
    assert names(bench.schedule())[0] == "reader"


def test_decodes_that_overtake_take_a_short_prompt_along() -> None:
    bench, _ = decoding_beside_a_long_prompt()
    bench.now_s = bench.scheduler.wakes_at_s()
    bench.arrive(request("short", at_s=bench.now_s))
    assert names(bench.schedule()) == ["reader", "short"]


def test_a_batch_may_be_held_for_so_long_that_it_keeps_the_progress_share_of_the_time() -> None:
    bench = interruptible(progress_share=0.5)
    large = held(bench, ttft_slo_s=1e4)
    held_s, index = 0.0, 0
    while True:
        bench.arrive(request(f"s{index}", num_tokens=100, num_out=1, at_s=bench.now_s))
        batch = bench.scheduler.schedule(bench.now_s)
        if batch is None:
            break
        held_s += batch.predicted_s
        bench.complete(batch)
        index += 1
    assert 0.7 * large.predicted_s <= held_s <= large.predicted_s


def test_on_a_pipeline_a_batch_overtakes_all_that_are_in_flight() -> None:
    bench = interruptible(spp=2)
    first = held(bench, 20_000)
    bench.handle(FirstStageDone(first.batch_id))
    second = bench.schedule()
    assert second.may_be_held
    bench.arrive(request("short"))
    batch = bench.schedule()
    assert batch.overtakes == first.batch_id, "the oldest that it may pass, on whatever stage it meets it"
    bench.handle(FirstStageDone(batch.batch_id))
    assert bench.complete(batch), "out of order"
    bench.handle(FirstStageDone(second.batch_id))
    bench.complete(first)
    assert names(bench.schedule())


def test_a_held_batch_whose_request_is_gone_is_overtaken_by_anybody() -> None:
    bench = interruptible(policy="fcfs")
    held(bench)
    bench.handle(Aborted("long"))
    bench.arrive(request("next"))
    assert names(bench.schedule()) == ["next"]


def test_an_efficient_chunk_is_the_smallest_that_costs_hardly_more_than_the_best() -> None:
    # 16,384 tokens take 1.64 s and 11 ms more for each chunk: two of them cost 0.7% more than one, four of them 2%.
    assert efficient_chunk_tokens(DearChunks(), 0, 16_384, 16_384, 32, 1) == 8192
    assert efficient_chunk_tokens(DearChunks(), 0, 100_000, 4096, 32, 1) == 4096, "no larger than it may be"


def test_an_efficient_chunk_leaves_several_for_the_stages_of_a_pipeline() -> None:
    alone, staged = (efficient_chunk_tokens(DearChunks(), 0, 8192, 8192, 32, spp) for spp in (1, 4))
    assert staged <= alone // 2


@pytest.mark.parametrize(
    ("options", "can_hold", "is_on"),
    [
        ({}, True, True), ({}, False, False), ({"interruptible": False}, True, False),
        ({"interruptible": True, "policy": "fcfs"}, True, True), ({"policy": "fcfs"}, True, False),
        ({"progress_share": 0.0}, True, False), ({"chunking": Chunking.WHOLE}, True, False),
    ],
)  # fmt: skip
def test_auto_is_on_where_ranks_can_hold_a_step_and_it_helps(
    options: dict[str, Any], can_hold: bool, is_on: bool
) -> None:
    assert resolved(SchedulerConfig(**options), can_hold).interruptible is is_on


def test_ranks_that_cannot_hold_a_step_are_not_asked_to() -> None:
    with pytest.raises(ConfigError, match=r"^scheduler.interruptible=true: .* cannot hold a step.*auto or false"):
        resolved(SchedulerConfig(interruptible=True), False)


def test_under_first_come_first_served_chunks_are_no_larger_as_nobody_could_overtake_them() -> None:
    bench = interruptible(policy="fcfs")
    bench.arrive(request("long", num_tokens=5000))
    assert bench.schedule().predicted_s <= 0.05
