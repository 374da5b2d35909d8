"""What is said about this machine must be usable, whatever the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_medha.system import machine


def test_cores_memory_and_speeds_are_positive() -> None:
    assert machine.num_usable_cores() >= 1
    assert machine.cpu_flops_per_s() >= 1e9
    assert machine.memory_bytes_per_s() >= 1e9
    assert machine.free_memory_bytes() is None or machine.free_memory_bytes() > 0


def test_a_containers_limit_bounds_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.free_memory_bytes() == 2_000_000


def test_a_container_without_a_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemAvailable:   8 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.free_memory_bytes() == 8192


def test_without_proc_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.free_memory_bytes() is None
    assert machine.cpu_flops_per_s() > 0


def test_a_directory_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(bytes(5))
    assert machine.directory_bytes(tmp_path) == 15
