"""LLMs over a simulated model: real engine and service, no ranks, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_medha import LLM

WORDS = ("[UNK]", "hello", "world", "<s>", "</s>")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer, as small as they come."""
    directory = tmp_path_factory.mktemp("tokenizer")
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(description))
    return directory


@pytest.fixture(scope="session")
def simulated(tokenizer_dir: Path) -> dict[str, Any]:
    """Options of an LLM that needs no model."""
    return {"runtime": "sim", "model": "llama3_8b", "hardware": "h100", "tokenizer": tokenizer_dir}


@pytest.fixture
def make(simulated: dict[str, Any]) -> Iterator[Callable[..., LLM]]:
    """Make an LLM with further options; it is closed at the end of the test."""
    made: list[LLM] = []

    def make_one(**options: Any) -> LLM:
        made.append(LLM(**{**simulated, **options}))
        return made[-1]

    yield make_one
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def llm(simulated: dict[str, Any]) -> Iterator[LLM]:
    """One for tests that leave nothing behind."""
    with LLM(**simulated) as one:
        yield one
