"""What the cache gives up first."""

from __future__ import annotations

import random

import pytest
from index_walk import keys_of

from megatron_medha.core.kv.block_pool import BlockPool
from megatron_medha.core.kv.eviction import EVICTION_ORDERS, ClassedOrder, EvictionRules
from megatron_medha.core.kv.kv_config import EVICTIONS
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.reuse_gaps import ReuseGaps


class Cache:
    """One rank with a block a granule."""

    def __init__(self, eviction: str = "value", num_blocks: int = 100, **rules: object) -> None:
        self.pool = BlockPool(num_blocks)
        order = EVICTION_ORDERS[eviction]
        self.index = PrefixIndex([[self.pool]], 1, 1000, order, EvictionRules(num_blocks=num_blocks, **rules))  # type: ignore[arg-type]
        self.num_requests = 0

    def run(self, prompt: list[int], now_s: float, session: str = "", ends_session: bool = False) -> None:
        """A request from begin to end."""
        self.num_requests += 1
        match = self.index.match(keys_of(prompt), 0, len(prompt), 0)
        holding = self.index.take(f"r{self.num_requests}", match, now_s, session)
        table = self.index.extents(holding.deepest)
        table += self.pool.allocate(len(prompt) - match.end) or ()
        self.index.publish(holding, keys_of(prompt), len(prompt), table, now_s)
        self.index.release(holding, table, now_s, ends_session)
        self.index.settle(f"r{self.num_requests}")

    def hits(self, prompt: list[int]) -> int:
        return self.index.match(keys_of(prompt), 0, len(prompt), 0).num_granules

    def watch(self, request_id: str, prompt: list[int], now_s: float, due_s: float) -> None:
        match = self.index.match(keys_of(prompt), 0, len(prompt), 0)
        assert self.index.watch(request_id, match, now_s, due_s) is not None

    def evicts(self, now_s: float, *prompts: list[int]) -> list[int]:
        """Which of these prompts goes next, until all are gone."""
        order = []
        while len(order) < len(prompts):
            (evicted,) = self.index.evict(0, 1, now_s)
            order += [i for i, prompt in enumerate(prompts) if keys_of(prompt)[-16:] == evicted.keys[-16:]]
        return order


A, B, C = [1], [2], [3]


def test_every_policy_of_the_options_is_an_order() -> None:
    assert set(EVICTION_ORDERS) == set(EVICTIONS)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_without_sessions_and_waiting_requests_the_longest_unused_goes_first(eviction: str) -> None:
    cache = Cache(eviction)
    for now_s, prompt in enumerate([A, B, C, A]):
        cache.run(prompt, float(now_s))
    assert cache.evicts(10.0, A, B, C) == [1, 2, 0]


@pytest.mark.parametrize("eviction", ["value", "ttl"])
def test_what_a_live_session_left_goes_after_what_nobody_may_want(eviction: str) -> None:
    cache = Cache(eviction)
    cache.run(A, 0.0, session="s")
    cache.run(B, 5.0)
    assert cache.evicts(10.0, A, B) == [1, 0]


@pytest.mark.parametrize("eviction", ["value", "ttl"])
def test_a_session_longer_idle_than_its_ttl_is_like_any_other(eviction: str) -> None:
    cache = Cache(eviction, session_ttl_s=8.0)
    cache.run(A, 0.0, session="s")
    cache.run(B, 5.0)
    assert cache.evicts(10.0, A, B) == [0, 1]


@pytest.mark.parametrize("eviction", ["value", "ttl"])
def test_sessions_beyond_their_share_of_the_memory_are_like_any_other(eviction: str) -> None:
    cache = Cache(eviction, session_share=0.015)
    cache.run(A, 0.0, session="s")
    cache.run(B, 1.0, session="t")
    cache.run(C, 5.0)
    assert cache.evicts(10.0, A, B, C) == [0, 2, 1], "with the first the sessions are within their share again"


def test_what_an_ended_session_left_goes_first() -> None:
    cache = Cache()
    cache.run(A, 0.0)
    cache.run(B, 5.0, session="s", ends_session=True)
    assert cache.evicts(10.0, A, B) == [1, 0]


