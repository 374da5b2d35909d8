"""Options composed before: recalled as they were, and not where anything has changed or is secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_medha.options.compose import as_yaml, compose, freeze, plain_values
from megatron_medha.options.remembered_options import MAX_FILES, digest_of, recall, remember
from megatron_medha.options.serve_options import ServeOptions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "megatron_medha" / "options"


def compose_and_remember(*overrides: str) -> tuple[str, ServeOptions]:
    composed = compose("serve", ServeOptions, overrides)
    digest = digest_of("serve", overrides)
    remember(digest, plain_values(composed), as_yaml(composed, resolves=False))
    return digest, freeze(composed, ServeOptions)


def test_what_was_composed_is_recalled_as_it_was() -> None:
    digest, options = compose_and_remember("checkpoint=some/where", "server.port=0", "scheduler=fcfs")
    assert recall(digest, ServeOptions) == options


def test_other_words_are_another_digest() -> None:
    assert digest_of("serve", ["server.port=1"]) != digest_of("serve", ["server.port=2"])


@pytest.mark.parametrize(
    "overrides", [("server.api_key=sk-1",), ("server=public", "server.api_key=null"), ("server=public",)]
)
def test_options_with_a_key_or_from_the_environment_are_not_kept(
    overrides: tuple[str, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHA_API_KEY", "sk-2")
    digest, _ = compose_and_remember("checkpoint=c", "server.is_open_to_all=true", *overrides)
    assert recall(digest, ServeOptions) is None
    assert not cache.exists()


def test_a_broken_file_is_as_none(cache: Path) -> None:
    digest, _ = compose_and_remember("checkpoint=c")
    (file,) = cache.iterdir()
    file.write_bytes(b"\xc1")
    assert recall(digest, ServeOptions) is None


def test_old_ones_go_when_there_are_many(cache: Path) -> None:
    composed = compose("serve", ServeOptions, ["checkpoint=c"])
    values, unresolved = plain_values(composed), as_yaml(composed, resolves=False)
    for number in range(MAX_FILES + 3):
        remember(f"digest{number}", values, unresolved)
        # As if some time had passed: the clock of file systems may stand for ten milliseconds.
        os.utime(cache / f"digest{number}.msgpack", (number, number))
    assert len(list(cache.iterdir())) == MAX_FILES
    assert recall(f"digest{MAX_FILES + 2}", ServeOptions) is not None
