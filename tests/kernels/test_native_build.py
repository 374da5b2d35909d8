"""Building the native library, and what becomes of a machine that cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels import native_build
from megatron_medha.kernels.attention import native_attention
from megatron_medha.kernels.choose_backend import attention_backend, backend_names
from megatron_medha.kernels.native_build import NativeUnavailable, native_library, native_target, usable_targets
from megatron_medha.worker.startup.device import described, use_instructions

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; nothing is built in the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "megatron_medha"


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the library cannot be had."""

    def fail(target: str | None = None) -> None:
        raise NativeUnavailable("there is no C++ compiler")

    monkeypatch.setattr(native_attention, "native_library", fail)


def test_without_a_compiler_the_reason_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        native_build._loaded.__wrapped__("AVX2")


def test_a_compiler_that_fails_leaves_no_half_made_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NativeUnavailable, match="false failed"):
        native_build._loaded.__wrapped__("AVX2")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_ranks_that_start_together_build_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho called >> "{log}"\nfor last; do :; done\necho library > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    code = "from megatron_medha.kernels.native_build import _built; print(_built('AVX2').read_text())"
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [rank.communicate()[0].strip() for rank in ranks] == [b"library", b"library"]
    assert log.read_text() == "called\n"


def test_the_best_instruction_set_is_taken_unless_another_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "_pinned", None)
    try:
        best, *_, least = usable_targets()
        assert native_target() == best
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    native_build.use_target(least.lower())
    assert native_target() == least
    native_build.use_target("auto")
    assert native_target() == best
    with pytest.raises(NativeUnavailable, match="not SSE"):
        native_build.use_target("sse")


def test_a_compiler_that_lacks_the_best_instructions_builds_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def loaded(target: str) -> None:
        if target == "AMX":
            raise NativeUnavailable("no such instruction")

    monkeypatch.setattr(native_build, "_loaded", loaded)
    monkeypatch.setattr(native_build, "usable_targets", lambda: ("AMX", "AVX512", "AVX2"))
    assert native_build._best_target.__wrapped__() == "AVX512"
    assert "target=AMX next=AVX512 reason=no such instruction" in caplog.text


def test_better_instructions_that_could_not_be_built_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(target: str) -> None:
        if target == "AMX":
            raise NativeUnavailable("c++ took longer than 900 s")

    monkeypatch.setattr(native_build, "_loaded", built)
    monkeypatch.setattr(native_build, "usable_targets", lambda: ("AMX", "AVX512", "AVX2"))
    monkeypatch.setattr(native_build, "_best_target", native_build._best_target.__wrapped__)
    monkeypatch.setattr(native_build, "_pinned", None)
    assert native_build.missed_targets() == ("AMX",)
    options = ModelOptions(device="cpu", dtype="bfloat16")
    said = described(CPU, 1, torch.bfloat16, torch.bfloat16, options, "native")
    assert "native avx512 (instead of amx) attention" in said
    native_build.use_target("avx512")  # as asked for, nothing is missed
    assert native_build.missed_targets() == ()
    with pytest.raises(ConfigError, match=r"model\.instruction_set=amx: cannot be had here: c\+\+ took longer"):
        use_instructions("amx", CPU)

def test_another_source_is_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = native_build._digest("AVX2")
    for source in native_build.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    assert native_build._digest("AVX2") == before
    with (tmp_path / "simd.h").open("a") as file:
        file.write("\n")
    assert native_build._digest("AVX2") != before
    assert native_build._digest("AVX512") != native_build._digest("AVX2")


def test_auto_takes_aten_where_native_cannot_be_had_and_says_why(
    no_native: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "megatron_medha"):
        assert attention_backend("auto", CPU).name == "aten"
    assert "there is no C++ compiler" in caplog.text and "name=aten" in caplog.text


def test_native_by_name_is_refused_where_it_cannot_be_had(no_native: None) -> None:
    with pytest.raises(ValueError, match="attention_backend=native cannot be had here: there is no C\\+\\+ compiler"):
        attention_backend("native", CPU)


def test_the_best_backend_is_chosen_by_default_and_an_unknown_name_is_refused() -> None:
    try:
        native_target()
        native_library()
        best = "native"
    except NativeUnavailable:
        best = "aten"
    assert attention_backend("auto", CPU).name == best
    assert attention_backend("aten", CPU).name == "aten"
    assert backend_names(CPU) == ("native", "aten")
    with pytest.raises(ValueError, match="attention_backend=triton.*known: auto, native, aten"):
        attention_backend("triton", CPU)
