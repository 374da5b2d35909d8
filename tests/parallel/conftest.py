"""Processes that can be ranks of any layout, and a model for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_medha.bits.rank_processes import RankProcesses, rank_processes
from tests.parallel.walk import LAYOUTS, Reference, save_model


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankProcesses]:
    """Enough for the largest layout; they wait, idle, for the test that loads them next."""
    with rank_processes(max(layout.world_size for layout in LAYOUTS.values())) as processes:
        yield processes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A small random Llama, and its plain forward."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("model")
    return directory, save_model(directory)
