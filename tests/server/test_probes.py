"""Health, metrics, keys, ids, tokens, ports: everything beside generation."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from running_server import Running, StartServer

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EnginePhase, EngineStatus, ReplicaState
from megatron_medha.server.admission import REJECTION_REASONS
from megatron_medha.server.observe.metrics import CUT_OFF_REASONS, Metrics
from megatron_medha.server.observe.metrics_page import MetricsPage
from megatron_medha.server.run_server import bind
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.text.tokenizer import Tokenizer

PATH = "/v1/completions"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/version", "/metrics"])
def test_probes_answer_get_and_head(server: Running, path: str) -> None:
    assert server.get(path).status_code == 200
    head = server.client.head(path)
    assert head.status_code == 200 and head.content == b""


def test_models_are_described(start_server: StartServer) -> None:
    server = start_server(served_model_names=("org/name", "b"))
    models = server.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["org/name", "b"]
    one = server.get("/v1/models/org/name").json()
    assert (one["id"], one["object"], one["max_model_len"]) == ("org/name", "model", 1000)


def test_text_and_messages_are_tokenized_and_back(server: Running) -> None:
    answer = server.post("/tokenize", {"model": "fake-model", "prompt": "hi", "add_special_tokens": True}).json()
    assert answer == {"count": 2, "max_model_len": 1000, "tokens": [104, 105], "token_strs": None}
    answer = server.post("/tokenize", {"prompt": "é", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["bytes:\\xc3", "bytes:\\xa9"]
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "<|user|>hi\n<|assistant|>"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert server.post("/detokenize", {"tokens": [104, 256]}).json() == {"prompt": "h<s>"}


def test_a_long_text_is_tokenized_on_a_thread(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    encode = Tokenizer.encode

    def encode_long(self: Tokenizer, text: str, **options: Any) -> array[int]:
        threads.add(threading.current_thread().name)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode_long)
    server = start_server(FakeEngine(max_request_tokens=20_000))
    answer = server.post("/tokenize", {"prompt": "x" * 20_000, "return_token_strs": True}).json()
    assert len(answer["token_strs"]) == answer["count"] == 20_000
    assert all(name.startswith("text") for name in threads)


def test_without_the_key_only_probes_answer(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    wrong_headers: list[dict[str, str]] = [
        {}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Basic secret"},
        {"authorization": "Bearer secré"},
    ]
    for headers in wrong_headers:
        encoded = {name: value.encode() for name, value in headers.items()}
        response = server.post(PATH, {"prompt": "a"}, headers=encoded)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert server.get("/v1/models", headers=encoded).status_code == 401
    assert server.post(PATH, {"prompt": "a"}, headers={"authorization": "Bearer secret"}).status_code == 200
    for path in ("/health", "/live", "/ready", "/ping", "/dashboard"):
        assert server.get(path).status_code == 200
    for path in ("/metrics", "/version", "/openapi.json", "/docs", "/nothing"):
        assert server.get(path).status_code == 401


def test_the_servers_address_leads_to_the_dashboard(start_server: StartServer) -> None:
    response = start_server(api_key="secret").get("/")
    assert response.status_code == 307 and response.headers["location"] == "dashboard"


@pytest.mark.parametrize("path", ["/docs", "/dashboard"])
def test_pages_load_nothing_from_elsewhere(server: Running, path: str) -> None:
    response = server.get(path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", response.text)
    assert not re.search(r"@import|url\(", response.text)


def test_the_page_of_routes_lists_them_all(server: Running) -> None:
    page = server.get("/docs").text
    assert "<script" not in page and 'href="openapi.json"' in page
    assert all(path in page for path in server.get("/openapi.json").json()["paths"] if "{" not in path)


def test_a_clients_request_id_comes_back_and_others_get_one(server: Running) -> None:
    assert server.post(PATH, {"prompt": "a"}, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    drawn = [server.post(PATH, {"prompt": "a"}).headers["x-request-id"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    long = server.get("/health", headers={"x-request-id": "x" * 500})
    assert len(long.headers["x-request-id"]) == 32
    assert "x-request-id" in server.get("/nope").headers


def samples_of(page: str) -> dict[str, float]:
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason") or sample.labels.get("le") or ""
            samples[f"{sample.name}{{{reason}}}" if reason else sample.name] = sample.value
    return samples


def test_metrics_have_our_names_and_vllms(server: Running) -> None:
    for extra in ({}, {"stop": "b"}):
        server.post(PATH, {"prompt": "abc", "max_tokens": 4, **extra}, headers={"x-slo-ttft-ms": "60000"})
    samples = samples_of(server.get("/metrics").text)
    for prefix in ("medha", "vllm"):
        assert samples[f"{prefix}:prompt_tokens_total"] == 6
        assert samples[f"{prefix}:generation_tokens_total"] == 6
        assert samples[f"{prefix}:request_success_total{{length}}"] == 1
        assert samples[f"{prefix}:request_success_total{{stop}}"] == 1
        assert samples[f"{prefix}:time_to_first_token_seconds_count"] == 2
        assert samples[f"{prefix}:inter_token_latency_seconds_count"] == 4
        assert samples[f"{prefix}:e2e_request_latency_seconds_count"] == 2
        assert samples[f"{prefix}:request_prompt_tokens_sum"] == 6
        assert samples[f"{prefix}:request_generation_tokens_sum"] == 6
        assert samples[f"{prefix}:num_requests_running"] == 0
        assert samples[f"{prefix}:kv_cache_usage_perc"] == 0
        assert f"{prefix}:request_queue_time_seconds_count" in samples
        assert f"{prefix}:num_preemptions_total" in samples
    assert samples["medha:ttft_slo_met_total"] == 2
    assert "vllm:time_to_first_token_seconds_bucket{320.0}" in samples


def test_every_labelled_metric_is_there_with_zero_from_the_first_scrape_and_under_one_name(
    start_server: StartServer,
) -> None:
    engine = FakeEngine(status=EngineStatus(EnginePhase.LOADING))
    server = start_server(engine, model_name="fake")
    families = [one for one in text_string_to_metric_families(server.get("/metrics").text) if one.name[:5] == "medha"]
    assert all(family.samples for family in families), [family.name for family in families if not family.samples]
    assert {sample.labels["model_name"] for family in families for sample in family.samples} == {"fake"}
    labels = {
        family.name: {sample.labels.get("reason") or sample.labels.get("slo_class") for sample in family.samples}
        for family in families
    }
    assert labels["medha:requests_cut_off"] == set(CUT_OFF_REASONS)
    assert labels["medha:admission_rejections"] == set(REJECTION_REASONS)
    assert labels["medha:deadlines_met"] == {"interactive", "standard", "batch"}


def test_metrics_tell_replicas_apart(server: Running) -> None:
    class Pair(FakeEngine):
        @property
        def replicas(self) -> Sequence[ReplicaState]:
            lost = EngineStatus(EnginePhase.FAILED, num_failures=3)
            return (ReplicaState(self.status, self.load), ReplicaState(lost, replace(self.load, num_free_blocks=25)))

    page = MetricsPage(Metrics(), Pair(), server.service.admission).render("m").decode()
    samples = {
        (sample.name, sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(page) for sample in family.samples if "engine" in sample.labels
    }
    of_each = {"medha:is_ready": (1, 0), "medha:rank_failures_total": (0, 3), "vllm:kv_cache_usage_perc": (0, 0.75)}
    for name, values in of_each.items():
        assert (samples[name, "0"], samples[name, "1"]) == values
    assert samples["medha:generation_tokens_total", "all"] == 0


def test_the_schema_lists_routes_and_bodies(server: Running) -> None:
    schema = server.get("/openapi.json").json()
    assert "post" in schema["paths"]["/v1/completions"]
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].removeprefix("#/components/schemas/") in schema["components"]["schemas"]
    assert "HTTPValidationError" not in json.dumps(schema["paths"]["/v1/completions"])


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"server\.port={port}"):
            bind(ServerConfig(port=port))


@pytest.mark.parametrize(
    "settings",
    [{"port": 70000}, {"api_key": ""}, {"served_model_names": ("",)}, {"max_logprobs": -1}, {"sse_keepalive_s": 0}],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerConfig(**settings)


def test_the_server_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, megatron_medha.server.app, megatron_medha.text.tokenizer, megatron_medha.cli.chat\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_metrics_show_how_late_the_event_loop_is_and_how_much_memory_was_used(start_server: StartServer) -> None:
    metrics = Metrics()
    server = start_server(metrics=metrics)
    metrics.recent_lags_s.extend([0.0, 1.5, 0.25])
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text) for sample in family.samples
    }  # fmt: skip
    assert samples["medha:event_loop_lag_max_seconds"] >= 1.5
    assert samples["medha:process_peak_memory_bytes"] > 2**20
    assert "medha:event_loop_lag_seconds_count" in samples


def test_version_names_what_decides_the_bits(start_server: StartServer) -> None:
    answer = start_server().get("/version").json()
    assert answer["device"] == FakeEngine().facts.device and set(answer) == {"version", "torch", "device"}
