"""`medha serve` as a process, over a simulated model: start, stop, and what it says."""

from __future__ import annotations

import json
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli.medha import main

Words = tuple[str, ...]
Start = Callable[..., Any]  # conftest.Medha
KEYS = ("server.api_key=sk-secret", "server.admin_key=sk-root")


def test_it_says_when_it_listens_and_when_it_is_ready_and_how_to_ask(start: Start, simulated: Words) -> None:
    medha = start(*simulated)
    url = medha.url()
    assert "llama3_8b on simulated h100" in medha.line_with("ready after")
    assert f"curl {url}/v1/" in medha.line_with("curl")
    assert f"{sys.executable} -m megatron_medha chat url={url}" in medha.line_with("chat")
    assert f"{url}/dashboard" in medha.line_with("dashboard")


def test_it_answers_as_the_curl_line_says(start: Start, simulated: Words) -> None:
    medha = start(*simulated)
    url = medha.url()
    medha.line_with("ready after")
    assert _complete(url)["usage"]["completion_tokens"] == 3


def test_two_replicas_answer_behind_one_port_and_log_their_decisions_apart(
    start: Start, simulated: Words, tmp_path: Path
) -> None:
    medha = start(*simulated, "parallel.dp=2", f"tracking.decision_log={tmp_path / 'decisions.jsonl'}")
    url = medha.url()
    assert "2 replicas of simulated h100" in medha.line_with("ready after")
    assert _complete(url)["usage"]["completion_tokens"] == 3
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    assert sorted(path.name for path in tmp_path.glob("decisions*")) == ["decisions.0.jsonl", "decisions.1.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_it_with_code_0(start: Start, simulated: Words, number: signal.Signals) -> None:
    medha = start(*simulated)
    medha.line_with("ready after")
    medha.process.send_signal(number)
    assert medha.end() == 0
    assert medha.errors.read_text() == ""


def test_a_server_whose_output_nobody_reads_any_more_is_stopped_by_one_signal(start: Start, simulated: Words) -> None:
    medha = start(*simulated)  # as in `medha serve | tee log`, where Ctrl-C ends tee first
    medha.url()
    medha.process.stdout.close()
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    assert medha.errors.read_text() == ""


def test_a_second_ctrl_c_stops_it_at_once_with_code_130(start: Start, simulated: Words) -> None:
    # An answer of 100,000 tokens would hold a graceful stop up for as long as it is allowed to.
    medha = start(*simulated, "server.drain_timeout_s=3600")
    url = medha.url()
    medha.line_with("ready after")
    body = {"prompt": "hello", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    answer = urllib.request.urlopen(_request(url, body))
    assert answer.readline().startswith(b"data:")
    medha.process.send_signal(signal.SIGINT)
    assert "waiting up to 3600 s for 1 request; Ctrl-C again stops now" in medha.line_with("stopping")
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 130


def test_a_model_that_is_not_served_is_refused_once_before_the_server_listens_with_all_reasons(
    start: Start, tmp_path: Path
) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 101,
        "num_hidden_layers": 2, "max_position_embeddings": 256, "hidden_act": "relu7", "unheard_of": 1,
        "rope_scaling": {"rope_type": "spiral"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_text("")
    medha = start("serve", str(tmp_path), "server.port=0")
    assert medha.process.stdout.read() == ""
    assert medha.end() == 2
    message = medha.errors.read_text()
    assert len(message.splitlines()) == message.count("medha serve: ") >= 1
    assert "relu7" in message and "unheard_of" in message and "spiral" in message
    assert "tokenizer" not in message


def test_a_directory_without_a_checkpoint_is_refused_for_that_before_its_tokenizer(
    start: Start, tmp_path: Path
) -> None:
    medha = start("serve", str(tmp_path), "server.port=0")
    assert medha.end() == 2
    message = medha.errors.read_text()
    assert "no checkpoint found" in message and len(message.splitlines()) == 1


def test_the_front_process_imports_no_torch_numpy_or_transformers(start: Start, simulated: Words) -> None:
    medha = start(*simulated, python_flags=("-X", "importtime"))
    medha.line_with("ready after")
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in medha.errors.read_text().splitlines()}
    assert "uvicorn" in imported
    assert not imported & {"torch", "numpy", "transformers", "megatron"}


def test_help_imports_neither_hydra_nor_the_server(start: Start) -> None:
    medha = start("serve", "--help", python_flags=("-X", "importtime"))
    assert medha.end() == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in medha.errors.read_text().splitlines()}
    assert not imported & {"torch", "hydra", "omegaconf", "fastapi"}


def test_a_port_that_is_taken_is_said_before_anything_is_started(
    simulated: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            assert main([*simulated, f"server.port={port}"]) == 2
        finally:
            for number, action in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, action)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"server.port={port}" in captured.err
    assert "choose another server.port" in captured.err


def test_a_tokenizer_that_is_broken_ends_the_start(start: Start, simulated: Words, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    medha = start(*simulated, f"tokenizer={tmp_path}")
    assert medha.end() == 1
    assert "is no valid tokenizer" in medha.errors.read_text()
    assert "Traceback" not in medha.errors.read_text()


def test_a_recorded_run_replays_to_the_same_batches(
    start: Start, simulated: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "decisions.jsonl"
    medha = start(*simulated, f"tracking.decision_log={log}")
    url = medha.url()
    medha.line_with("ready after")
    _complete(url)
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    assert main(["replay", str(log)]) == 0
    assert "3 batches, all equal: policy lars, model llama3_8b" in capsys.readouterr().out


def test_samples_go_to_the_metrics_log_and_the_last_one_is_not_lost(
    start: Start, simulated: Words, tmp_path: Path
) -> None:
    log = tmp_path / "new" / "metrics.jsonl"
    medha = start(*simulated, f"tracking.metrics_log={log}", "tracking.interval_s=1000")
    url = medha.url()
    medha.line_with("ready after")
    _complete(url)
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    [line] = log.read_text().splitlines()
    sample = json.loads(line)
    assert sample["num_output_tokens"] == 3
    assert 0 < sample["ttft_s_mean"] < 60


def _complete(url: str) -> dict[str, Any]:
    body = {"prompt": "hello world", "max_tokens": 3, "ignore_eos": True}
    with urllib.request.urlopen(_request(url, body)) as answer:
        answered: dict[str, Any] = json.loads(answer.read())
        return answered


def _request(url: str, body: dict[str, object]) -> urllib.request.Request:
    return urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def test_log_lines_are_json_where_asked_and_hold_no_key(start: Start, simulated: Words) -> None:
    medha = start(*simulated, "log_format=json", "server.log_requests=true", *KEYS)
    url = medha.url()
    medha.line_with("ready after")
    request = _request(url, {"prompt": "hello world", "max_tokens": 3, "ignore_eos": True})
    request.add_header("Authorization", "Bearer sk-secret")
    request.add_header("X-Request-Id", "mine-7")
    urllib.request.urlopen(request).read()
    medha.process.send_signal(signal.SIGTERM)
    assert medha.end() == 0
    lines = [json.loads(line) for line in medha.errors.read_text().splitlines()]
    [done] = [line for line in lines if line["event"] == "request_done"]
    assert (done["request_id"], done["client"], done["num_output_tokens"]) == ("mine-7", "default", 3)
    assert "sk-" not in medha.errors.read_text()


def test_sighup_reads_limits_from_the_users_own_option_again(start: Start, simulated: Words, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "server" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults:\n  - local\n\nmax_prompt_tokens: 100\n")
    medha = start(*simulated, "--config-dir", str(tmp_path / "conf"), "server=mine", "server.port=0")
    url = medha.url()
    medha.line_with("ready after")
    assert _complete(url)["usage"]["completion_tokens"] == 3
    own.write_text("defaults:\n  - local\n\nmax_prompt_tokens: 1\n")
    medha.process.send_signal(signal.SIGHUP)
    status = 200
    while status == 200:  # the signal reaches the loop, and the files are read, in their own time
        try:
            status = urllib.request.urlopen(_request(url, {"prompt": "hello world", "max_tokens": 1})).status
        except urllib.error.HTTPError as refused:
            status = refused.code
    assert status == 413
    medha.process.send_signal(signal.SIGTERM)
    assert medha.end() == 0
    assert "reloaded changed=max_prompt_tokens" in medha.errors.read_text()
