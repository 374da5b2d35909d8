"""OpenTelemetry traces: a span per request with its time in the queue, in prefill and in decode. An optional extra."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megatron_medha.core.errors import DependencyError


class OtelTraces:
    """Sends spans to a collector, on a thread of the library's own; what it cannot send it drops and logs."""

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """endpoint: as http://127.0.0.1:4318/v1/traces. Raises DependencyError if the library is missing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise DependencyError(
                f"tracking.otlp_endpoint={endpoint}: OpenTelemetry is not installed; pip install 'megatron_medha[otel]'"
            ) from None

        self._provider = TracerProvider(resource=Resource.create({"service.name": "megatron_medha"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("megatron_medha")
        self._propagator = TraceContextTextMapPropagator()
        self._unix_minus_monotonic_s = time.time() - time.monotonic()

    def export(
        self,
        attributes: Mapping[str, Any],
        *,
        is_error: bool,
        traceparent: str | None,
        arrival_s: float,
        scheduled_s: float | None,
        first_token_s: float | None,
        ended_s: float,
    ) -> None:
        """Write down a request that is over. traceparent: the client's. Times are of the engine's clock."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        parent = self._propagator.extract({} if traceparent is None else {"traceparent": traceparent})
        span = self._tracer.start_span(
            "request", parent, SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            start_time=self._unix_ns(arrival_s),
        )  # fmt: skip
        if is_error:
            span.set_status(Status(StatusCode.ERROR))
        inner = set_span_in_context(span, parent)
        begin_s = arrival_s
        for name, end_s in (("queue", scheduled_s), ("prefill", first_token_s), ("decode", ended_s)):
            phase = self._tracer.start_span(name, inner, start_time=self._unix_ns(begin_s))
            begin_s = ended_s if end_s is None else end_s
            phase.end(self._unix_ns(begin_s))
            if end_s is None:  # it ended in this phase
                break
        span.end(self._unix_ns(ended_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _unix_ns(self, at_s: float) -> int:
        return int((at_s + self._unix_minus_monotonic_s) * 1e9)
