"""Metrics in Prometheus' format: under our names and, where the meaning is the same, under vLLM's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from megatron_medha.core.ports import EngineClient, EnginePhase, ReplicaState
from megatron_medha.server.admission import REJECTION_REASONS, AdmissionControl
from megatron_medha.server.observe.metrics import CUT_OFF_REASONS, LENGTH_CLASSES, LONGEST_CLASS, Histogram, Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# medha name, vLLM names (current ones and those old dashboards ask for), meaning
HISTOGRAMS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("ttft_s", "time_to_first_token_seconds", ("time_to_first_token_seconds",),
     "From the arrival of a request to its first token"),
    ("inter_token_s", "inter_token_latency_seconds", ("inter_token_latency_seconds", "time_per_output_token_seconds"),
     "Between two tokens of a request"),
    ("time_per_output_token_s", "request_time_per_output_token_seconds", ("request_time_per_output_token_seconds",),
     "Mean time between the tokens of one request"),
    ("e2e_s", "e2e_request_latency_seconds", ("e2e_request_latency_seconds",),
     "From the arrival of a request to its last token"),
    ("queue_s", "request_queue_time_seconds", ("request_queue_time_seconds",),
     "From the arrival of a request to its first schedule"),
    ("prefill_s", "request_prefill_time_seconds", ("request_prefill_time_seconds",),
     "From a request's first schedule to its first token"),
    ("decode_s", "request_decode_time_seconds", ("request_decode_time_seconds",),
     "From a request's first token to its last"),
    ("loop_lag_s", "event_loop_lag_seconds", (),
     "How late the API server's event loop runs what is due, as far as the server's own work explains it"),
    ("prompt_tokens", "request_prompt_tokens", ("request_prompt_tokens",), "Prompt tokens of a request"),
    ("output_tokens", "request_generation_tokens", ("request_generation_tokens",), "Output tokens of a request"),
    ("params_n", "request_params_n", ("request_params_n",), "The n that clients ask for"),
    ("params_max_tokens", "request_params_max_tokens", ("request_params_max_tokens",),
     "Output tokens that a request may have"),
    ("step_tokens", "iteration_tokens_total", ("iteration_tokens_total",), "Tokens of a step"),
    ("relative_slack", "relative_slack_at_first_token", (),
     "What was left of a request's first-token deadline, in units of its own predicted prefill; below 0: missed"),
    ("kvp_degree", "kvp_degree", (), "KVP ranks that hold a request's KV when its first token comes"),
    ("step_predicted_s", "step_predicted_seconds", (), "Duration of a step as the scheduler predicted it"),
    ("step_actual_s", "step_actual_seconds", (), "Duration of a step as the ranks measured it"),
    ("step_relative_error", "step_prediction_relative_error", (), "|predicted / actual - 1| of a step"),
    ("step_ratio", "step_actual_over_predicted_ratio", (), "Actual / predicted duration of a step; above 1: too slow"),
)

COUNTERS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("num_prompt_tokens", "prompt_tokens", ("prompt_tokens",), "Prompt tokens computed, also of aborted requests"),
    ("num_output_tokens", "generation_tokens", ("generation_tokens",), "Tokens generated"),
    ("num_preemptions", "num_preemptions", ("num_preemptions",), "Sequences that lost their KV to a decode"),
    ("num_preempted_tokens", "preempted_tokens", (), "Tokens that had to be recomputed because KV was lost"),
    ("num_recomputed_tokens", "recomputed_tokens", (), "Prompt and output tokens computed more than once"),
    ("num_paused_prefills", "prefill_pauses", (), "Prefills that others overtook at a chunk boundary, with KV kept"),
    ("stage_busy_s", "stage_busy_seconds", (), "Time the ranks computed, by the step and pipeline stage"),
    ("work_present_s", "work_present_seconds", (),
     "Time in which there was work; 1 - stage_busy / work_present is the share of bubbles"),
    ("num_rejected", "rejected_requests", (), "Requests refused by the scheduler"),
    ("num_ttft_slo_met", "ttft_slo_met", (), "Requests that met the TTFT target they brought"),
    ("num_ttft_slo_missed", "ttft_slo_missed", (), "Requests that missed the TTFT target they brought"),
)

GAUGES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("is_ready", (), "1 while requests run; 0 while the model loads or ranks come up again"),
    ("num_requests_running", ("num_requests_running",), "Requests in prefill or decode"),
    ("num_requests_waiting", ("num_requests_waiting",), "Requests not begun"),
    ("kv_cache_usage_perc", ("kv_cache_usage_perc", "gpu_cache_usage_perc"), "Share of KV blocks in use, 0 to 1"),
    ("num_waiting_tokens", (), "Prompt tokens not computed yet"),
    ("num_prefilling", (), "Requests in prefill"),
    ("num_decoding", (), "Requests in decode"),
    ("num_free_blocks", (), "KV blocks that are free"),
    ("num_blocks", (), "KV blocks"),
)

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
        lengths = [*(name for _, name in LENGTH_CLASSES), LONGEST_CLASS]
        self._no_deadlines = dict.fromkeys(itertools.product(lengths, slo_classes), 0)
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
        yield from self._gauges()
        for attribute, own_name, vllm_names, meaning in COUNTERS:
            value = getattr(self._metrics, attribute)
            for name in _names(own_name, vllm_names):
                counter = CounterMetricFamily(name, meaning, labels=LABELS)
                counter.add_metric(self._labels, value)
                yield counter
        for name, attribute, meaning in (
            ("rank_failures", "num_failures", "Times that ranks were lost"),
            ("rank_recoveries", "num_recoveries", "Times that ranks that were lost came up again"),
        ):
            counter = CounterMetricFamily(f"medha:{name}", meaning, labels=LABELS)
            for place, replica in enumerate(self._engine.replicas):
                counter.add_metric(self._labels_of(place), getattr(replica.status, attribute))
            yield counter
        for name in _names("request_success", ("request_success",)):
            ended = CounterMetricFamily(name, "Requests that ended, by reason", labels=(*LABELS, "finished_reason"))
            for reason, count in self._metrics.num_ended.items():
                ended.add_metric([*self._labels, reason], count)
            yield ended
        yield self._by_label("requests_cut_off", "HTTP requests that ended without their whole answer", ("reason",),
                             _with_zeros(CUT_OFF_REASONS, self._metrics.num_cut_off))
        for name in _names("admission_rejections", ("admission_rejections",)):
            yield self._by_label(name, "Requests answered 429", ("reason",),
                                 _with_zeros(REJECTION_REASONS, self._admission.num_refused))
        for name, meaning, counts in (
            ("deadlines_met", "Requests whose first token came in time", self._metrics.num_deadlines_met),
            ("deadlines_missed", "Requests whose first token came late", self._metrics.num_deadlines_missed),
        ):
            all_counts = {**self._no_deadlines, **counts.copy()}
            yield self._by_label(name, meaning, ("length_class", "slo_class"), all_counts.items())
        for attribute, own_name, vllm_names, meaning in HISTOGRAMS:
            histogram: Histogram = getattr(self._metrics, attribute)
            for name in _names(own_name, vllm_names):
                yield self._histogram(name, meaning, histogram)

    def _by_label(
        self, name: str, meaning: str, labels: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]
    ) -> CounterMetricFamily:
        full_name = name if ":" in name else f"medha:{name}"
        family = CounterMetricFamily(full_name, meaning, labels=(*LABELS, *labels))
        for values, count in counts:
            family.add_metric([*self._labels, *values], count)
        return family

    def _histogram(self, name: str, meaning: str, histogram: Histogram) -> HistogramMetricFamily:
        counts = list(histogram.counts)  # the engine's thread may be counting meanwhile
        buckets = []
        num_up_to = 0
        for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
            num_up_to += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), num_up_to))
        family = HistogramMetricFamily(name, meaning, labels=LABELS)
        family.add_metric(self._labels, buckets, histogram.total)
        return family

    def _gauges(self) -> Iterator[Metric]:
        values = [_values_of(replica) for replica in self._engine.replicas]
        for own_name, vllm_names, meaning in GAUGES:
            for name in _names(own_name, vllm_names):
                gauge = GaugeMetricFamily(name, meaning, labels=LABELS)
                for place, of_replica in enumerate(values):
                    gauge.add_metric(self._labels_of(place), of_replica[own_name])
                yield gauge

        for name, value, meaning in (
            ("event_loop_lag_max_seconds", max(self._metrics.recent_lags_s),
             "The greatest event_loop_lag_seconds of the last 10 s"),
            ("process_peak_memory_bytes", _peak_memory_bytes(), "Most memory that the API server has had resident"),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(f"medha:{name}", meaning, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge

    def _labels_of(self, place: int) -> list[str]:
        return [self._labels[0], str(place)]


def _peak_memory_bytes() -> float:
    # Not getrusage()'s: that one begins with the most that the parent process had.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def _values_of(replica: ReplicaState) -> dict[str, float]:
    """By the names of GAUGES."""
    status, load = replica
    num_used = load.num_blocks - load.num_free_blocks
    return {
        "is_ready": float(status.phase is EnginePhase.READY),
        "num_requests_running": load.num_prefilling + load.num_decoding,
        "num_requests_waiting": load.num_waiting,
        "kv_cache_usage_perc": num_used / load.num_blocks if load.num_blocks else 0.0,
        "num_waiting_tokens": load.num_waiting_tokens,
        "num_prefilling": load.num_prefilling,
        "num_decoding": load.num_decoding,
        "num_free_blocks": load.num_free_blocks,
        "num_blocks": load.num_blocks,
    }


def _with_zeros(reasons: Sequence[str], counts: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], int]]:
    for reason, count in {**dict.fromkeys(reasons, 0), **counts}.items():
        yield (reason,), count


def _names(own_name: str, vllm_names: tuple[str, ...]) -> list[str]:
    return [f"medha:{own_name}", *(f"vllm:{name}" for name in vllm_names)]
