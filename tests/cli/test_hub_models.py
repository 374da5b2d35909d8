"""Models named as on the Hugging Face hub, from a stand-in for it on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_medha.cli.parts.hub_models import hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 101, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
FILES = {
    "acme/small": {"config.json": json.dumps(LLAMA), "tokenizer.json": json.dumps(TOKENIZER),
                   "model.safetensors": "weights",
                   "pytorch_model.bin": "pickle", "original/model.safetensors": "others"},
    "acme/refused": {"config.json": json.dumps(LLAMA | {"model_type": "mamba2"}), "model.safetensors": "weights"},
    "acme/pickled": {"config.json": json.dumps(LLAMA), "pytorch_model.bin": "pickle"},
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """What of the hub's HTTP API snapshot_download needs; `asked` are the files that were fetched."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRoutes)
        self.asked: list[str] = []


class HubRoutes(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        files = FILES.get(repo)
        if files is None:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if path.startswith("api/"):
            siblings = [{"rfilename": name} for name in files]
            tree = [{"type": "file", "path": name, "size": len(text), "oid": "0"} for name, text in files.items()]
            body: object = tree if "tree" in parts else {"id": repo, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.asked.append(name)
        content = files[name].encode()
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(hub: Hub, home: Path, code: str, **environment: str) -> str:
    """What a fresh process prints that asks this hub; its client reads the environment when it is imported."""
    variables = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment,
    }  # fmt: skip
    head = "from pathlib import Path\nfrom megatron_medha.cli.parts.hub_models import local_directory\n"
    run = subprocess.run(
        [sys.executable, "-c", head + code], env=variables, capture_output=True, text=True, timeout=120, cwd=home
    )
    return run.stdout + run.stderr


LOCAL = "print(local_directory('checkpoint', Path('{}')))"


def test_a_model_is_downloaded_once_with_what_is_read_of_it(hub: Hub, tmp_path: Path) -> None:
    directory = Path(ask(hub, tmp_path, LOCAL.format("acme/small")).strip())
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_text() == "weights"
    assert sorted(hub.asked) == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.asked.clear()
    assert Path(ask(hub, tmp_path, LOCAL.format("acme/small")).strip()) == directory
    assert hub.asked == []


def test_a_cached_model_is_served_without_a_network(hub: Hub, tmp_path: Path) -> None:
    directory = ask(hub, tmp_path, LOCAL.format("acme/small"))
    assert ask(hub, tmp_path, LOCAL.format("acme/small"), HF_HUB_OFFLINE="1") == directory
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(hub, tmp_path, LOCAL.format("acme/small"), **nobody).splitlines()[-1] == directory.strip()


def test_a_model_that_is_not_served_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    last = ask(hub, tmp_path, LOCAL.format("acme/refused")).splitlines()[-1]
    assert last.startswith("megatron_medha.core.errors.ConfigError: ") and "mamba2" in last
    assert hub.asked == ["config.json"]


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("acme/unknown", {}, "checkpoint=acme/unknown: no such directory, and the Hugging Face hub has no model"),
        ("acme/pickled", {}, "checkpoint=acme/pickled: no *.safetensors"),
        ("acme/small", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set and acme/small is not in the cache"),
        ("acme/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face hub cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    hub: Hub, tmp_path: Path, name: str, environment: dict[str, str], message: str
) -> None:
    last = ask(hub, tmp_path, LOCAL.format(name), **environment).splitlines()[-1]
    assert last.startswith("megatron_medha.core.errors.ConfigError: ") and message in last


def test_the_sizes_of_a_model_of_the_hub_are_simulated(hub: Hub, tmp_path: Path) -> None:
    code = "from megatron_medha.cli.medha import main\nmain(['simulate', 'model=acme/small', '--cfg', 'job'])"
    text = ask(hub, tmp_path, code)
    assert "    name: small\n    num_layers: 2\n    hidden_size: 64\n" in text
    assert hub.asked == ["config.json"]


def test_a_path_is_never_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("org/model", "checkpoints/missing", "/a/b", "~/a", "a", "a/b/c", "../a"):
        assert hub_name(Path(path)) is None, path
    assert hub_name(Path("acme/small")) == "acme/small"
    assert hub_name(Path("acme/small@v1.0")) == "acme/small@v1.0"
    assert hub_name(None) is None
