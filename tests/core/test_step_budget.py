"""How far below its budget a step is aimed."""

from __future__ import annotations

import random

from megatron_medha.core.batch import Batch
from megatron_medha.core.step_budget import StepAim


def step(predicted_s: float) -> Batch:
    return Batch(batch_id=0, chunks=(), released=(), created_s=0.0, budget_s=0.05, predicted_s=predicted_s)


def test_the_whole_budget_is_used_where_steps_take_what_was_predicted() -> None:
    aim = StepAim()
    for _ in range(1000):
        aim.learn(step(0.05 * aim.share), 0.05 * aim.share)
    assert aim.share == 1.0


def test_on_a_machine_that_scatters_by_15_percent_less_than_5_percent_of_the_steps_break_the_budget() -> None:
    draw = random.Random(0)
    aim = StepAim()
    broken = 0
    for index in range(3000):
        duration_s = 0.05 * aim.share * draw.gauss(1.0, 0.15)
        broken += index >= 500 and duration_s > 1.1 * 0.05
        aim.learn(step(0.05 * aim.share), duration_s)
    assert broken / 2500 < 0.05


def test_steps_that_had_no_work_to_fill_the_budget_do_not_raise_the_aim() -> None:
    aim = StepAim()
    for _ in range(10):
        aim.learn(step(0.05), 0.08)
    lowered = aim.share
    for _ in range(1000):
        aim.learn(step(0.01), 0.01)
    assert aim.share == lowered < 1.0


def test_the_floor_of_one_tile_over_budget_does_not_lower_the_aim() -> None:
    aim = StepAim()
    aim.learn(step(0.2), 0.3)
    assert aim.share == 1.0
