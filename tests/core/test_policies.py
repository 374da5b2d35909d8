"""Priorities of the policies, by hand."""

from __future__ import annotations

import pytest

from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.policies import (
    POLICIES,
    edf,
    fcfs,
    hrrn,
    lars,
    lrs,
    relative_slack,
    sjf,
    slack_s,
    srpt,
)


def sequence(name: str, *, arrival_s: float, work_s: float, deadline_s: float, remaining_s: float | None = None):
    """A prefill of so many seconds; the deadline counts from the arrival."""
    request = Request(request_id=name, num_prompt_tokens=1, max_output_tokens=1, arrival_s=arrival_s)
    return Sequence(
        request=request,
        deadline_s=arrival_s + deadline_s,
        total_work_s=work_s,
        remaining_work_s=work_s if remaining_s is None else remaining_s,
    )


# The worked example of Medha section 4.1.
LONG = sequence("long", arrival_s=0.0, work_s=10.0, deadline_s=16.0)
SHORT = sequence("short", arrival_s=5.0, work_s=0.5, deadline_s=1.0)


def test_slack_of_the_worked_example() -> None:
    assert slack_s(LONG, 0.0) == pytest.approx(6.0)
    assert relative_slack(LONG, 0.0) == pytest.approx(0.6)
    assert slack_s(SHORT, 5.0) == pytest.approx(0.5)
    assert relative_slack(SHORT, 5.0) == pytest.approx(1.0)


def test_a_prefill_that_runs_keeps_its_slack() -> None:
    halfway = sequence("long", arrival_s=0.0, work_s=10.0, deadline_s=16.0, remaining_s=5.0)
    assert relative_slack(halfway, 5.0) == pytest.approx(0.6)


def test_under_lars_the_short_one_of_the_worked_example_preempts_at_5_2_s() -> None:
    for now_s, short_first in ((5.0, False), (5.19, False), (5.21, True), (5.5, True)):
        running = sequence("long", arrival_s=0.0, work_s=10.0, deadline_s=16.0, remaining_s=10.0 - now_s)
        assert (lars(SHORT).at(now_s) < lars(running).at(now_s)) == short_first


def test_under_edf_the_short_one_of_the_worked_example_preempts_at_once() -> None:
    assert (edf(SHORT).at(5.0), edf(LONG).at(5.0)) == (6.0, 16.0)


def test_under_fcfs_the_short_one_of_the_worked_example_waits() -> None:
    assert fcfs(LONG).at(5.0) < fcfs(SHORT).at(5.0)


def test_under_lars_an_overdue_short_prefill_outranks_an_overdue_long_one() -> None:
    late_long = sequence("long", arrival_s=0.0, work_s=10.0, deadline_s=16.0, remaining_s=5.0)
    late_short = sequence("short", arrival_s=15.0, work_s=0.5, deadline_s=1.0)
    now_s = 17.0
    assert slack_s(late_long, now_s) < slack_s(late_short, now_s) < 0.0
    assert lars(late_short).at(now_s) < lars(late_long).at(now_s)
    assert lrs(late_long).at(now_s) < lrs(late_short).at(now_s)


def test_sjf_looks_at_the_whole_prefill_and_srpt_at_what_is_left() -> None:
    nearly_done = sequence("long", arrival_s=0.0, work_s=10.0, deadline_s=16.0, remaining_s=0.1)
    assert sjf(SHORT).at(5.0) < sjf(nearly_done).at(5.0)
    assert srpt(nearly_done).at(5.0) < srpt(SHORT).at(5.0)


def test_hrrn_is_the_negative_response_ratio() -> None:
    assert hrrn(SHORT).at(6.5) == pytest.approx(-(1.5 + 0.5) / 0.5)


def test_every_policy_is_known_by_its_own_name() -> None:
    assert set(POLICIES) == {"fcfs", "sjf", "srpt", "edf", "lrs", "lars", "hrrn"}
    assert all(policy.priority.__name__ == name for name, policy in POLICIES.items())


def test_those_that_look_at_deadlines_say_so() -> None:
    assert {name for name, policy in POLICIES.items() if policy.is_by_deadline} == {"edf", "lrs", "lars", "hrrn"}
