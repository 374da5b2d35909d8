"""Engines over ranks without a model, and a model for real ones, for the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one; test folders are no packages

from clients import TIMEOUT_S, wait_until_ready
from fake_cluster import FakeCluster, StartCluster
from real_ranks import VOCAB_SIZE

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    directory = tmp_path_factory.mktemp("engine-llama")
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory
