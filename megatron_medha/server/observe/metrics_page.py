"""The metrics in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from megatron_medha.core.ports import EngineClient, ReplicaState
from megatron_medha.server.admission import REJECTION_REASONS, AdmissionControl
from megatron_medha.server.observe.metrics import (
    Histogram,
    LabelledCounts,
    Metrics,
    Named,
    in_vllm,
    own,
    replica_counters,
    replica_gauges,
    with_zeros,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Family = CounterMetricFamily | GaugeMetricFamily

LABELS = ("model_name", "engine")  # engine: the replica, from 0; "all" for what several count together


class MetricsPage:
    """Writes /metrics; a collector of prometheus_client with a registry of its own."""

    def __init__(
        self, metrics: Metrics, engine: EngineClient, admission: AdmissionControl, slo_classes: Sequence[str] = ()
    ) -> None:
        self._metrics = metrics
        self._admission = admission
        self._engine = engine
        self._labels = ["", "0"]
        self._slo_classes = tuple(slo_classes)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, model_name: str) -> bytes:
        """The page, with this model's name on every sample."""
        self._labels = [model_name, "0" if len(self._engine.replicas) == 1 else "all"]
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not call collect() to learn names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric under each of its names."""
        yield from self._by_replica(GaugeMetricFamily, replica_gauges)
        for named, value in self._process_gauges().items():
            yield from self._families(GaugeMetricFamily, named, [(self._labels, value)])
        if (facts := self._engine.facts) is not None:
            device = own("device_info", "Always 1. device: what computes, as /version says: kernels decide the bits")
            yield from self._families(
                GaugeMetricFamily, device, [([*self._labels, facts.device], 1.0)], ("device",)
            )
        for named, value in self._metrics.counters.items():
            yield from self._families(CounterMetricFamily, named, [(self._labels, value)])
        yield from self._by_replica(CounterMetricFamily, replica_counters)
        rejections = LabelledCounts(
            in_vllm("admission_rejections", "Requests answered 429"), ("reason",),
            with_zeros(REJECTION_REASONS, self._admission.num_refused),
        )  # fmt: skip
        for named, labels, counts in (*self._metrics.labelled_counters(self._slo_classes), rejections):
            samples = [([*self._labels, *values], count) for values, count in counts.items()]
            yield from self._families(CounterMetricFamily, named, samples, labels)
        for histogram in self._metrics.histograms:
            for name in histogram.named.names:
                yield self._histogram(name, histogram)

    def _by_replica(
        self, kind: type[Family], values_of: Callable[[ReplicaState], Mapping[Named, float]]
    ) -> Iterator[Metric]:
        replicas = [values_of(replica) for replica in self._engine.replicas]
        for named in replicas[0]:
            samples = [([self._labels[0], str(place)], values[named]) for place, values in enumerate(replicas)]
            yield from self._families(kind, named, samples)

    def _families(
        self, kind: type[Family], named: Named, samples: Sequence[tuple[Sequence[str], float]],
        labels: tuple[str, ...] = (),
    ) -> Iterator[Metric]:  # fmt: skip
        for name in named.names:
            family = kind(name, named.meaning, labels=(*LABELS, *labels))
            for values, value in samples:
                family.add_metric(values, value)
            yield family

    def _histogram(self, name: str, histogram: Histogram) -> HistogramMetricFamily:
        counts = list(histogram.counts)  # the engine's thread may be counting meanwhile
        buckets = []
        num_up_to = 0
        for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
            num_up_to += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), num_up_to))
        family = HistogramMetricFamily(name, histogram.named.meaning, labels=LABELS)
        family.add_metric(self._labels, buckets, histogram.total)
        return family

    def _process_gauges(self) -> dict[Named, float]:
        return {
            own("event_loop_lag_max_seconds", "The greatest event_loop_lag_seconds of the last 10 s"):
                max(self._metrics.recent_lags_s),
            own("process_peak_memory_bytes", "Most memory that the API server has had resident"):
                _peak_memory_bytes(),
        }  # fmt: skip


def _peak_memory_bytes() -> float:
    # Not getrusage()'s: that one begins with the most that the parent process had.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
