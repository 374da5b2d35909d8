"""The prefix cache finds what was computed, keeps what is used, and loses no block."""

from __future__ import annotations

import random

import pytest
from index_walk import Walk, ids, keys_of

from megatron_medha.core.kv.block_pool import BlockPool, Extent
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import Holding

LONG = list(range(8))  # a prompt of eight granules


class Cache:
    """One or more KVP ranks with a block a granule, and what sequences hold there."""

    def __init__(self, num_blocks: int = 20, shard_granules: int = 10, kvp: int = 1) -> None:
        self.pools = [BlockPool(num_blocks) for _ in range(kvp)]
        self.index = PrefixIndex([self.pools], 1, shard_granules)
        self.tables: dict[Holding, list[Extent]] = {}
        self.now_s = 0.0

    def begin(self, request_id: str, prompt: list[int], last: int | None = None, rank: int = 0) -> Holding:
        """A sequence takes its hits and blocks for the rest."""
        match = self.index.match(keys_of(prompt), 0, len(prompt) - 1 if last is None else last, rank)
        holding = self.index.take(request_id, match, self.now_s)
        extents = self.pools[rank].allocate(len(prompt) - match.end)
        assert extents is not None
        self.tables[holding] = self.index.extents(holding.deepest) + list(extents)
        return holding

    def compute(self, holding: Holding, prompt: list[int], last: int | None = None) -> range:
        """It has computed its granules up to `last`."""
        return self.index.publish(
            holding, keys_of(prompt), len(prompt) if last is None else last, self.tables[holding], self.now_s
        )

    def end(self, *holdings: Holding) -> None:
        self.now_s += 1
        for holding in holdings:
            self.index.release(holding, self.tables.pop(holding), self.now_s)
            self.index.settle(holding.request_id)

    def run(self, request_id: str, prompt: list[int], rank: int = 0) -> None:
        """A sequence from begin to end."""
        holding = self.begin(request_id, prompt, rank=rank)
        self.compute(holding, prompt)
        self.end(holding)

    def hits(self, prompt: list[int], rank: int = 0) -> int:
        return self.index.match(keys_of(prompt), 0, len(prompt), rank).num_granules

    def lengths(self, rank: int = 0) -> list[int]:
        """Of the segments, in order of their position."""
        segments = sorted(self.index.trees[0][rank].heads.values(), key=lambda segment: segment.first)
        return [segment.num_granules for segment in segments]

    def check(self) -> None:
        owned = [(0, h.kvp_rank, self.index.own_extents(h, table)) for h, table in self.tables.items()]
        check(self.index, self.tables, owned)


@pytest.mark.parametrize("seed", range(6))
def test_after_any_walk_the_index_equals_a_naive_one(seed: int) -> None:
    eviction = ["lru", "ttl", "value"][seed % 3]
    walk = Walk(seed, num_blocks=random.Random(seed).choice([20, 40, 80]), eviction=eviction)
    for _ in range(2500):
        walk.step()
    assert min(walk.counts.get(kind, 0) for kind in ("hits", "duplicates", "fail", "clear", "evict", "refused")) > 0


def test_only_what_is_computed_can_be_matched() -> None:
    cache = Cache()
    one = cache.begin("one", LONG)
    assert cache.hits(LONG) == 0
    cache.compute(one, LONG, 3)
    assert cache.hits(LONG) == 3


def test_a_hit_stands_in_the_blocks_that_hold_it() -> None:
    cache = Cache()
    one = cache.begin("one", LONG)
    cache.compute(one, LONG)
    two = cache.begin("two", [*LONG[:5], 99, 98])
    assert ids(cache.tables[two])[:5] == ids(cache.tables[one])[:5]
    cache.check()


def test_what_one_sequence_computes_is_one_segment_however_it_is_chunked() -> None:
    cache = Cache()
    one = cache.begin("one", LONG)
    for last in range(1, 9):
        cache.compute(one, LONG, last)
    assert cache.lengths() == [8]


def test_a_segment_that_another_uses_does_not_grow() -> None:
    cache = Cache()
    one = cache.begin("one", LONG)
    cache.compute(one, LONG, 4)
    two = cache.begin("two", LONG)
    cache.compute(one, LONG, 8)
    assert cache.lengths() == [4, 4] and two.deepest is not None and two.deepest.num_granules == 4
    cache.check()


def test_a_reused_request_id_does_not_grow_what_the_former_one_computed() -> None:
    cache = Cache()
    cache.run("same", LONG[:4])
    again = cache.begin("same", LONG)
    cache.compute(again, LONG)
    cache.index.forget("same")
    assert cache.hits(LONG) == 4
    cache.check()


def test_a_segment_is_split_where_a_hit_ends_and_only_the_hit_is_held() -> None:
    cache = Cache()
    cache.run("one", LONG)
    cache.begin("two", [*LONG[:5], 99])
    assert cache.lengths() == [5, 3] and cache.index.num_evictable_blocks(0) == 3
    cache.check()


def test_what_another_has_published_first_stays_the_sequences_own() -> None:
    cache = Cache()
    one, two = cache.begin("one", LONG), cache.begin("two", LONG)
    assert cache.compute(one, LONG, 5) == range(5)
    assert not cache.compute(two, LONG, 4)
    assert cache.compute(two, LONG, 7) == range(5, 7)
    assert two.duplicates == [(0, 5)]
    cache.check()
    cache.end(two)
    assert cache.pools[0].num_free_blocks == 20 - 8 - 2, "its duplicates and its tail are free again"
    assert cache.hits(LONG) == 7


