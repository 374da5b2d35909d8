"""Flags of vLLM and SGLang: each works as the key it is here, or is answered with that key, or with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.cli.parts.known_flags import KnownFlag, known_flags
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.option_errors import type_at
from megatron_medha.options.serve_options import ServeOptions

# As people type them, and what they mean here. None: refused, and the test below looks at how.
TYPED = {
    "--model checkpoints/tiny": "checkpoint=checkpoints/tiny",
    "--model-path checkpoints/tiny": "checkpoint=checkpoints/tiny",
    "--tokenizer DIR": "tokenizer=DIR",
    "--tokenizer-path DIR": "tokenizer=DIR",
    "--served-model-name my-model": "server.served_model_names=[my-model]",
    "--host 127.0.0.1": "server.host=127.0.0.1",
    "--port 8181": "server.port=8181",
    "--port=8181": "server.port=8181",
    "--api-key sk-1": "server.api_key=sk-1",
    "--admin-api-key sk-2": "server.admin_key=sk-2",
    """--allowed-origins ["*"]""": 'server.allowed_origins=["*"]',
    "--allowed-origins http://localhost:3000": "server.allowed_origins=[http://localhost:3000]",
    "--uvicorn-log-level warning": "log_level=warning",
    "--log-level debug": "log_level=debug",
    "--enable-log-requests": "server.log_requests=true",
    "--disable-log-requests": "server.log_requests=false",
    "--max-logprobs 5": "server.max_logprobs=5",
    "--tool-call-parser hermes": "server.tool_call_parser=hermes",
    "--generation-config vllm": "server.generation_config=none",
    "--tensor-parallel-size 2": "parallel.tp=2",
    "-tp 2": "parallel.tp=2",
    "--tp-size=2": "parallel.tp=2",
    "--pipeline-parallel-size 2": "parallel.spp=2",
    "-pp 2": "parallel.spp=2",
    "--data-parallel-size 2": "parallel.dp=2",
    "-dp 2": "parallel.dp=2",
    "--dp-size 2": "parallel.dp=2",
    "--dtype bfloat16": "model.dtype=bfloat16",
    "--dtype float": "model.dtype=float32",
    "--device cpu": "model.device=cpu",
    "--block-size 16": "model.block_size=16",
    "--page-size 16": "model.block_size=16",
    "--max-model-len 8192": "model.max_context_len=8192",
    "--max_model_len=8192": "model.max_context_len=8192",
    "--context-length 8192": "model.max_context_len=8192",
    "--kv-cache-dtype auto": "model.kv_dtype=auto",
    "--enforce-eager": "model.cuda_graphs=false",
    "--disable-cuda-graph": "model.cuda_graphs=false",
    "--enable-prefix-caching": "kv.prefix_cache=true",
    "--enable-prefix-caching=false": "kv.prefix_cache=false",
    "--no-enable-prefix-caching": "kv.prefix_cache=false",
    "--disable-radix-cache": "kv.prefix_cache=false",
    "--max-num-seqs 64": "scheduler.max_num_sequences=64",
    "--max-running-requests 64": "scheduler.max_num_sequences=64",
    "--max-num-batched-tokens 4096": "scheduler.max_batch_tokens=4096",
    "--max-prefill-tokens 4096": "scheduler.max_batch_tokens=4096",
    "--scheduling-policy fcfs": "scheduler.policy=fcfs",
    "--enable-chunked-prefill": "",
    "--enable-auto-tool-choice": "",
    "--enable-metrics": "",
    "--trust-remote-code": "",
    "--ssl-certfile cert.pem --ssl-keyfile key.pem": None,  # the files are looked for
    "--gpu-memory-utilization 0.9": None,
    "--mem-fraction-static 0.8": None,
    "--quantization awq": None,
    "--chunked-prefill-size 512": None,
    "--chunked-prefill-size -1": None,
    "--revision main": None,
    "--download-dir /models": None,
    "--config vllm.yaml": None,
    "--chat-template chat.jinja": None,
    "--load-format dummy": None,
    "--seed 1": None,
    "--root-path /llm": None,
    "--enable-lora": None,
    "--lora-modules sql=DIR": None,
    """--speculative-config {"model":"x"}""": None,
    "--reasoning-parser qwen3": None,
    "--enable-expert-parallel": None,
    """--limit-mm-per-prompt {"image":0}""": None,
    """--kv-transfer-config {"a":1}""": None,
    "--cpu-offload-gb 4": None,
    "--distributed-executor-backend ray": None,
    "--nnodes 2": None,
}
WORKING = {typed: meaning for typed, meaning in TYPED.items() if meaning is not None}
REFUSED = [typed for typed, meaning in TYPED.items() if meaning is None]
ROWS = [pytest.param(flag, id=flag.names) for flag in known_flags()]


@pytest.mark.parametrize(("typed", "meaning"), WORKING.items(), ids=WORKING)
def test_a_flag_is_the_key_it_is_here(typed: str, meaning: str) -> None:
    found = parse_arguments([*typed.split(), "log_format=json"], command="serve").overrides
    assert found == (*([meaning] if meaning else []), "log_format=json")
    composed = freeze(compose("serve", ServeOptions, found), ServeOptions)
    assert composed.log_format.value == "json"


@pytest.mark.parametrize("typed", REFUSED)
def test_a_flag_that_is_none_here_is_answered_with_what_was_typed_and_a_way_on(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *typed.split(), "runtime=sim"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("medha serve: ")
    assert "unknown flag" not in message and "unknown key" not in message
    if "ssl" not in typed and not typed.startswith("--lora-modules"):
        assert typed in message


def test_a_value_that_was_typed_stands_in_the_key_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--gpu-memory-utilization=0.9", "--chunked-prefill-size", "512", "--enable-lora"])
    lines = capsys.readouterr().err.splitlines()
    assert "write model.kv_memory_share=0.9;" in lines[0]
    assert "write scheduler.chunking=fixed scheduler.fixed_chunk_tokens=512;" in lines[1]
    assert "--enable-lora: " in lines[2] and len(lines) == 3


def test_a_flag_without_its_value_is_refused() -> None:
    for words in (["--port"], ["--port", "--host", "::1"]):
        with pytest.raises(ConfigError, match=r"--port: a value is missing; write server.port=VALUE"):
            parse_arguments(words, command="serve")


def test_a_key_typed_after_a_flag_is_hidden_in_what_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key", "sk-very secret", "checkpoint=/nowhere"]) == 2
    assert "very" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ROWS)
def test_every_row_of_the_table_is_one_thing_and_names_keys_that_exist(flag: KnownFlag) -> None:
    kinds = [bool(flag.key), bool(flag.set), bool(flag.note), bool(flag.says)]
    assert sum(kinds) == 1, "key, set, note or says (beside write)"
    for word in (flag.key, *flag.set.split(), *[part for part in flag.write.split() if "=" in part]):
        if word:
            assert type_at(ServeOptions, word.partition("=")[0]) is not None


def test_the_test_types_a_flag_of_every_row() -> None:
    typed = {word.partition("=")[0].replace("_", "-") for line in TYPED for word in line.split()}
    assert not [flag.names for flag in known_flags() if not typed & set(flag.spellings)]


def test_other_commands_know_no_such_flags() -> None:
    with pytest.raises(ConfigError, match="--port: unknown flag"):
        parse_arguments(["--port", "1"], command="simulate")


def test_a_word_alone_after_flags_is_still_the_checkpoint(tmp_path: Path) -> None:
    found = parse_arguments(["--port", "1", str(tmp_path), "-tp", "2"], command="serve").overrides
    assert found == ("server.port=1", f"checkpoint={tmp_path}", "parallel.tp=2")
