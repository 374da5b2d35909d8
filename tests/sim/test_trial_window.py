"""Which requests candidates of a plan are tried on, and when they are too few to say anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medha.sim.planning.trial_window import TrialWindow, choose_window, num_needed
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.arrivals import ArrivalProcess
from megatron_medha.workload.session_mix import SessionsConfig
from megatron_medha.workload.workload import Workload, WorkloadConfig


def chosen(config: WorkloadConfig, trial_s: float | None = None, **more: object) -> TrialWindow:
    settings = {"attainment": 0.9, "each_class": False, **more}
    return choose_window(config, 0, LengthClasses(), trial_s=trial_s, **settings)


@pytest.fixture
def trace(tmp_path: Path) -> Callable[..., WorkloadConfig]:
    def write(num_short: int, num_long: int, gap_s: float = 1.0) -> WorkloadConfig:
        """Short prompts first, then long ones: a morning and an afternoon."""
        lengths = [500] * num_short + [120_000] * num_long
        rows = "".join(f"{index * gap_s},{length},5\n" for index, length in enumerate(lengths))
        path = tmp_path / "trace.csv"
        path.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
        return WorkloadConfig(path=path)

    return write


def test_a_window_of_sessions_is_all_their_turns_or_those_of_so_many_seconds() -> None:
    config = WorkloadConfig(sessions=SessionsConfig(num_sessions=30, turns=5.0, length_scale=0.05))
    whole, some = chosen(config), chosen(config, 20.0)
    assert whole.workload == config and sum(whole.num_by_class.values()) == Workload(config, 0).facts.num_requests
    assert some.workload == replace(config, duration_s=20.0) and some.seconds < 20.0 < whole.seconds


def test_a_window_reaches_as_far_as_it_takes_to_see_what_comes_late(trace: Callable[..., WorkloadConfig]) -> None:
    window = chosen(trace(3000, 100))
    assert window.num_by_class["long"] >= 80 and not window.why_too_few
    assert window.longest_prompt_tokens == 120_000 and window.max_request_tokens == 120_005


def test_a_rare_class_makes_the_window_of_a_mix_longer() -> None:
    window = chosen(WorkloadConfig(qps=0.1, long_share=0.05))
    assert window.num_by_class["long"] >= 20 and window.seconds > 600.0 and not window.why_too_few
    requests = list(Workload(window.workload, 0).requests())
    assert len(requests) == sum(window.num_by_class.values())


def test_a_frequent_class_leaves_it_at_ten_minutes() -> None:
    assert 590.0 < chosen(WorkloadConfig(qps=8.0, long_share=0.05)).seconds <= 600.0


@pytest.mark.parametrize(
    ("num_long", "trial_s", "what"),
    [
        (19, None, "19 are long .*needs 20; take a longer trace"),
        (30, 30.0, "0 are long .*needs 20; trial_s=null takes as many as it needs"),
    ],
)
def test_too_few_of_a_class_are_named_with_the_way_out(
    trace: Callable[..., WorkloadConfig], num_long: int, trial_s: float | None, what: str
) -> None:
    (reason,) = [one for one in chosen(trace(700, num_long), trial_s).why_too_few if "are long" in one]
    assert re.search(what, reason)


def test_a_p99_needs_a_hundred_requests(trace: Callable[..., WorkloadConfig]) -> None:
    assert [num_needed(attainment) for attainment in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)] == [20, 20, 20, 100, 1000, 100]
    (reason,) = chosen(trace(99, 0), attainment=0.99).why_too_few
    assert "slo.attainment=0.99, which needs 100" in reason
    assert not chosen(trace(100, 0), attainment=0.99).why_too_few


def test_where_each_class_must_meet_the_slo_each_needs_as_many(trace: Callable[..., WorkloadConfig]) -> None:
    config = trace(200, 40)
    assert not chosen(config, attainment=0.99).why_too_few
    (reason,) = chosen(config, attainment=0.99, each_class=True).why_too_few
    assert "40 are long" in reason and "needs 100" in reason


@pytest.mark.parametrize(
    "rows", [[(1.0, 500)] * 1200 + [(0.1, 500)] * 3000, [(1.0, 200)] * 1200 + [(1.0, 8_000)] * 900]
)
def test_a_window_of_a_trace_reaches_into_its_busiest_minutes(rows: list[tuple[float, int]], tmp_path: Path) -> None:
    at_s, lines = 0.0, ["arrival_s,prompt_tokens,output_tokens"]
    for gap_s, num_tokens in rows:
        at_s += gap_s
        lines.append(f"{at_s},{num_tokens},5")
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines))
    window = chosen(WorkloadConfig(path=path))
    assert 1200.0 < window.seconds and window.peak_covered >= 0.8
    assert chosen(WorkloadConfig(path=path), 600.0).peak_covered < 0.2


@pytest.mark.parametrize("arrivals", [ArrivalProcess.BURST, ArrivalProcess.DIURNAL])
def test_a_window_of_drawn_bursts_or_days_holds_a_whole_period(arrivals: ArrivalProcess) -> None:
    assert chosen(WorkloadConfig(qps=4.0, arrivals=arrivals, period_s=2000.0)).seconds > 1990.0
