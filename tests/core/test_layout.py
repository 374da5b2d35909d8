"""Rank numbering over the parallel axes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import Coord, ParallelLayout

DEGREES = st.integers(1, 4)
LAYOUTS = st.builds(ParallelLayout, tp=DEGREES, spp=DEGREES, kvp=DEGREES, dp=DEGREES)


@given(LAYOUTS)
def test_every_rank_has_one_place_and_every_place_one_rank(layout: ParallelLayout) -> None:
    coords = [layout.coord_of(rank) for rank in range(layout.world_size)]
    assert len(set(coords)) == layout.world_size
    assert [layout.rank_of(coord) for coord in coords] == list(range(layout.world_size))


@given(LAYOUTS, st.sampled_from(["tp", "kvp", "spp", "dp"]))
def test_the_groups_of_an_axis_cover_all_ranks_once_and_differ_in_that_axis_only(
    layout: ParallelLayout, axis: str
) -> None:
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        assert len({layout.coord_of(rank)._replace(**{axis: 0}) for rank in group}) == 1


def test_tensor_ranks_are_neighbours_and_kvp_comes_before_stages() -> None:
    layout = ParallelLayout(tp=2, spp=4, kvp=2)  # 16 ranks, the pairs that hold one KV
    assert layout.groups("tp")[0] == [0, 1]
    assert layout.groups("kvp")[:2] == [[0, 2], [1, 3]]
    assert layout.groups("spp")[0] == [0, 4, 8, 12]
    assert layout.coord_of(7) == Coord(tp=1, kvp=1, spp=1, dp=0)


def test_a_degree_below_one_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="parallel.spp=0 must be at least 1"):
        ParallelLayout(spp=0)


@pytest.mark.parametrize("rank", [-1, 16])
def test_a_rank_that_is_not_of_the_layout_is_a_bug_that_is_named(rank: int) -> None:
    with pytest.raises(AssertionError, match=f"^rank {rank} of 16"):
        ParallelLayout(tp=2, spp=4, kvp=2).coord_of(rank)
