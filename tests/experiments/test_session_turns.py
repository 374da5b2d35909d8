"""The orders of one device that turns are held against."""

from __future__ import annotations

from random import Random

import pytest

from experiments.session_turns.best_order import ORDERS, Job, response_times_s

LONG_FIRST = [Job(0.0, 4.0), Job(1.0, 1.0)]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("first come, first served", [4.0, 4.0]),
        ("shortest remaining first", [5.0, 1.0]),
        ("earliest deadline first", [5.0, 1.0]),  # due at 8 and at 3
    ],
)
def test_a_short_job_that_comes_second_waits_or_interrupts(order: str, expected: list[float]) -> None:
    assert response_times_s(LONG_FIRST, ORDERS[order]) == pytest.approx(expected)


@pytest.mark.parametrize("order", list(ORDERS))
def test_the_device_is_never_idle_while_somebody_waits_and_serves_nobody_faster_than_alone(order: str) -> None:
    draw = Random(order)
    for _ in range(50):
        jobs = [Job(draw.uniform(0.0, 20.0), draw.choice([0.1, 1.0, 3.0])) for _ in range(draw.randint(1, 20))]
        times_s = response_times_s(jobs, ORDERS[order])
        assert all(time_s >= job.alone_s - 1e-9 for time_s, job in zip(times_s, jobs, strict=True))
        ended_s = max(job.arrival_s + time_s for job, time_s in zip(jobs, times_s, strict=True))
        busy_until_s = 0.0
        for job in sorted(jobs):
            busy_until_s = max(busy_until_s, job.arrival_s) + job.alone_s
        assert ended_s == pytest.approx(busy_until_s)


def test_shortest_remaining_first_has_the_least_mean() -> None:
    draw = Random(1)
    for _ in range(50):
        jobs = [Job(draw.uniform(0.0, 10.0), draw.uniform(0.1, 3.0)) for _ in range(10)]
        sums = {name: sum(response_times_s(jobs, order)) for name, order in ORDERS.items()}
        assert sums["shortest remaining first"] <= min(sums.values()) + 1e-9