@pytest.mark.parametrize("eviction", ["value", "ttl"])
def test_what_goes_next_is_the_same_whether_or_not_it_was_looked_at_before(eviction: str) -> None:
    cache, draw = Cache(eviction, num_blocks=40, recompute_s=lambda first, end: 1.0 + first), random.Random(0)
    tree = cache.index.trees[0][0]
    assert isinstance(tree.order, ClassedOrder)
    for step in range(400):
        prompt = [draw.randrange(4) for _ in range(draw.randint(1, 8))]
        while tree.pool.num_free_blocks < len(prompt):
            now_s = float(step)
            chosen = tree.order.lowest(now_s, tree.num_session_blocks)
            tree.order._looks.clear()
            assert tree.order.lowest(now_s, tree.num_session_blocks) is chosen
            cache.index.evict(0, 1, now_s)
        cache.run(prompt, step + 0.5, draw.choice(["", "s", "t"]), draw.random() < 0.1)
        if draw.random() < 0.3:
            cache.watch(f"w{step}", prompt, step + 0.6, step + draw.uniform(1.0, 50.0))


def test_a_session_is_ended_by_any_request_of_it() -> None:
    cache = Cache()
    cache.run([1, 2], 0.0, session="other")
    cache.run([3, 4], 1.0, session="s")
    cache.run([3, 4, 5], 2.0, session="s")
    cache.run([], 3.0, session="s", ends_session=True)
    assert cache.evicts(4.0, [3, 4, 5], [3, 4], [3], [1, 2], [1]) == [0, 1, 2, 3, 4]


def test_of_an_ended_session_what_others_have_used_or_use_now_stays() -> None:
    cache = Cache()
    cache.run([1, 2], 0.0, session="other")
    cache.run([3, 4], 1.0, session="s")
    cache.run([3, 6], 2.0, session="t")
    using = cache.index.take("u", cache.index.match(keys_of([3, 4]), 0, 2, 0), 2.0, "s")
    cache.run([7], 3.0, session="s", ends_session=True)
    assert cache.evicts(4.0, [7], [1, 2], [1], [3, 6])[0] == 0
    cache.index.release(using, cache.index.extents(using.deepest), 5.0)
    assert cache.hits([3, 4]) == 2


def test_what_sessions_share_does_not_end_with_one_of_them() -> None:
    cache = Cache()
    cache.run([9, 8], 0.0, session="s")
    cache.run([9, 7], 1.0, session="t", ends_session=True)
    cache.run(A, 2.0)
    assert cache.evicts(10.0, [9, 7], [9], A, [9, 8])[0] == 0
    shared = Cache()
    shared.run([9], 0.0, session="s")
    shared.run([9], 1.0, session="t", ends_session=True)
    shared.run(A, 0.5)
    assert shared.evicts(10.0, A, [9]) == [0, 1]


def test_what_waiting_requests_want_goes_last_and_of_that_first_what_is_due_last() -> None:
    cache = Cache()
    for now_s, prompt in enumerate([A, B, C]):
        cache.run(prompt, float(now_s), session=f"s{now_s}")
    cache.watch("early", A, 5.0, due_s=6.0)
    cache.watch("late", B, 5.0, due_s=9.0)
    assert cache.evicts(10.0, A, B, C) == [2, 1, 0]


def test_what_a_request_wants_that_will_wait_for_long_goes_before_what_was_just_used() -> None:
    cache = Cache()
    cache.run(A, 0.0, "a")
    cache.run(B, 5.0, "b")
    cache.watch("soon", A, 5.0, due_s=5.1)
    assert cache.evicts(5.1, A, B) == [1, 0]
    cache.run(A, 10.0, "a")
    cache.run(B, 15.0, "b")
    cache.watch("starved", A, 15.0, due_s=400.0)
    assert cache.evicts(15.1, A, B) == [0, 1]


