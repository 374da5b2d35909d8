"""The Python API over real ranks: the examples, the tokens of the HTTP API, and a rank that is killed meanwhile."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_medha import LLM, SamplingParams
from megatron_medha.cli.parts.served import server_process
from tests.python_api.child_processes import child_processes

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {"model.kv_memory_gib": 0.05, "model.num_threads": 1}
PROMPTS = ["hello", "hello world", "world world hello", "hello " * 300]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 20},
    {"seed": 5, "max_tokens": 20, "temperature": 0.9, "top_p": 0.9},
    {"seed": 7, "max_tokens": 12, "n": 3, "frequency_penalty": 0.5},
    {"temperature": 0.0, "max_tokens": 20, "logprobs": 3, "stop_token_ids": [77]},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A small random Llama with the word tokenizer."""
    transformers = pytest.importorskip("transformers")
    import torch

    directory = tmp_path_factory.mktemp("small-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=3, eos_token_id=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    return directory


def over_http(url: str, prompt: str, params: dict[str, Any]) -> list[list[int]]:
    body = json.dumps({"prompt": prompt, "return_token_ids": True, **params}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        choices = json.load(response)["choices"]
    return [choice["token_ids"] for choice in choices]


def test_the_tokens_are_those_of_http_also_when_a_rank_is_killed_and_nothing_is_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"checkpoint={checkpoint}", *(f"{key}={value}" for key, value in OPTIONS.items())]
    with server_process(words, tmp_path / "log") as url:
        expected = [over_http(url, *case) for case in zip(PROMPTS, PARAMS, strict=True)]
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with LLM(checkpoint, **OPTIONS) as llm:
        params = [SamplingParams(**each) for each in PARAMS]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [[one.token_ids for one in output.outputs] for output in outputs] == expected
        assert outputs[3].outputs[0].logprobs is not None

        stream = llm.stream("hello", SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
        begun = [next(stream) for _ in range(3)]
        (rank,) = ranks()
        os.kill(rank, signal.SIGKILL)
        killed = [*begun, *stream]
        again = [*llm.stream("hello", SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))]
        assert [one.token_ids for one in killed] == [one.token_ids for one in again]
        (rank,) = ranks()
    assert ranks() == []
    assert not Path(f"/proc/{rank}").exists()
    assert [*(tmp_path / "scratch").iterdir()] == []


def ranks() -> list[int]:
    """Processes that are ranks of this one."""
    return [pid for pid, words in child_processes().items() if b"megatron_medha.worker.main" in words]


@pytest.mark.parametrize("name", ["offline_batch", "chat_stream"])
def test_an_example_runs(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(checkpoint)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "'import os' -> " in printed or "> And a stack?" in printed


def test_the_web_example_streams(checkpoint: Path) -> None:
    client = pytest.importorskip("starlette.testclient")
    app = runpy.run_path(str(EXAMPLES / "web_handler.py"))["make_app"](str(checkpoint))
    with client.TestClient(app) as session:
        answer = session.get("/story", params={"about": "queues"})
    assert answer.status_code == 200
