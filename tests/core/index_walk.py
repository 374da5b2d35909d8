"""Random walks over a PrefixIndex, beside a naive model: for each KVP rank, a dict from key to blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import blake2b

from megatron_medha.core.kv.block_pool import BlockPool, Extent
from megatron_medha.core.kv.eviction import EVICTION_ORDERS, EvictionRules
from megatron_medha.core.kv.kv_check import check
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import Evicted, Holding, Segment


def keys_of(granules: list[int]) -> bytes:
    """The chained keys of a prompt, given as one number a granule."""
    keys, key = b"", b"root"
    for granule in granules:
        key = blake2b(key + granule.to_bytes(4, "big"), digest_size=16).digest()
        keys += key
    return keys


def ids(extents: list[Extent]) -> list[int]:
    return [block for first, count in extents for block in range(first, first + count)]


@dataclass
class Live:
    """A sequence that holds KV: its granules, and for each shard its rank, holding and table."""

    request_id: str
    granules: list[int]
    ranks: list[int]
    num_computed: int = 0
    holdings: list[Holding] = field(default_factory=list)
    tables: list[list[Extent]] = field(default_factory=list)

    @property
    def keys(self) -> bytes:
        return keys_of(self.granules)


class Walk:
    """An index with 2 blocks a granule and 4 granules a shard, the sequences that use it, and the model."""

    PER_GRANULE, SHARD, MAX_GRANULES = 2, 4, 10

    def __init__(
        self, seed: int, num_blocks: int = 40, kvp: int = 3, eviction: str = "lru"
    ) -> None:
        self.random = random.Random(seed)
        self.pools = [BlockPool(num_blocks) for _ in range(kvp)]
        rules = EvictionRules(num_blocks=num_blocks, session_ttl_s=20.0, session_share=0.5)
        self.index = PrefixIndex([self.pools], self.PER_GRANULE, self.SHARD, EVICTION_ORDERS[eviction], rules)
        self.kvp, self.now_s, self.num_requests = kvp, 0.0, 0
        self.live: list[Live] = []
        self.past: list[list[int]] = []
        self.model: list[dict[bytes, list[int]]] = [{} for _ in range(kvp)]
        self.creators: list[dict[bytes, str]] = [{} for _ in range(kvp)]
        self.parents: dict[bytes, bytes] = {}  # key -> key before
        self.borders: set[bytes] = set()       # last keys of shards
        self.watches: dict[str, tuple[int, bytes, Segment]] = {}
        self.looks: list[tuple[int, bytes, Segment | None]] = []  # earlier matches, held by nobody
        self.counts: dict[str, int] = {}

    # ---- the model ----

    def pinned(self, rank: int) -> set[bytes]:
        """Keys on a rank that a live sequence holds, of which those that build on what has failed are not listed."""
        pinned: set[bytes] = set()
        for live in self.live:
            for holding in live.holdings:
                end, segment = holding.end, holding.deepest
                while segment is not None:
                    end, segment = end if segment.is_listed else segment.first, segment.parent
                if holding.kvp_rank == rank:
                    pinned.update(live.keys[16 * g : 16 * g + 16] for g in range(holding.first, end))
        return pinned

    def expected_match(self, keys: bytes, first: int, last: int, rank: int) -> int:
        """How far the model's keys go."""
        end, last = first, min(last, first + self.SHARD, len(keys) // 16)
        while end < last and keys[16 * end : 16 * end + 16] in self.model[rank]:
            end += 1
        return end

    def leave(self, evicted: list[Evicted]) -> set[tuple[int, bytes]]:
        """Take what has left the index out of the model; those who watched it, and nobody else, are named."""
        gone = {(e.kvp_rank, e.keys[i : i + 16]) for e in evicted for i in range(0, len(e.keys), 16)}
        for rank, key in gone:
            del self.model[rank][key], self.creators[rank][key]
        concerned = {w for w, (rank, keys, _) in self.watches.items()
                     if any((rank, keys[i : i + 16]) in gone for i in range(0, len(keys), 16))}
        named = [waiter for e in evicted for waiter in e.waiters]
        assert len(named) == len(set(named)) and set(named) == concerned
        for waiter in named:
            del self.watches[waiter]
        return gone

    def evict(self, rank: int, num_blocks: int) -> None:
        """Evict, and see that it was enough, of nobody's, and leaves first over all ranks."""
        num_free = self.pools[rank].num_free_blocks
        pinned = [self.pinned(other) for other in range(self.kvp)]
        gone = self.leave(self.index.evict(rank, num_blocks, self.now_s))
        assert not any(key in pinned[other] for other, key in gone), "evicted under a live sequence"
        assert self.pools[rank].num_free_blocks >= num_free + num_blocks
        for _, border in gone:
            if border in self.borders and not any(border in model for model in self.model):
                for other in range(self.kvp):
                    for key in self.model[other]:
                        assert self.parents[key] != border or key in pinned[other], "it can never be matched"

    # ---- what happens ----

    def step(self) -> None:
        """One random event, after which everything is right."""
        kinds = ["arrive"] * 4 + ["compute"] * 8 + ["grow"] * 2 + ["end"] * 3 + ["evict", "watch", "watch", "unwatch"]
        kind = self.random.choice(kinds if self.random.random() > 0.03 else ["fail", "fail", "fail", "clear"])
        self.now_s += self.random.choice([0.0, 1.0])
        getattr(self, f"do_{kind}")()
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.check()

    def check(self) -> None:
        owned = [
            (0, rank, self.index.own_extents(holding, table))
            for live in self.live
            for rank, holding, table in zip(live.ranks, live.holdings, live.tables)
        ]
        check(self.index, [holding for live in self.live for holding in live.holdings], owned)
        for rank, model in enumerate(self.model):
            listed = {}
            for segment in self.index.trees[0][rank].heads.values():
                blocks = ids(segment.extents)
                for i in range(segment.num_granules):
                    listed[bytes(segment.keys[16 * i : 16 * i + 16])] = blocks[2 * i : 2 * i + 2]
            assert listed == model
            num_unpinned = len(set(model) - self.pinned(rank))
            assert self.index.num_evictable_blocks(rank) == self.PER_GRANULE * num_unpinned
        for rank, keys, known in self.looks:
            last = self.random.randint(0, len(keys) // 16)
            assert self.index.match(keys, 0, last, rank, known=known) == self.index.match(keys, 0, last, rank)

    def granules(self) -> list[int]:
        """A prompt: often the begin of an earlier one."""
        granules: list[int] = []
        if self.past and self.random.random() < 0.8:
            other = self.random.choice(self.past)
            granules = other[: self.random.randint(1, len(other))]
        length = self.random.randint(1, self.MAX_GRANULES)
        return (granules + [self.random.randrange(3) for _ in range(length - len(granules))])[: self.MAX_GRANULES]

    def do_arrive(self) -> None:
        """A sequence takes its hits and all of its blocks, if they can be had."""
        granules = self.granules()
        ranks = self.random.sample(range(self.kvp), -(-len(granules) // self.SHARD))
        live = Live(f"r{self.num_requests}", granules, ranks)
        self.num_requests += 1
        keys = live.keys
        self.note(keys)
        last = len(granules) - 1 if self.random.random() < 0.9 else 0  # now and then one that reads nothing
        matches, is_whole = [], True
        for shard, rank in enumerate(live.ranks):
            first = shard * self.SHARD
            match = self.index.match(keys, first, last if is_whole else first, rank)
            assert match.end == self.expected_match(keys, first, last if is_whole else first, rank)
            is_whole = is_whole and match.end == first + self.SHARD
            num_blocks = self.PER_GRANULE * (min(len(granules), first + self.SHARD) - match.end)
            available = self.pools[rank].num_free_blocks + self.index.num_evictable_blocks(rank)
            if available - self.index.num_unpinned_blocks(match) < num_blocks:
                self.counts["refused"] = self.counts.get("refused", 0) + 1
                return
            matches.append(match)
        session = self.random.choice(["", "s1", "s2", "s3"])
        for match in matches:
            previous = live.holdings[-1] if live.holdings else None
            live.holdings.append(self.index.take(live.request_id, match, self.now_s, session, previous))
            live.tables.append(self.index.extents(live.holdings[-1].deepest))
            model = self.model[match.kvp_rank]
            blocks = [block for g in range(match.first, match.end) for block in model[keys[16 * g : 16 * g + 16]]]
            assert ids(live.tables[-1]) == blocks
        live.num_computed = next((m.end for m in matches if m.num_granules < self.SHARD), matches[-1].end)
        self.live.append(live)
        self.past = [*self.past[-30:], granules]
        for shard, rank in enumerate(live.ranks):
            need = self.PER_GRANULE * (min(len(granules), (shard + 1) * self.SHARD) - matches[shard].end)
            self.allocate(live, shard, rank, need)
        self.counts["hits"] = self.counts.get("hits", 0) + sum(match.num_granules for match in matches)

    def allocate(self, live: Live, shard: int, rank: int, num_blocks: int) -> None:
        if (missing := num_blocks - self.pools[rank].num_free_blocks) > 0:
            self.evict(rank, missing)
        extents = self.pools[rank].allocate(num_blocks)
        assert extents is not None
        live.tables[shard] = [*live.tables[shard], *extents]

    def note(self, keys: bytes) -> None:
        for g in range(len(keys) // 16):
            self.parents[keys[16 * g : 16 * g + 16]] = keys[16 * g - 16 : 16 * g]
            if (g + 1) % self.SHARD == 0:
                self.borders.add(keys[16 * g : 16 * g + 16])

    def do_compute(self) -> None:
        """A sequence computes a few granules; the cache takes what it has not got."""
        if not self.live:
            return
        live = self.random.choice(self.live)
        end = min(len(live.granules), live.num_computed + self.random.randint(1, 5))
        keys = live.keys
        for shard, (holding, table) in enumerate(zip(live.holdings, live.tables)):
            rank, last = holding.kvp_rank, min(end, (shard + 1) * self.SHARD)
            if last <= shard * self.SHARD:
                break
            known, before = self.expected_match(keys, shard * self.SHARD, last, rank), holding.end
            new = self.index.publish(holding, keys, last, table, self.now_s)
            assert list(new) == (list(range(known, last)) if holding.is_listed else [])
            if new:
                self.counts["duplicates"] = self.counts.get("duplicates", 0) + new.start - before
            for g in new:
                at = self.PER_GRANULE * (g - shard * self.SHARD)
                self.model[rank][keys[16 * g : 16 * g + 16]] = ids(table)[at : at + self.PER_GRANULE]
                self.creators[rank][keys[16 * g : 16 * g + 16]] = live.request_id
        live.num_computed = end

    def do_grow(self) -> None:
        """A decode fills one more granule of a shard it has."""
        decodes = [live for live in self.live if live.num_computed == len(live.granules)]
        if growing := [live for live in decodes if len(live.granules) % self.SHARD]:
            live = self.random.choice(growing)
            rank = live.ranks[-1]
            if self.pools[rank].num_free_blocks + self.index.num_evictable_blocks(rank) >= self.PER_GRANULE:
                self.allocate(live, len(live.ranks) - 1, rank, self.PER_GRANULE)
                live.granules = [*live.granules, self.random.randrange(3)]
                self.note(live.keys)

    def release(self, live: Live) -> None:
        self.live.remove(live)
        for holding, table in zip(live.holdings, live.tables):
            self.index.release(holding, table, self.now_s, self.random.random() < 0.2)

    def do_end(self) -> None:
        """A sequence ends, or is aborted or preempted."""
        if self.live:
            live = self.random.choice(self.live)
            self.release(live)
            if self.random.random() < 0.7:
                self.index.settle(live.request_id)

    def do_fail(self) -> None:
        """A sequence turns out to be wrong: nothing it computed, or that others computed on top, is found again."""
        if not self.live:
            return
        live = self.random.choice(self.live)
        creators = [dict(creators) for creators in self.creators]
        gone = self.leave(self.index.forget(live.request_id))
        assert not any(live.request_id in creators.values() for creators in self.creators)
        for rank, key in gone:
            while creators[rank].get(key) != live.request_id:
                key = self.parents[key]
                assert key, "forgotten although it builds on nothing of the request"
                rank = next((r for r in [rank, *range(self.kvp)] if (r, key) in gone), rank)
        self.check()
        self.release(live)

    def do_clear(self) -> None:
        """The ranks are lost."""
        self.leave(self.index.clear())
        assert not any(self.model)
        self.check()
        for live in list(self.live):
            self.release(live)
        assert all(pool.num_free_blocks == pool.num_blocks for pool in self.pools)

    def do_evict(self) -> None:
        rank = self.random.randrange(self.kvp)
        if num_evictable := self.index.num_evictable_blocks(rank):
            self.evict(rank, self.random.randint(1, num_evictable))

    def do_watch(self) -> None:
        keys, rank = keys_of(self.granules()), self.random.randrange(self.kvp)
        self.note(keys)
        match = self.index.match(keys, 0, len(keys) // 16, rank)
        segment = self.index.watch(f"w{self.num_requests}", match, self.now_s, self.now_s)
        self.looks = [*self.looks[-9:], (rank, keys, segment)]
        if segment is not None:
            self.watches[f"w{self.num_requests}"] = (rank, keys[: 16 * match.end], segment)
        self.num_requests += 1

    def do_unwatch(self) -> None:
        if self.watches:
            waiter = self.random.choice(list(self.watches))
            self.index.unwatch(waiter, self.watches.pop(waiter)[2])
