"""`medha serve --check` of directories that hold no checkpoint, a damaged or a hostile one: reasons, never a trace."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.cli.medha import main

LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


def files(**contents: bytes | str | dict[str, Any]) -> Callable[[Path], None]:
    """A directory with such files; __ in a name is a dot, and ___ a slash."""

    def make(directory: Path) -> None:
        for name, content in contents.items():
            path = directory / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(content) if isinstance(content, dict) else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def a_config_that_is_a_directory(directory: Path) -> None:
    (directory / "config.json").mkdir()
    (directory / "model.safetensors").write_bytes(b"")


def links_in_a_circle(directory: Path) -> None:
    (directory / "config.json").symlink_to("model.safetensors")
    (directory / "model.safetensors").symlink_to("config.json")


def a_pipe(directory: Path) -> None:
    os.mkfifo(directory / "config.json")
    (directory / "model.safetensors").write_bytes(b"")


GARBAGE = b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f" * 9
PICKLED = b"cos\nsystem\n(S'touch hacked'\ntR."
ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (files(), "no checkpoint found.*It is empty"),
    "notes only": (files(README__md="hello"), "It holds: README.md"),
    "weights without a config": (files(model__safetensors=b""), "no config.json"),
    "a config without weights": (files(config__json=LLAMA), "no .*safetensors"),
    "pickled weights": (files(config__json=LLAMA, pytorch_model__bin=PICKLED), "convert them to safetensors"),
    "no JSON": (files(config__json="{", model__safetensors=b""), "config.json"),
    "a list": (files(config__json="[]", model__safetensors=b""), "holds a list"),
    "brackets": (files(config__json="[" * 100_000, model__safetensors=b""), "config.json"),
    "not text": (files(config__json=GARBAGE, model__safetensors=b""), "config.json"),
    "numbers out of range": (
        files(config__json=LLAMA | {"hidden_size": 10**400, "rms_norm_eps": float("nan")}, model__safetensors=b""),
        "config.json",
    ),
    "a name as long as a book": (
        files(config__json={"model_type": "x" * 100_000}, model__safetensors=b""), "model_type='xxx"
    ),
    "several reasons": (
        files(config__json=LLAMA | {"softcap": 1.0, "hidden_act": "mish", "chunks": 7}, model__safetensors=b""),
        "(?s)softcap.*chunks.*hidden_act",
    ),
    "a tensor file cut off": (files(config__json=LLAMA, model__safetensors=b"\xff" * 7), "model.safetensors"),
    "a header of exabytes": (
        files(config__json=LLAMA, model__safetensors=b"\xff" * 7 + b"\x7f" + b"{}"), "model.safetensors"
    ),
    "a Megatron directory with nothing in it": (files(metadata__json="{}", __metadata=GARBAGE), "metadata"),
    "a pickle that runs a command": (
        files(metadata__json={"sharded_backend": "torch_dist"}, __metadata=PICKLED), "metadata|common.pt"
    ),
    "an iteration elsewhere": (
        files(latest_checkpointed_iteration__txt="../../../etc"), "latest_checkpointed_iteration"
    ),
    "an iteration that is no number": (files(latest_checkpointed_iteration__txt=GARBAGE), "latest_checkpointed_iter"),
    "a step elsewhere": (files(latest="../../../etc"), "latest"),
    "an adapter of nothing": (
        files(adapter_config__json="{}", adapter_model__safetensors=b""), "adapter_config.json"
    ),
    "a GGUF file of nothing": (files(model__gguf=b""), "model.gguf"),
    "a GGUF file of garbage": (files(model__gguf=b"GGUF" + b"\xff" * 60), "model.gguf"),
    "NeMo without a model": (files(context___model__yaml="[", weights___metadata__json="{}"), "model.yaml|metadata"),
    "a config that is a directory": (a_config_that_is_a_directory, "config.json"),
    "links in a circle": (links_in_a_circle, "no checkpoint found|config.json"),
    "a pipe in place of a config": (a_pipe, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_directory_is_refused_with_a_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, told = ODD[name]
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = main(["serve", "--check", str(tmp_path / "model"), "model.device=cpu", "model.kv_memory_gib=0.01"])
    message = capsys.readouterr().err
    assert code in (1, 2)
    assert re.search(told, message), message
    assert message.startswith("medha serve: ") and "Traceback" not in message and len(message) < 4000
    assert not (tmp_path / "hacked").exists()
