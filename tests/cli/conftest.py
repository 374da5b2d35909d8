"""A tokenizer on disk, and `medha` as a process: these tests start the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Medha:
    """A running `medha`, with what it has printed."""

    def __init__(self, words: tuple[str, ...], python_flags: tuple[str, ...], directory: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "MEDHA_API_KEY"}
        self.errors = directory / "stderr"
        self._stderr = self.errors.open("w")
        self.printed = ""  # what was left to read at its end
        self.process = subprocess.Popen(
            [sys.executable, *python_flags, "-m", "megatron_medha", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            cwd=directory,
        )

    def line_with(self, words: str) -> str:
        """The next line that has these words; fails if the process ends without it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"ended without {words!r}: {self.errors.read_text()}")

    def url(self) -> str:
        """Where it listens, once it does."""
        return self.line_with("listening on").split()[2]

    def end(self) -> int:
        """Wait for its exit code."""
        assert self.process.stdout is not None
        if not self.process.stdout.closed:
            self.printed += self.process.stdout.read()
        exit_code = self.process.wait(60)
        self._stderr.close()
        return exit_code


Start = Callable[..., Medha]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `medha` with these words; whatever still runs at the end of the test is killed."""
    running: list[Medha] = []

    def run(*words: str, python_flags: tuple[str, ...] = ()) -> Medha:
        running.append(Medha(words, python_flags, tmp_path))
        return running[-1]

    yield run
    for medha in running:
        if medha.process.poll() is None:
            medha.process.kill()
        medha.end()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer, as small as they come."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(description))
    return directory


@pytest.fixture
def simulated(tokenizer_dir: Path) -> tuple[str, ...]:
    """Words of a server that needs no model and takes any free port."""
    return ("serve", "runtime=sim", "model=llama3_8b", "hardware=h100", f"tokenizer={tokenizer_dir}", "server.port=0")
