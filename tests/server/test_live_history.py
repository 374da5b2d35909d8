"""Samples and exact percentiles behind the dashboard's curves."""

from __future__ import annotations

from random import Random

import pytest

from megatron_medha.server.observe.live_history import NUM_SAMPLES, WINDOW_S, LiveHistory
from megatron_medha.server.observe.metrics import NUM_RECENT_GAPS, Metrics


def test_percentiles_are_those_of_the_last_minute_and_not_bounds_of_buckets() -> None:
    metrics, draw = Metrics(), Random(3)
    history = LiveHistory(metrics)
    ttfts_s = [(at_s, draw.expovariate(2.0)) for at_s in range(200)]
    metrics.recent_ttfts_s.extend((float(at_s), ttft_s) for at_s, ttft_s in ttfts_s)
    found = history.latencies(199.0)["ttft"]

    recent = sorted(ttft_s for at_s, ttft_s in ttfts_s if at_s >= 199.0 - WINDOW_S)
    assert found.num == len(recent) == 61
    assert found.p50_s == recent[30]
    assert found.p99_s is not None and recent[-2] <= found.p99_s <= recent[-1]
    assert history.latencies(1000.0)["ttft"].p50_s is None


def test_tokens_per_second_count_from_the_sample_before() -> None:
    metrics = Metrics()
    history = LiveHistory(metrics)
    for now_s, num_tokens in ((10.0, 100), (12.0, 150), (16.0, 150)):
        metrics.num_output_tokens = num_tokens
        history.sample(now_s, num_queued=3, kv_used_share=0.25)

    assert [sample.tokens_per_s for sample in history.since(0.0)] == [0.0, 25.0, 0.0]
    assert [sample.at_s for sample in history.since(12.0)] == [16.0]
    assert history.since(0.0)[0].ttft_p99_s is None


def test_what_is_kept_is_bounded() -> None:
    metrics = Metrics()
    history = LiveHistory(metrics)
    for at_s in range(3 * NUM_SAMPLES):
        history.sample(float(at_s), 0, 0.0)
    for _ in range(2 * NUM_RECENT_GAPS):
        metrics.next_token(0.01, 5.0)

    samples = history.since(float("-inf"))
    assert len(samples) == NUM_SAMPLES and samples[-1].at_s == 3 * NUM_SAMPLES - 1
    assert history.latencies(6.0)["inter_token"].num == NUM_RECENT_GAPS
    assert history.latencies(6.0)["inter_token"].p99_s == pytest.approx(0.01)
