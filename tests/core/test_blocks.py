"""Blocks are free or owned exactly once."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.kv.block_pool import BlockPool, Extent, num_blocks_for
from megatron_medha.core.kv.block_table import BlockTable, KVShard


def ids(extents: list[Extent] | tuple[Extent, ...]) -> list[int]:
    return [block for first, count in extents for block in range(first, first + count)]


def assert_sound(pool: BlockPool, owned: list[list[Extent]]) -> None:
    free = ids(pool.free_extents)
    assert len(free) == pool.num_free_blocks
    assert sorted(free + [block for extents in owned for block in ids(extents)]) == list(range(pool.num_blocks))
    for one, other in zip(pool.free_extents, pool.free_extents[1:]):
        assert one.first_block + one.num_blocks < other.first_block, "free runs that touch are merged"


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from(["take", "extend", "free"]), st.integers(0, 15))))
def test_after_any_walk_every_block_is_free_or_owned_once(num_blocks: int, steps: list[tuple[str, int]]) -> None:
    pool, owned = BlockPool(num_blocks), []
    for kind, number in steps:
        if kind == "take":
            num_free = pool.num_free_blocks
            extents = pool.allocate(number)
            assert (extents is None) == (number > num_free)
            if extents:
                assert len(ids(extents)) == number
                owned.append(list(extents))
            else:
                assert pool.num_free_blocks == num_free, "all or nothing"
        elif kind == "extend" and owned:
            table = owned[number % len(owned)]
            last = table[-1].first_block + table[-1].num_blocks - 1
            neighbour_is_free = last + 1 in ids(pool.free_extents)
            extent = pool.extend(last)
            assert (extent is None) == (sum(len(ids(extents)) for extents in owned) == num_blocks)
            if extent is not None:
                assert extent.num_blocks == 1 and (extent.first_block == last + 1) == neighbour_is_free
                table.append(extent)
        elif kind == "free" and owned:
            pool.free(owned.pop(number % len(owned)))
        assert_sound(pool, owned)


def test_a_prompt_takes_the_shortest_run_that_holds_it() -> None:
    pool = BlockPool(20)
    pool.allocate(20)
    pool.free([Extent(0, 6), Extent(8, 3), Extent(13, 4)])
    assert pool.allocate(3) == (Extent(8, 3),)
    assert pool.allocate(4) == (Extent(13, 4),)


def test_a_prompt_no_run_can_hold_takes_the_longest_first() -> None:
    pool = BlockPool(20)
    pool.allocate(20)
    pool.free([Extent(0, 2), Extent(5, 4), Extent(12, 3)])
    assert pool.allocate(8) == (Extent(5, 4), Extent(12, 3), Extent(0, 1))


@pytest.mark.parametrize("extent", [Extent(2, 1), Extent(1, 2), Extent(0, 9), Extent(3, 2)])
def test_freeing_what_is_free_stops_at_once(extent: Extent) -> None:
    pool = BlockPool(8)
    pool.allocate(8)
    pool.free([Extent(2, 2)])
    with pytest.raises(AssertionError, match="double free|not of this pool"):
        pool.free([extent])


def test_blocks_that_touch_become_one_extent_of_a_shard() -> None:
    shard = KVShard(0, 0, [Extent(3, 2)])
    shard.append(Extent(5, 1))
    shard.append(Extent(9, 1))
    assert shard.extents == [Extent(3, 3), Extent(9, 1)] and shard.num_blocks == 4


def test_a_started_block_is_a_whole_block() -> None:
    assert [num_blocks_for(num_tokens, 16) for num_tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_badly_fragmented_pool_still_serves_a_long_prompt() -> None:
    pool, draw = BlockPool(20_000), random.Random(0)
    pool.allocate(20_000)
    pool.free([Extent(block, 1) for block in draw.sample(range(20_000), 10_000)])
    extents = pool.allocate(9_000)
    assert extents is not None and len(ids(extents)) == 9_000 == len(set(ids(extents)))
    assert extents[0].num_blocks == max(extent.num_blocks for extent in extents)


class PlainPool:
    """The same pool as a set of free blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.free = set(range(num_blocks))

    def runs(self) -> list[tuple[int, int]]:
        """(length, start) of each free run."""
        starts = sorted(block for block in self.free if block - 1 not in self.free)
        ends = sorted(block + 1 for block in self.free if block + 1 not in self.free)
        return [(end - start, start) for start, end in zip(starts, ends)]

    def allocate(self, num_blocks: int) -> tuple[tuple[int, int], ...] | None:
        if num_blocks > len(self.free):
            return None
        taken = []
        while num_blocks:
            enough = [run for run in self.runs() if run[0] >= num_blocks]
            length, start = min(enough) if enough else max(self.runs())
            count = min(length, num_blocks)
            self.free -= set(range(start, start + count))
            taken.append((start, count))
            num_blocks -= count
        return tuple(taken)

    def extend(self, last_block: int) -> tuple[int, int] | None:
        if last_block + 1 in self.free:
            self.free.remove(last_block + 1)
            return last_block + 1, 1
        taken = self.allocate(1)
        return taken[0] if taken else None


