"""Measuring steps on a real rank: the grid fits, loads say what ran, and a fit comes out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from megatron_medha.cli import profile
from megatron_medha.core.cost.fitted_cost import FittedCost
from megatron_medha.core.errors import ConfigError
from megatron_medha.worker.startup import cpu_share, load, step_grid
from megatron_medha.worker.startup.step_grid import GridPoint, grid, measure


def test_every_point_of_the_grid_fits_the_memory_it_was_made_for() -> None:
    points = grid(20_000, 4096)
    assert len(points) > 30
    assert all(point.num_kv_tokens < 10_000 for point in points)
    assert all(point.chunk_context + point.chunk_tokens < 4096 for point in points)
    assert {point.chunk_tokens for point in points} >= {0, 1, 64, 512}


def test_a_points_load_counts_what_it_computes() -> None:
    load = GridPoint(64, 1000, 4, 200).load
    assert (load.num_tokens, load.num_sequences, load.chunk_context, load.decode_context) == (68, 5, 1064, 804)
    assert GridPoint(1, 1000, 0, 0).load.decode_context == 1001


def test_points_run_on_a_real_rank_from_position_0_and_from_the_middle(front: Any) -> None:
    points = [GridPoint(1, 0, 0, 0), GridPoint(32, 0, 2, 0), GridPoint(16, 100, 2, 50), GridPoint(0, 0, 3, 40)]
    counted: list[int] = []
    steps = measure(front.rank, front.ready, points, seconds=60.0, note=counted.append)
    assert [step.load for step in steps] == [point.load for point in points]
    assert all(step.duration_s > 0.0 for step in steps)
    assert sum(counted) == len(points)


def test_the_command_writes_a_profile_that_serving_can_read(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    command = [
        sys.executable, "-W", "ignore", "-m", "megatron_medha", "profile", f"checkpoint={theirs[1]}", f"file={file}",
        "seconds=5", "model.kv_memory_gib=0.02", "model.num_threads=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prediction error of steps held out" in done.stdout
    fitted = msgspec.json.decode(file.read_bytes(), type=FittedCost)
    assert fitted.shape.num_layers == 2
    assert "attention" in fitted.chip
    assert json.loads(file.read_text())["num_steps"] >= 15


def test_too_few_seconds_for_a_fit_are_refused_and_nothing_is_written(
    theirs: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = SimpleNamespace(num_blocks=1000, block_size=16, shape=SimpleNamespace(max_context_len=4096))
    monkeypatch.setattr(load, "load_rank", lambda config, note: (None, ready))
    monkeypatch.setattr(step_grid, "measure", lambda *args, **options: [None] * 10)
    monkeypatch.setattr(cpu_share, "set_passive_omp_wait", lambda num_cores: None)
    with pytest.raises(ConfigError, match="^seconds=2: time for 10 steps only, and a fit needs 15; give more seconds"):
        profile.run([f"checkpoint={theirs[1]}", f"file={tmp_path / 'profile.json'}", "seconds=2"])
    assert list(tmp_path.iterdir()) == []
