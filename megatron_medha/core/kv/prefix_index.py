"""Which prefixes are cached where, and who uses what of them, over a SegmentForest. No clock, no token.

It holds only granules that are computed. The life of a hit: `match` (a look), `take` (a reference, which keeps the
granules until `release`), `publish` as the sequence computes more, `release` when it ends or is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_medha.core.kv.age_counts import AgeCounts
from megatron_medha.core.kv.block_pool import BlockPool, Extent, join_extents, slice_extents
from megatron_medha.core.kv.eviction import EvictionOrder, EvictionRules, LruOrder
from megatron_medha.core.kv.segment import KEY_BYTES, Evicted, Holding, Match, Segment
from megatron_medha.core.kv.segment_forest import SegmentForest

_MAX_SESSIONS = 50_000  # whose ends are remembered, in 10 MB


class PrefixIndex:
    """The prefix cache of a replica.

    pools: by group, then by KVP rank. shard_granules: granules a shard holds; no segment crosses its border.
    make_order: of the leaves of one rank; eviction.EVICTION_ORDERS has them by name.
    """

    def __init__(
        self,
        pools: list[list[BlockPool]],
        blocks_per_granule: int,
        shard_granules: int,
        make_order: Callable[[EvictionRules], EvictionOrder] = LruOrder,
        rules: EvictionRules | None = None,
    ) -> None:
        self.blocks_per_granule = blocks_per_granule
        self.shard_granules = shard_granules
        self._forest = SegmentForest(pools, blocks_per_granule, shard_granules, make_order, rules or EvictionRules())
        self.trees, self.borders = self._forest.trees, self._forest.borders
        # By session: its latest request that has ended, and the last segments of that.
        self._left_by_session: dict[str, tuple[str, list[Segment]]] = {}
        self.reuse_gaps = AgeCounts()    # of prefixes that requests begin with, since their last use
        self.eviction_ages = self._forest.eviction_ages

    # ---- what a sequence does ----

    def match(
        self, keys: bytes, first: int, last: int, kvp_rank: int, group: int = 0, known: Segment | None = None
    ) -> Match:
        """The longest cached prefix on a rank of granules [first, last), of which `first` begins a shard.

        `keys` are those of the whole sequence. Nothing is held: what it found can be evicted by the next call.
        known: the end of an earlier match of the same; what has changed since is looked for from there.
        """
        assert first % self.shard_granules == 0, f"granule {first} does not begin a shard"
        last = min(last, len(keys) // KEY_BYTES, first + self.shard_granules)
        tree = self.trees[group][kvp_rank]
        while known is not None and tree.heads.get(known.head) is not known:  # evicted
            known = known.parent
        if known is not None:
            last_key = bytes(known.keys[-KEY_BYTES:])
            if known.end > last or not keys.startswith(last_key, (known.end - 1) * KEY_BYTES):
                known = None  # its owner has taken it again since, and gone on otherwise
        start = first if known is None else known.end
        deepest, end = tree.descend(keys, start, last)
        return Match(kvp_rank, group, first, end, deepest or known)

    def extents(self, deepest: Segment | None) -> list[Extent]:
        """The cached blocks from the begin of a shard to the end of a segment, in the order of their tokens.

        Of `Holding.deepest` after `take`: the begin of the sequence's table on that rank.
        """
        path: list[Segment] = []
        while deepest is not None:
            path.append(deepest)
            deepest = deepest.parent
        extents: list[Extent] = []
        for segment in reversed(path):
            join_extents(extents, segment.extents)
        return extents

    def num_unpinned_blocks(self, match: Match) -> int:
        """Blocks of a match that nobody holds yet: by so much `take` lowers num_evictable_blocks."""
        segment, end, count = match.deepest, match.end, 0
        while segment is not None and not segment.pins:
            count += end - segment.first
            end, segment = segment.first, segment.parent
        return count * self.blocks_per_granule

    def take(
        self, request_id: str, match: Match, now_s: float, session: str = "", previous: Holding | None = None
    ) -> Holding:
        """Hold a match, made at this very moment, for a sequence; of no granule too: it may publish some later.

        To be called before blocks are evicted for the same sequence, so that its own hits are not. `previous`: what it
        holds on the shard before.
        """
        deepest = self._ending(match, now_s)
        if deepest is not None:
            deepest.num_references += 1
            self._forest.pin(deepest)
        return Holding(request_id, session, match.kvp_rank, match.group, match.first, match.end, deepest, previous)

    def publish(self, holding: Holding, keys: bytes, last: int, extents: list[Extent], now_s: float) -> range:
        """The sequence has computed its granules up to `last`: which of them are new to the cache.

        `keys` are those of the whole sequence, `extents` its whole table on this shard. What others have published
        in the meantime stays the sequence's own (Holding.duplicates).
        """
        assert last <= holding.first + self.shard_granules, "granules of another shard"
        if last <= holding.end or not holding.is_listed:
            return range(last, last)
        tree = self.trees[holding.group][holding.kvp_rank]
        found, start = tree.descend(keys, holding.end, last)
        if start == last:
            return range(last, last)
        parent = holding.deepest
        if found is not None:
            parent = found if start == found.end else self._forest.split(tree, found, start - found.first)
            holding.duplicates.append((holding.end, start))
        count = (last - start) * self.blocks_per_granule
        new_keys = bytearray(keys[start * KEY_BYTES : last * KEY_BYTES])
        new_extents = slice_extents(extents, (start - holding.first) * self.blocks_per_granule, count)
        tree.pool.cache(count)
        if parent is not None and parent is holding.deepest and self._forest.can_extend(parent, holding.request_id):
            parent.keys += new_keys
            parent.is_proven = False
            join_extents(parent.extents, new_extents)
            self.borders.add_copy(parent)
        else:
            child = Segment(
                holding.kvp_rank, holding.group, parent, start, new_keys, new_extents, holding.request_id,
                session=holding.session, last_use_s=now_s, num_references=1, pins=1,
            )
            self._forest.insert(tree, child, keys)
            if holding.deepest is not None:
                self._forest.drop_reference(holding.deepest, now_s, holding.session)  # the child pins it
            holding.deepest = child
        holding.end = last
        return range(start, last)

    def release(self, holding: Holding, extents: list[Extent], now_s: float, ends_session: bool = False) -> None:
        """The sequence ends or is preempted: its cached granules stay for others, its own blocks are freed.

        `extents`: its whole table on this shard. ends_session: nothing will follow in its session.
        """
        pool = self.trees[holding.group][holding.kvp_rank].pool
        pool.free(self.own_extents(holding, extents))
        if holding.session:
            self._follow_session(holding, ends_session)
        if holding.deepest is not None:
            self._forest.drop_reference(holding.deepest, now_s, holding.session, ends_session)
            holding.deepest = None

    def own_extents(self, holding: Holding, extents: list[Extent]) -> list[Extent]:
        """Of its table on a shard, the blocks that are the sequence's own."""
        per_granule = self.blocks_per_granule
        own: list[Extent] = []
        for start, end in holding.duplicates:
            own += slice_extents(extents, (start - holding.first) * per_granule, (end - start) * per_granule)
        num_blocks, num_cached = sum([count for _, count in extents]), (holding.end - holding.first) * per_granule
        return own + slice_extents(extents, num_cached, num_blocks - num_cached)

    def prove(self, holding: Holding) -> None:
        """The sequence has sampled a token: all that it builds on, and has published, are numbers."""
        segment = holding.deepest
        while segment is not None and not segment.is_proven:
            segment.is_proven = True
            segment = segment.parent

    def settle(self, request_id: str) -> None:
        """The request has ended, not failed: what it computed stays. Every request ends in this or in `forget`."""
        self._forest.created.pop(request_id, None)

    def forget(self, request_id: str, holdings: Iterable[Holding] = ()) -> list[Evicted]:
        """The request failed: what it computed, and all below, is found no more; blocks in use go with their last.

        Of what it builds on, which others computed, the same holds from where nobody has sampled a token behind it:
        a request that was aborted in its prompt may have left it without anybody noticing that it is not a number.
        """
        evicted: list[Evicted] = []
        suspects = list(self._forest.created.pop(request_id, {}))
        for holding in holdings:
            segment = holding.deepest
            while segment is not None and not segment.is_proven:
                suspects.append(segment)
                segment = segment.parent
        for segment in suspects:
            if segment.is_listed:
                self._forest.unlist(segment, evicted)
        return evicted

    # ---- what the memory does ----

    def num_evictable_blocks(self, kvp_rank: int, group: int = 0) -> int:
        """Cached blocks on a rank that nobody holds: as good as free."""
        return self.trees[group][kvp_rank].num_evictable_blocks

    def evict(self, kvp_rank: int, num_blocks: int, now_s: float, group: int = 0) -> list[Evicted]:
        """Free at least `num_blocks`, of which there must be as many evictable; whole granules, leaves first."""
        tree = self.trees[group][kvp_rank]
        assert num_blocks <= tree.num_evictable_blocks, f"{num_blocks} blocks of {tree.num_evictable_blocks} evictable"
        evicted: list[Evicted] = []
        wanted = tree.pool.num_free_blocks + num_blocks
        while tree.pool.num_free_blocks < wanted:
            leaf = tree.order.lowest(now_s, tree.num_session_blocks)
            num_granules = -(-(wanted - tree.pool.num_free_blocks) // self.blocks_per_granule)
            self._forest.trim(tree, leaf, min(num_granules, leaf.num_granules), now_s, evicted)
        return evicted

    def clear(self) -> list[Evicted]:
        """The ranks came up empty: nothing is cached. Sequences still have to release what they hold."""
        evicted: list[Evicted] = []
        for group in self.trees:
            for tree in group:
                for segment in [segment for segment in tree.heads.values() if segment.parent is None]:
                    if segment.is_listed:
                        self._forest.unlist(segment, evicted)
        self._forest.created.clear()
        self._left_by_session.clear()
        return evicted

    # ---- requests that wait ----

    def watch(
        self, request_id: str, match: Match, now_s: float, due_s: float, before: Segment | None = None
    ) -> Segment | None:
        """A waiting request counts on a match, without holding it: it is named when any of that is evicted.

        due_s: when it is predicted to run. before: what it has counted on until now. Returns what `unwatch` wants; None
        for a match of no granule. A named request watches nothing any more.
        """
        deepest = self._ending(match, now_s)
        if before is not deepest:
            self.unwatch(request_id, before)
        if deepest is not None:
            self._forest.set_waiter(deepest, request_id, due_s)
        return deepest

    def unwatch(self, request_id: str, segment: Segment | None) -> None:
        """The request counts on it no more; nothing happens if it was named in the meantime."""
        if segment is not None and request_id in segment.waiters:
            self._forest.set_waiter(segment, request_id, None)

    # ---- inside ----

    def _ending(self, match: Match, now_s: float) -> Segment | None:
        """The segment that ends where the match does, which a request wants; split where there is none."""
        deepest = match.deepest
        if deepest is None:
            return None
        tree = self.trees[match.group][match.kvp_rank]
        if deepest.end > match.end:
            deepest = self._forest.split(tree, deepest, match.end - deepest.first)
        if not deepest.pins and not deepest.is_matched:
            deepest.is_matched = True
            tree.order.used(deepest, now_s)
            self.reuse_gaps.add(now_s - deepest.last_use_s)
        return deepest

    def _follow_session(self, holding: Holding, ends_session: bool) -> None:
        """Remember where a session's latest request ends. When it ends itself, what that request left goes first."""
        request_id, left = self._left_by_session.pop(holding.session, ("", []))
        if ends_session:
            for segment in left:
                self._end_session(segment, holding.session)
            return
        if holding.deepest is not None:
            left = [*left, holding.deepest] if request_id == holding.request_id else [holding.deepest]
            request_id = holding.request_id
        if left:
            self._left_by_session[holding.session] = request_id, left
        if len(self._left_by_session) > _MAX_SESSIONS:
            del self._left_by_session[next(iter(self._left_by_session))]

    def _end_session(self, segment: Segment, session: str) -> None:
        """Of a segment and what leads to it, whatever this session alone has used and nobody uses now."""
        order = self.trees[segment.group][segment.kvp_rank].order
        ancestor: Segment | None = segment
        while ancestor is not None and ancestor.session == session:
            if is_leaf := bool(ancestor.ticket):
                order.remove(ancestor)
            ancestor.is_ended = not ancestor.pins
            if is_leaf:
                self._forest.file(ancestor)
            ancestor = ancestor.parent
