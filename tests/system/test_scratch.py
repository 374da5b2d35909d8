"""Folders for sockets: gone with their process, or with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_medha.system.scratch import remove_abandoned, remove_abandoned_files, scratch_directory

HOLDER = """
import sys
from megatron_medha.system.scratch import scratch_directory
with scratch_directory() as directory:
    (directory / "socket").touch()
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def held() -> tuple[subprocess.Popen[str], Path]:
    """A process with such a folder."""
    command = [sys.executable, "-c", HOLDER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(temporary: Path) -> None:
    living, kept = held()
    killed, abandoned = held()
    killed.kill()
    killed.wait()
    (temporary / "medha-of-somebody").mkdir()
    (temporary / "medha-file").touch()
    assert kept.is_dir() and abandoned.is_dir()
    with scratch_directory() as ours:
        assert ours.is_dir() and (ours.stat().st_mode & 0o777) == 0o700
        remove_abandoned()
        left = {path.name for path in temporary.iterdir()}
        assert left == {ours.name, kept.name, "medha-of-somebody", "medha-file"}
    assert not ours.exists()
    living.communicate("")
    assert not kept.exists()


def test_links_of_others_are_not_followed(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (temporary / "medha-link").symlink_to(elsewhere)
    remove_abandoned()
    assert (elsewhere / "lock").exists()


def test_shared_memory_of_killed_ranks_is_removed_once_it_is_old(temporary: Path) -> None:
    young, old = temporary / "medha-kvp-young", temporary / "medha-kvp-old"
    young.touch()
    old.touch()
    os.utime(old, (0, time.time() - 3600))
    remove_abandoned_files(temporary, "medha-kvp-")
    assert young.exists() and not old.exists()
