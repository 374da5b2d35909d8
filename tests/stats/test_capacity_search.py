"""The search for the most load under an SLO."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
from megatron_medha.stats.capacity_search import CapacitySearch, Probe, wilson_interval


@given(capacity=st.floats(0.01, 100.0), start=st.floats(0.01, 100.0))
def test_a_sharp_capacity_is_found_to_the_tolerance_from_any_start(capacity: float, start: float) -> None:
    search = CapacitySearch(start_qps=start, attainment=0.9, tolerance=0.05, max_probes=60)
    while (qps := search.next_qps()) is not None:
        search.note(qps, 1000 if qps <= capacity else 0, 1000)

    assert search.is_resolved
    assert search.best_qps is not None
    assert search.best_qps <= capacity <= search.best_qps * 1.05


def test_a_search_out_of_probes_says_that_it_is_not_resolved() -> None:
    search = CapacitySearch(start_qps=1.0, attainment=0.9, max_probes=3)
    for _ in range(3):
        qps = search.next_qps()
        assert qps is not None
        search.note(qps, 10, 10)

    assert search.next_qps() is None
    assert (search.best_qps, search.failed_qps, search.is_resolved) == (4.0, None, False)


def test_a_rate_that_passed_above_one_that_failed_is_luck() -> None:
    search = CapacitySearch(start_qps=1.0, attainment=0.9)
    search.note(1.0, 10, 10)
    search.note(2.0, 8, 10)
    search.note(4.0, 10, 10)

    assert search.best_qps == 1.0


@pytest.mark.parametrize(("num_met", "num", "is_clear"), [(100, 100, True), (91, 100, False), (80, 100, True)])
def test_a_verdict_is_clear_when_its_interval_leaves_the_target_out(num_met: int, num: int, is_clear: bool) -> None:
    assert Probe(qps=1.0, num_met=num_met, num_requests=num, attainment=0.9).is_clear is is_clear


def test_wilsons_interval_is_the_textbooks() -> None:
    assert wilson_interval(10, 20) == pytest.approx((0.299, 0.701), abs=1e-3)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.278), abs=1e-3)


def test_a_start_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"capacity\.start_qps=0: must be between"):
        CapacitySearch(start_qps=0.0, attainment=0.9)
