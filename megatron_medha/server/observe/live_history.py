"""Samples of the last quarter of an hour, and exact percentiles of the last minute, for the dashboard."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

import msgspec

from megatron_medha.core.ports import EngineClient
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.stats.summary import percentile

SAMPLE_S = 2.0
NUM_SAMPLES = 450    # a quarter of an hour
WINDOW_S = 60.0      # of the percentiles
CURVE_WINDOW_S = 30.0  # of the percentile in each sample


class LiveSample(msgspec.Struct, frozen=True):
    """The server at one moment."""

    at_s: float
    ttft_p99_s: float | None  # of first tokens in the last CURVE_WINDOW_S; None without any
    num_queued: int           # requests whose prompt is not computed yet
    tokens_per_s: float       # output, since the sample before
    kv_used_share: float


class LatencyWindow(msgspec.Struct, frozen=True):
    """Percentiles of a latency over the last WINDOW_S."""

    num: int
    p50_s: float | None
    p99_s: float | None


class LiveHistory:
    """Takes samples while it watches."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[LiveSample] = deque(maxlen=NUM_SAMPLES)
        self._last: tuple[float, int] | None = None  # when the sample before was taken, and output tokens by then

    def sample(self, now_s: float, num_queued: int, kv_used_share: float) -> None:
        """Remember how things are."""
        num_tokens = self._metrics.num_output_tokens
        last_s, num_before = self._last or (now_s, num_tokens)
        self._last = now_s, num_tokens
        ttfts_s = _since(self._metrics.recent_ttfts_s, now_s - CURVE_WINDOW_S)
        self._samples.append(LiveSample(
            at_s=now_s,
            ttft_p99_s=percentile(ttfts_s, 99.0) if ttfts_s else None,
            num_queued=num_queued,
            tokens_per_s=(num_tokens - num_before) / (now_s - last_s) if now_s > last_s else 0.0,
            kv_used_share=kv_used_share,
        ))  # fmt: skip

    def since(self, at_s: float) -> list[LiveSample]:
        """Samples taken later than that, the oldest first."""
        return [sample for sample in self._samples if sample.at_s > at_s]

    def latencies(self, now_s: float) -> dict[str, LatencyWindow]:
        """Of the last WINDOW_S; of its latest values where there were more than are kept."""
        return {
            "ttft": _window(self._metrics.recent_ttfts_s, now_s),
            "inter_token": _window(self._metrics.recent_gaps_s, now_s),
        }

    async def watch(self, engine: EngineClient) -> None:
        """Take a sample every SAMPLE_S until cancelled."""
        while True:
            load = engine.load
            used = load.num_blocks - load.num_free_blocks
            self.sample(engine.now_s(), load.num_waiting + load.num_prefilling, used / (load.num_blocks or 1))
            await asyncio.sleep(SAMPLE_S)


def _window(values: Iterable[tuple[float, float]], now_s: float) -> LatencyWindow:
    ascending = _since(values, now_s - WINDOW_S)
    if not ascending:
        return LatencyWindow(0, None, None)
    return LatencyWindow(len(ascending), percentile(ascending, 50.0), percentile(ascending, 99.0))


def _since(values: Iterable[tuple[float, float]], at_s: float) -> list[float]:
    return sorted(value for noted_s, value in values if noted_s >= at_s)
