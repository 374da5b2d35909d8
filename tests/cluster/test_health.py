"""When a rank counts as lost, and how often that may happen."""

from __future__ import annotations

import pytest

from megatron_medha.cluster.health import FailureCount, Heartbeats, RecoveryConfig, StepWatchdog
from megatron_medha.core.errors import ConfigError

CONFIG = RecoveryConfig(
    step_timeout_factor=10.0, min_step_timeout_s=2.0, max_failures=3, failure_window_s=60.0
)


def test_the_rank_that_has_been_silent_longest_is_named() -> None:
    heartbeats = Heartbeats(range(3), 4.0, now_s=0.0)
    for rank, now_s in ((0, 3.0), (2, 3.5)):
        heartbeats.heard(rank, now_s)
    assert [heartbeats.failure(now_s) for now_s in (1.0, 2.0, 3.0, 4.0)] == [None] * 4
    assert heartbeats.failure(4.5) == "rank 1 has been silent for 4.5 s"


def test_silence_is_measured_from_when_the_limit_changed() -> None:
    heartbeats = Heartbeats(range(2), 60.0, now_s=0.0)
    heartbeats.restart(4.0, now_s=50.0)
    assert [heartbeats.failure(now_s) for now_s in (51.0, 52.0, 53.0, 53.9)] == [None] * 4
    assert heartbeats.failure(54.1) is not None


def test_a_front_that_was_put_aside_itself_does_not_take_its_own_pause_for_silence() -> None:
    heartbeats = Heartbeats(range(2), 4.0, now_s=0.0)
    assert heartbeats.failure(0.25) is None
    assert heartbeats.failure(30.0) is None  # what the ranks have said meanwhile is about to be read
    heartbeats.heard(1, 30.1)
    assert heartbeats.failure(30.25) is None
    assert [heartbeats.failure(now_s) for now_s in (31.0, 32.0)] == [None] * 2
    assert heartbeats.failure(33.0) == "rank 0 has been silent for 4.2 s"


def test_a_silent_rank_is_found_however_seldom_the_front_gets_to_look() -> None:
    heartbeats = Heartbeats(range(1), 4.0, now_s=0.0)
    found = [heartbeats.failure(now_s) for now_s in (10.0, 20.0, 30.0, 40.0, 50.0)]
    assert found[:4] == [None] * 4
    assert found[4] is not None


def test_a_step_may_take_ten_times_its_prediction_and_no_more() -> None:
    watchdog = StepWatchdog(CONFIG)
    watchdog.submitted(0, predicted_s=1.0, now_s=100.0)
    assert watchdog.failure(110.0) is None
    assert watchdog.failure(110.1) == "batch 0 has taken 10.1 s, more than 10.0 s"


def test_a_short_step_may_take_the_least_limit() -> None:
    watchdog = StepWatchdog(CONFIG)
    watchdog.submitted(0, predicted_s=0.001, now_s=0.0)
    assert watchdog.failure(2.0) is None
    assert watchdog.failure(2.1) is not None


def test_a_batch_behind_another_has_its_time_from_when_that_one_is_done() -> None:
    watchdog = StepWatchdog(CONFIG)
    watchdog.submitted(0, predicted_s=0.1, now_s=0.0)
    watchdog.submitted(1, predicted_s=0.1, now_s=0.1)
    watchdog.completed(0, now_s=1.9)
    assert watchdog.failure(3.8) is None
    assert watchdog.failure(4.0) is not None
    watchdog.completed(1, now_s=4.0)
    assert watchdog.failure(1000.0) is None


def test_the_third_failure_within_a_minute_is_one_too_many() -> None:
    count = FailureCount(CONFIG)
    assert count.failed(0.0)
    assert count.failed(50.0)
    assert count.failed(100.0)  # the first is forgotten
    assert not count.failed(105.0)
    assert len(count) == 3


@pytest.mark.parametrize(("key", "value"), [("heartbeat_timeout_s", 1.0), ("max_failures", 0), ("max_starts", 0)])
def test_a_limit_that_makes_no_sense_is_refused_with_its_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"recovery.{key}="):
        RecoveryConfig(**{key: value})
