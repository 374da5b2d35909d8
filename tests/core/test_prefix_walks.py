"""Random worlds with common prefixes, aborts, failures, preemptions, evictions and lost ranks over every layout."""

from __future__ import annotations

import os

import pytest
from content_world import random_case, run, without_cache

SEEDS = range(int(os.environ.get("MEDHA_PREFIX_WALKS", "12")))


@pytest.mark.parametrize("kvp", [1, 2, 3])
@pytest.mark.parametrize("spp", [1, 2, 3])
def test_hits_stand_in_the_right_blocks_and_no_block_is_lost(kvp: int, spp: int) -> None:
    num_hits = 0
    for seed in SEEDS:
        case = random_case(1000 * kvp + 100 * spp + seed, kvp=kvp, spp=spp)
        world = run(case)
        world.assert_drained()
        num_hits += world.num_prompt_hits
    assert num_hits > 0


def test_outputs_are_those_without_a_cache() -> None:
    for seed in SEEDS:
        case = random_case(seed, kvp=1, spp=1)
        case.aborts, case.losses_s, case.faulty = [], [], {}
        assert run(case).outputs == run(without_cache(case)).outputs
