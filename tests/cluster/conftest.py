"""Engines over ranks without a model, for the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one; test folders are no packages

from clients import TIMEOUT_S, wait_until_ready
from fake_cluster import FakeCluster, StartCluster

from megatron_medha.core.layout import ParallelLayout


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartCluster]:
    clusters: list[FakeCluster] = []

    def run(layout: ParallelLayout, **options: Any) -> FakeCluster:
        clusters.append(FakeCluster(tmp_path, layout, **options).connect())
        wait_until_ready(clusters[-1].engine)
        return clusters[-1]

    yield run
    for cluster in clusters:
        cluster.engine.stop(TIMEOUT_S)