def test_a_duplicate_is_published_when_the_others_copy_is_evicted() -> None:
    cache = Cache()
    two = cache.begin("two", LONG)
    cache.run("one", LONG)
    cache.compute(two, LONG, 4)
    cache.index.evict(0, 8, 0.0)
    assert cache.compute(two, LONG, 6) == range(6)
    cache.check()


def test_the_tail_of_the_least_recently_used_leaf_goes_first_and_only_as_much_as_needed() -> None:
    cache = Cache()
    cache.run("old", LONG)
    cache.run("new", [*LONG[:2], 90, 91])
    (evicted,) = cache.index.evict(0, 2, 9.0)
    assert (evicted.first, evicted.keys) == (6, keys_of(LONG)[6 * 16 :])
    cache.index.evict(0, 4, 9.0)
    assert cache.hits(LONG) == 2 and cache.hits([*LONG[:2], 90, 91]) == 4
    cache.index.evict(0, 2, 9.0)
    assert cache.hits(LONG) == 2, "what others build on goes last"
    cache.check()


def test_no_more_is_evicted_than_nobody_holds() -> None:
    cache = Cache()
    cache.run("one", LONG)
    cache.begin("two", [*LONG[:5], 99])
    with pytest.raises(AssertionError, match="4 blocks of 3 evictable"):
        cache.index.evict(0, 4, 0.0)


def test_a_match_that_is_held_already_costs_nothing() -> None:
    cache = Cache()
    cache.run("one", LONG)
    match = cache.index.match(keys_of(LONG), 0, 6, 0)
    assert cache.index.num_unpinned_blocks(match) == 6
    cache.begin("two", [*LONG[:4], 99])
    match = cache.index.match(keys_of(LONG), 0, 6, 0)
    assert cache.index.num_unpinned_blocks(match) == 2


def test_blocks_that_nobody_holds_any_more_count_as_freed_once() -> None:
    cache = Cache()
    cache.run("one", LONG)
    assert cache.pools[0].num_blocks_ever_freed == 8
    cache.index.evict(0, 8, 0.0)
    assert cache.pools[0].num_blocks_ever_freed == 8


def test_a_failed_sequence_leaves_nothing_and_nothing_that_builds_on_it() -> None:
    cache = Cache(num_blocks=40)
    cache.run("good", LONG[:2])
    bad = cache.begin("bad", LONG[:6])
    cache.compute(bad, LONG[:6])
    user = cache.begin("user", [*LONG[:5], 50, 51])
    cache.compute(user, [*LONG[:5], 50])
    cache.index.forget("bad")
    assert cache.hits(LONG) == cache.hits([*LONG[:5], 50]) == 2
    cache.check()
    assert not cache.compute(user, [*LONG[:5], 50, 51]), "what it computes from now on is wrong too"
    cache.end(bad, user)
    cache.check()
    assert cache.pools[0].num_free_blocks == 38


def test_what_follows_a_failed_sequences_shard_on_another_rank_is_not_published() -> None:
    cache = Cache(shard_granules=4, kvp=2)
    bad = cache.begin("bad", LONG[:4])
    cache.compute(bad, LONG[:4])
    first = cache.begin("user", LONG[:4], last=4)
    second = cache.index.take("user", cache.index.match(keys_of(LONG), 4, 7, 1), 0.0, previous=first)
    extents = cache.pools[1].allocate(4)
    assert extents is not None
    cache.index.forget("bad")
    assert not cache.index.publish(second, keys_of(LONG), 6, list(extents), 0.0)


def test_what_follows_a_shards_last_copy_goes_with_it() -> None:
    cache = Cache(shard_granules=4, kvp=3)
    for rank in (0, 1):
        cache.run(f"first{rank}", LONG[:4], rank)
    second = cache.index.take("second", cache.index.match(keys_of(LONG), 4, 7, 2), 0.0)
    extents = cache.pools[2].allocate(4)
    assert extents is not None
    cache.index.publish(second, keys_of(LONG), 8, list(extents), 0.0)
    cache.index.release(second, list(extents), 0.0)
    cache.index.evict(0, 1, 0.0)
    assert cache.index.match(keys_of(LONG), 4, 8, 2).num_granules == 4, "another rank holds the shard before"
    cache.index.evict(1, 1, 0.0)
    assert cache.index.match(keys_of(LONG), 4, 8, 2).num_granules == 0
    assert cache.pools[2].num_free_blocks == 20
    cache.check()


def test_a_waiting_request_is_named_when_its_match_shrinks_and_not_when_others_do() -> None:
    cache = Cache()
    cache.run("one", LONG)
    cache.index.watch("waiter", cache.index.match(keys_of([*LONG[:5], 99]), 0, 6, 0), 0.0, 0.0)
    (tail,) = cache.index.evict(0, 3, 0.0)
    assert tail.waiters == ()
    (shrunk,) = cache.index.evict(0, 1, 0.0)
    assert shrunk.waiters == ("waiter",)
    assert [evicted.waiters for evicted in cache.index.evict(0, 4, 0.0)] == [()], "it watches no more"


def test_a_segment_that_a_waiting_request_watches_does_not_grow() -> None:
    cache = Cache()
    one = cache.begin("one", LONG)
    cache.compute(one, LONG, 4)
    cache.index.watch("waiter", cache.index.match(keys_of(LONG), 0, 8, 0), 0.0, 0.0)
    cache.compute(one, LONG, 8)
    assert cache.lengths() == [4, 4]


def test_lost_ranks_leave_an_empty_cache() -> None:
    cache = Cache()
    cache.run("past", LONG)
    live = cache.begin("live", LONG)
    cache.compute(live, LONG)
    cache.index.clear()
    assert cache.hits(LONG) == 0
    cache.end(live)
    cache.check()
    assert cache.pools[0].num_free_blocks == 20
