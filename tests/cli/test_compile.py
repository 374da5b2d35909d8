"""`medha compile`: compiled decisions are the interpreted ones, and a build is used for its own sources only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.core.errors import DependencyError
from megatron_medha.system import compiled_core
from megatron_medha.system.compiled_core import MODULES, SWITCH, compile_core, compiled_directory, use_compiled_core

ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None
    or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="there is no C compiler, or Python came without its headers",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path


def run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


@NEEDS_COMPILER
def test_compiled_decisions_are_the_interpreted_ones_to_the_bit(cache: Path) -> None:
    walks = ("-m", "tests.cli.walked_decisions")
    kind, interpreted = run(*walks).split()
    assert kind == "interpreted"
    compile_core(optimisation="0")
    assert run(*walks).split() == ["compiled", interpreted]
    assert run(*walks, **{SWITCH: "0"}).split() == ["interpreted", interpreted]
    assert "decisions compiled" in run("-m", "megatron_medha", "version")
    assert not list((cache / "megatron_medha").glob("build-*"))


def test_a_build_of_other_sources_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(compiled_core.__file__).parents[1]
    copy = tmp_path / "copy"
    for floor in ("core", "sim", "stats", "system"):
        shutil.copytree(here / floor, copy / floor, ignore=shutil.ignore_patterns("__pycache__"))
    before = compiled_directory()
    monkeypatch.setattr(compiled_core, "_HERE", copy)
    assert compiled_directory() == before
    with open(copy / "core" / "scheduling" / "policies.py", "a", encoding="utf-8") as source:
        source.write("# a policy of one's own\n")
    assert compiled_directory() != before


def test_who_has_loaded_the_scheduler_already_goes_on_with_it(cache: Path) -> None:
    import megatron_medha.core.scheduling.scheduler  # noqa: F401

    before = list(sys.meta_path)
    directory = compiled_directory()
    directory.mkdir(parents=True)
    compiled_core._library(directory, compiled_core._SHARED).touch()
    assert not use_compiled_core()
    assert sys.meta_path == before


def test_nothing_of_what_is_compiled_is_loaded_before_one_can_choose() -> None:
    loaded = run("-c", "import sys, megatron_medha.cli.medha; print(*sys.modules)").split()
    assert "megatron_medha.system.compiled_core" in loaded
    assert not [name for name in MODULES if f"megatron_medha.{name}" in loaded]


def test_without_the_compiler_it_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_core, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'megatron_medha\[compile\]'"):
        compile_core()


def test_removing_what_is_not_there_is_no_failure(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--remove"]) == 0
    assert "not compiled" in capsys.readouterr().out


def test_an_unknown_word_is_refused_by_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["compile"]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "file") in message and "set XDG_CACHE_HOME" in message


def test_only_the_newest_builds_are_kept(tmp_path: Path) -> None:
    for age in range(compiled_core._MAX_BUILDS + 2):
        build = tmp_path / f"core-{age}"
        build.mkdir()
        os.utime(build, ns=(10**9 * (100 - age),) * 2)
    compiled_core._remove_oldest(tmp_path)
    assert {build.name for build in tmp_path.iterdir()} == {f"core-{age}" for age in range(compiled_core._MAX_BUILDS)}
