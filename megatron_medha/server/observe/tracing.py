"""OpenTelemetry traces: a span per request with its time in the queue, in prefill and in decode. An optional extra."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

from megatron_medha.core.errors import DependencyError

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """A request that is over. Times are of the engine's clock."""

    attributes: dict[str, str | int | float]
    is_error: bool
    traceparent: str | None  # the client's, as W3C Trace Context has it
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    ended_s: float


class OtelTraces:
    """Sends spans to a collector, on a thread of the library's own; what it cannot send it drops and logs."""

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """endpoint: as http://127.0.0.1:4318/v1/traces. Raises DependencyError if the library is missing."""
        if any(_find(name) is None for name in _NEEDED):
            raise DependencyError(
                f"tracking.otlp_endpoint={endpoint}: OpenTelemetry is not installed; pip install 'megatron_medha[otel]'"
            )
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "megatron_medha"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("megatron_medha")
        self._propagator = TraceContextTextMapPropagator()
        self._unix_minus_monotonic_s = time.time() - time.monotonic()

    def tell(self, ended: EndedRequest) -> None:
        """Write down one request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        carrier = {"traceparent": ended.traceparent} if ended.traceparent is not None else {}
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(
            "request", parent, SpanKind.SERVER, ended.attributes, start_time=self._unix_ns(ended.arrival_s)
        )
        if ended.is_error:
            span.set_status(Status(StatusCode.ERROR))
        inner = set_span_in_context(span, parent)
        ends = (ended.scheduled_s, ended.first_token_s, ended.ended_s)
        begin_s = ended.arrival_s
        for name, end_s in zip(("queue", "prefill", "decode"), ends, strict=True):
            is_last = end_s is None  # it ended in this phase
            phase = self._tracer.start_span(name, inner, start_time=self._unix_ns(begin_s))
            begin_s = ended.ended_s if end_s is None else end_s
            phase.end(self._unix_ns(begin_s))
            if is_last:
                break
        span.end(self._unix_ns(ended.ended_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _unix_ns(self, at_s: float) -> int:
        return int((at_s + self._unix_minus_monotonic_s) * 1e9)


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # one of its parents
        return None