def test_a_request_that_waits_no_more_protects_nothing() -> None:
    cache = Cache()
    cache.run(A, 0.0)
    cache.run(B, 1.0)
    match = cache.index.match(keys_of(A), 0, 1, 0)
    cache.index.unwatch("gone", cache.index.watch("gone", match, 2.0, 3.0))
    assert cache.evicts(10.0, A, B) == [0, 1]


def test_of_two_idle_for_as_long_the_cheaper_to_compute_goes_first() -> None:
    cache = Cache(recompute_s=lambda first, end: 1.0 + first)
    deep = list(range(20, 40))
    cache.run(deep, 0.0)
    cache.run(A, 0.0)
    assert cache.evicts(1.0, deep, A) == [1, 0]
    lru = Cache("lru", recompute_s=lambda first, end: 1.0 + first)
    lru.run(deep, 0.0)
    lru.run(A, 0.0)
    assert lru.evicts(1.0, deep, A) == [0, 1]


def over_two_ranks() -> tuple[PrefixIndex, list[int]]:
    """A session's eight granules, four a shard, on ranks 0 and 1; then another prompt on rank 0, used later."""
    pools = [BlockPool(20), BlockPool(20)]
    index = PrefixIndex([pools], 1, 4, EVICTION_ORDERS["value"], EvictionRules(num_blocks=20))
    prompt = list(range(20, 28))
    previous = None
    tables = []
    for shard in (0, 1):
        match = index.match(keys_of(prompt), 4 * shard, 8, shard)
        previous = index.take("long", match, 0.0, "", previous)
        tables.append((previous, list(pools[shard].allocate(4) or ())))
        index.publish(previous, keys_of(prompt), 4 * shard + 4, tables[-1][1], 0.0)
    for holding, table in tables:
        index.release(holding, table, 0.0)
    other = index.take("other", index.match(keys_of(A), 0, 1, 0), 1.0)
    table = list(pools[0].allocate(1) or ())
    index.publish(other, keys_of(A), 1, table, 1.0)
    index.release(other, table, 1.0)
    return index, prompt


def test_the_end_of_a_shard_is_kept_for_the_request_that_waits_for_what_follows_it() -> None:
    index, prompt = over_two_ranks()
    match = index.match(keys_of(prompt), 4, 8, 1)
    segment = index.watch("waiter", match, 20.0, 21.0)
    (evicted,) = index.evict(0, 1, 20.0)
    assert evicted.keys == keys_of(A)
    index.unwatch("waiter", segment)
    end, following = index.evict(0, 1, 20.0)
    assert (end.first, following.first) == (3, 4), "what follows goes with it"


def test_the_end_of_a_shard_goes_by_what_all_that_follows_it_costs() -> None:
    index, _ = over_two_ranks()
    (evicted,) = index.evict(0, 1, 20.0)
    assert evicted.keys == keys_of(A), "a granule for five"
    index, _ = over_two_ranks()
    index.evict(1, 4, 20.0)
    (evicted,) = index.evict(0, 1, 20.0)
    assert evicted.first == 3, "nothing follows any more: the longest unused"


def test_the_rate_of_use_is_high_before_gaps_that_were_seen_and_low_after_them() -> None:
    gaps = ReuseGaps()
    for _ in range(500):
        gaps.used(8.0)
    assert gaps.rate(6.0) > 2 * gaps.rate(0.1)
    assert gaps.rate(0.1) > 2 * gaps.rate(30.0)


def test_what_is_evicted_unused_lowers_the_rate() -> None:
    seldom, often = ReuseGaps(), ReuseGaps()
    for _ in range(500):
        seldom.used(1.0)
        often.used(1.0)
        seldom.gave_up(2.0)
    assert seldom.rate(0.5) < 0.7 * often.rate(0.5)
    assert all(gaps.rate(age_s) > 0.0 for gaps in (seldom, often) for age_s in (0.0, 1.0, 1e3))


def test_gaps_of_another_time_fade() -> None:
    gaps = ReuseGaps()
    for _ in range(4000):
        gaps.used(1.0)
    for _ in range(40000):
        gaps.used(100.0)
    assert gaps.rate(80.0) > gaps.rate(0.8)
