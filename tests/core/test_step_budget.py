"""How far below its budget a step is aimed."""

from __future__ import annotations

import random

from scheduler_bench import Bench, request

from megatron_medha.core.batch import Batch, Completed, FirstStageDone
from megatron_medha.core.scheduling.step_budget import BudgetUtilization


def step(predicted_s: float) -> Batch:
    return Batch(batch_id=0, chunks=(), released=(), created_s=0.0, budget_s=0.05, predicted_s=predicted_s)


def slow_step(bench: Bench) -> Batch:
    batch = bench.schedule()
    bench.now_s += 0.08
    bench.handle(Completed(batch_id=batch.batch_id, duration_s=0.08))
    return batch


def test_the_whole_budget_is_used_where_steps_take_what_was_predicted() -> None:
    aim = BudgetUtilization()
    for _ in range(1000):
        aim.learn(step(0.05 * aim.share), 0.05 * aim.share)
    assert aim.share == 1.0


def test_on_a_machine_that_scatters_by_15_percent_less_than_5_percent_of_the_steps_break_the_budget() -> None:
    draw = random.Random(0)
    aim = BudgetUtilization()
    broken = 0
    for index in range(3000):
        duration_s = 0.05 * aim.share * draw.gauss(1.0, 0.15)
        broken += index >= 500 and duration_s > 1.1 * 0.05
        aim.learn(step(0.05 * aim.share), duration_s)
    assert broken / 2500 < 0.05


def test_steps_that_had_no_work_to_fill_the_budget_do_not_raise_the_aim() -> None:
    aim = BudgetUtilization()
    for _ in range(10):
        aim.learn(step(0.05), 0.08)
    lowered = aim.share
    for _ in range(1000):
        aim.learn(step(0.01), 0.01)
    assert aim.share == lowered < 1.0


def test_the_floor_of_one_tile_over_budget_does_not_lower_the_aim() -> None:
    aim = BudgetUtilization()
    aim.learn(step(0.2), 0.3)
    assert aim.share == 1.0


def test_steps_that_break_their_budget_lower_only_those_that_a_decode_waits_for() -> None:
    bench = Bench(num_blocks=20_000, tile_tokens=1)
    bench.arrive(request("reader", num_out=40))
    bench.step()
    bench.arrive(request("long", num_tokens=20_000, at_s=bench.now_s))
    with_decodes = [slow_step(bench) for _ in range(39)]
    alone = [slow_step(bench) for _ in range(10)]
    assert [len(batch.chunks) for batch in (*with_decodes, *alone)] == 39 * [2] + 10 * [1]
    shares = [batch.predicted_s / batch.budget_s for batch in (*with_decodes, *alone)]
    assert shares[0] > 0.9 and shares[38] < 0.7 and min(shares[39:]) > 0.9


def test_steps_without_decodes_teach_no_lower_aim() -> None:
    bench = Bench(num_blocks=20_000, tile_tokens=1)
    bench.arrive(request("long", num_tokens=20_000))
    for _ in range(40):
        slow_step(bench)
    bench.arrive(request("reader", num_out=9, ttft_slo_s=0.2, at_s=bench.now_s))
    while bench.sequence("reader").is_prefill:
        slow_step(bench)
    batch = bench.schedule()
    assert len(batch.chunks) == 2 and batch.predicted_s > 0.9 * batch.budget_s


def test_a_step_behind_decodes_in_the_pipeline_is_lowered_as_well() -> None:
    bench = Bench(num_blocks=20_000, tile_tokens=1, spp=2)
    bench.arrive(request("reader", num_out=60))
    bench.step()
    bench.arrive(request("long", num_tokens=20_000, at_s=bench.now_s))
    for _ in range(40):
        slow_step(bench)
    first = bench.schedule()
    bench.handle(FirstStageDone(first.batch_id))
    behind = bench.schedule()
    assert (len(first.chunks), len(behind.chunks)) == (2, 1)
    assert behind.predicted_s < 0.7 * behind.budget_s
