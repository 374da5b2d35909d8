"""Which batches stages go on from: those that every live request is in, with nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import TIMEOUT_S, wait_until_ready
from fake_cluster import FakeCluster, assert_all_are_answered, mixed_load
from fake_rank import continuation

from megatron_medha.core.layout import ParallelLayout


def num_told(directory: Path, rank: int) -> int:
    return len((directory / f"ahead-{rank}").read_text())


@pytest.mark.parametrize("layout", [ParallelLayout(spp=2), ParallelLayout(tp=2, spp=2)])
def test_a_lone_requests_decodes_follow_one_another_on_the_stages(layout: ParallelLayout, tmp_path: Path) -> None:
    cluster = FakeCluster(tmp_path, layout).connect()
    wait_until_ready(cluster.engine)
    try:
        prompt = list(range(20, 40))
        cluster.client.send("lone", prompt, 30)
        assert cluster.client.tokens("lone") == continuation(prompt, 30)
        assert num_told(tmp_path, 0) >= 29
        load = mixed_load(3, 12)  # the ranks look that nothing comes beside such a batch
        for name, (tokens, num_outputs) in load.items():
            cluster.client.send(name, tokens, num_outputs)
        assert_all_are_answered(cluster.client, load)
    finally:
        cluster.engine.stop(TIMEOUT_S)
    told = {num_told(tmp_path, rank) for rank in range(layout.world_size)}
    assert len(told) == 1, "ranks were told different things"