@settings(max_examples=100)
@given(
    num_blocks=st.integers(0, 20),
    steps=st.lists(st.tuples(st.sampled_from(["allocate", "extend", "free"]), st.integers(0, 20)), max_size=60),
)
def test_a_pool_takes_the_shortest_run_that_is_long_enough_else_the_longest(num_blocks, steps) -> None:
    pool, plain = BlockPool(num_blocks), PlainPool(num_blocks)
    owned: list[tuple[int, int]] = []
    num_freed = 0
    for kind, number in steps:
        if kind == "allocate":
            taken = pool.allocate(number)
            assert taken == plain.allocate(number)
            owned += taken or ()
        elif kind == "extend" and owned:
            last_block = sum(owned[number % len(owned)]) - 1
            extent = pool.extend(last_block)
            assert extent == plain.extend(last_block)
            owned += [extent] if extent else []
        elif kind == "free" and owned:
            first, count = owned.pop(number % len(owned))
            pool.free([Extent(first, count)])
            plain.free |= set(range(first, first + count))
            num_freed += count
        assert [(count, first) for first, count in pool.free_extents] == plain.runs()
        assert (pool.num_free_blocks, pool.num_blocks_ever_freed) == (len(plain.free), num_freed)


@pytest.mark.parametrize(
    ("extent", "why"),
    [
        (Extent(-1, 1), "blocks [-1, 0) are not of this pool"),
        (Extent(8, 3), "blocks [8, 11) are not of this pool"),
        (Extent(1, 2), "double free of block 2"),
        (Extent(4, 2), "double free of block 4"),
        (Extent(3, 1), "double free of block 3"),
    ],
)
def test_a_block_that_cannot_be_given_back_is_named(extent: Extent, why: str) -> None:
    pool = BlockPool(10)
    pool.allocate(10)
    pool.free([Extent(2, 3)])
    with pytest.raises(AssertionError, match=f"^{re.escape(why)}"):
        pool.free([extent])


def test_the_first_and_the_last_block_of_a_pool_can_be_given_back() -> None:
    pool = BlockPool(3)
    pool.allocate(3)
    pool.free([Extent(2, 1), Extent(0, 1)])
    assert pool.free_extents == ((0, 1), (2, 1))
    pool.free([Extent(1, 1)])
    assert pool.free_extents == ((0, 3),)


def test_a_table_counts_the_blocks_of_all_its_shards() -> None:
    one = KVShard(0, 0, [Extent(0, 2), Extent(5, 1)])
    assert one.num_blocks == 3
    one.append(Extent(6, 1))
    assert (one.extents, one.num_blocks) == ([(0, 2), (5, 2)], 4)
    one.append(Extent(8, 1))
    assert (one.extents, one.num_blocks) == ([(0, 2), (5, 2), (8, 1)], 5)
    assert BlockTable(shards=[one, KVShard(1, 20, [Extent(0, 1)])]).num_blocks == 6
