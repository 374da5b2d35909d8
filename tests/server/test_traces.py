"""Traces: a span per request with its phases, under the client's own trace; and a clear word where they cannot be."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
from live_server import WAIT_S, LiveEngine
from running_server import StartServer

from megatron_medha.core.errors import DependencyError
from megatron_medha.server.observe.tracing import OtelTraces

ENDPOINT = "http://127.0.0.1:1/v1/traces"


class Kept:
    """An exporter that keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.done = threading.Event()

    def export(self, spans: Any) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.spans += spans
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.done.set()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


def test_without_the_library_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(DependencyError, match=r"pip install 'megatron_medha\[otel\]'"):
        OtelTraces(ENDPOINT)


def test_a_request_is_a_span_with_its_phases_under_the_clients_trace(start_server: StartServer) -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="the extra `otel` is not installed")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    engine, kept = LiveEngine(), Kept()
    server = start_server(engine, journal=engine.journal, traces=OtelTraces(ENDPOINT, kept))
    while server.get("/ready").status_code != 200:
        time.sleep(0.001)  # the engine's thread starts; nothing tells
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    body = {"prompt": [1] * 500, "max_tokens": 3}
    assert server.post("/v1/completions", body, headers={"traceparent": parent}).status_code == 200
    server.server.should_exit = True
    assert kept.done.wait(WAIT_S)
    by_name = {span.name: span for span in kept.spans}
    request = by_name["request"]
    assert f"{request.context.trace_id:032x}" == "ab" * 16 and f"{request.parent.span_id:016x}" == "cd" * 8
    assert request.attributes["num_prompt_tokens"] == 500 and request.attributes["outcome"] == "done"
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert [phase.parent.span_id for phase in phases] == [request.context.span_id] * 3
    times = [request.start_time, *(phase.end_time for phase in phases)]
    assert times == sorted(times) and phases[-1].end_time == request.end_time
    assert abs(request.end_time / 1e9 - time.time()) < 60
