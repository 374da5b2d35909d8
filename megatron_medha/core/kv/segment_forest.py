"""The segments of a prefix cache: a radix tree over chained keys for each KVP rank and group. No clock, no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_medha.core.kv.age_counts import AgeCounts
from megatron_medha.core.kv.block_pool import BlockPool, slice_extents
from megatron_medha.core.kv.eviction import EvictionOrder, EvictionRules
from megatron_medha.core.kv.segment import KEY_BYTES, Evicted, Segment
from megatron_medha.core.kv.shard_borders import ShardBorders


@dataclass(slots=True)
class RankTree:
    """The segments of one KVP rank and group."""

    pool: BlockPool
    order: EvictionOrder
    heads: dict[bytes, Segment] = field(default_factory=dict)  # first key -> segment: chained keys are unique
    num_evictable_blocks: int = 0
    num_session_blocks: int = 0  # of these

    def count_evictable(self, segment: Segment, num_blocks: int) -> None:
        """So many blocks of a segment more, or less, are evictable."""
        self.num_evictable_blocks += num_blocks
        if segment.session:
            self.num_session_blocks += num_blocks

    def descend(self, keys: bytes, first: int, last: int) -> tuple[Segment | None, int]:
        """Follow keys [first, last) from where a segment begins: the last segment met, and how far it went."""
        heads = self.heads
        found: Segment | None = None
        position = first
        while position < last:
            segment = heads.get(keys[position * KEY_BYTES : (position + 1) * KEY_BYTES])
            if segment is None:
                break
            found = segment
            position += (num_common := segment.num_common(keys, last))
            if num_common * KEY_BYTES < len(segment.keys):
                break
        return found, position


class SegmentForest:
    """The trees, and what holds a prefix together over shards. Who uses which segment, PrefixIndex knows."""

    def __init__(
        self,
        pools: list[list[BlockPool]],
        blocks_per_granule: int,
        shard_granules: int,
        make_order: Callable[[EvictionRules], EvictionOrder],
        rules: EvictionRules,
    ) -> None:
        self.blocks_per_granule = blocks_per_granule
        self.trees = [[RankTree(pool, make_order(rules)) for pool in group] for group in pools]
        self.created: dict[str, dict[Segment, None]] = {}  # by live requests
        self.borders = ShardBorders(shard_granules)
        self.eviction_ages = AgeCounts()  # of evicted granules, since their last use

    def split(self, tree: RankTree, lower: Segment, num_granules: int) -> Segment:
        """Cut its first granules off: they are the new object, so that what ends where `lower` does stays right."""
        num_blocks = num_granules * self.blocks_per_granule
        cut = num_granules * KEY_BYTES
        upper = Segment(
            lower.kvp_rank, lower.group, lower.parent, lower.first, lower.keys[:cut],
            slice_extents(lower.extents, 0, num_blocks), lower.creator,
            session=lower.session, last_use_s=lower.last_use_s, pins=int(lower.pins > 0), children={lower: None},
            is_ended=lower.is_ended, is_matched=lower.is_matched, is_proven=lower.is_proven,
        )
        num_left = (lower.num_granules - num_granules) * self.blocks_per_granule
        lower.extents = slice_extents(lower.extents, num_blocks, num_left)
        lower.keys = lower.keys[cut:]
        lower.first += num_granules
        if upper.parent is not None:
            del upper.parent.children[lower]
            upper.parent.children[upper] = None
        lower.parent = upper
        tree.heads[upper.head] = upper
        tree.heads[lower.head] = lower
        if (created := self.created.get(lower.creator)) is not None:
            created[upper] = None
        self.borders.replace(lower, upper)
        return upper

    def insert(self, tree: RankTree, child: Segment, keys: bytes) -> None:
        """A pinned segment joins the tree."""
        tree.heads[child.head] = child
        self.created.setdefault(child.creator, {})[child] = None
        self.borders.add_copy(child)
        self.borders.begin(child, keys)
        if child.parent is not None:
            if child.parent.ticket:
                tree.order.remove(child.parent)
            child.parent.children[child] = None
            self.pin(child.parent)
        elif child.first:
            self._refile_before(child)

    def can_extend(self, segment: Segment, request_id: str) -> bool:
        """Whether a segment is used only by the request that computed it, so that it can grow and stay one run."""
        return (
            segment in self.created.get(request_id, ())
            and segment.num_references == segment.pins == 1
            and not segment.children
            and not segment.waiters
        )

    def pin(self, segment: Segment) -> None:
        """One pin more; the first pins its parent."""
        tree = self.trees[segment.group][segment.kvp_rank]
        ancestor: Segment | None = segment
        while ancestor is not None:
            ancestor.pins += 1
            if ancestor.pins > 1:
                return
            if ancestor.ticket:
                tree.order.remove(ancestor)
            tree.count_evictable(ancestor, -ancestor.num_granules * self.blocks_per_granule)
            ancestor = ancestor.parent

    def drop_reference(
        self, segment: Segment, now_s: float, session: str, ends_session: bool = False
    ) -> None:
        """One reference less; with its last pin a segment becomes evictable, or goes if it is not listed."""
        tree = self.trees[segment.group][segment.kvp_rank]
        segment.num_references -= 1
        ancestor: Segment | None = segment
        while ancestor is not None:
            ancestor.pins -= 1
            if ancestor.pins:
                return
            parent, num_blocks = ancestor.parent, ancestor.num_granules * self.blocks_per_granule
            ancestor.last_use_s = now_s
            ancestor.is_matched = False
            if ancestor.session != session:
                ancestor.session = ""  # of more than one
            ancestor.is_ended = ends_session and ancestor.session != ""
            tree.pool.num_blocks_ever_freed += num_blocks
            if not ancestor.is_listed:
                tree.pool.evict(ancestor.extents)
                if parent is not None:
                    del parent.children[ancestor]
            else:
                tree.count_evictable(ancestor, num_blocks)
                if not ancestor.children:
                    self.file(ancestor)
            ancestor = parent

    def set_waiter(self, segment: Segment, request_id: str, due_s: float | None) -> None:
        """A request counts on it; None: no more."""
        order = self.trees[segment.group][segment.kvp_rank].order
        if is_leaf := bool(segment.ticket):
            order.remove(segment)
        segment.waiters.pop(request_id, None)
        if due_s is not None:
            segment.waiters[request_id] = due_s
        if is_leaf:
            self.file(segment)
        if self.borders.before:
            self._refile_before(segment)

    def file(self, leaf: Segment) -> None:
        """A leaf can be evicted: at its place in the order, by what is lost with it."""
        tip = self.borders.tip(leaf) if self.borders.before else leaf  # on one rank there are no borders
        self.trees[leaf.group][leaf.kvp_rank].order.add(leaf, tip)

    def trim(self, tree: RankTree, leaf: Segment, num_granules: int, now_s: float, evicted: list[Evicted]) -> None:
        """Evict the last granules of a leaf that nobody uses, and what can be reached only over them."""
        cut = (leaf.num_granules - num_granules) * KEY_BYTES
        num_blocks = num_granules * self.blocks_per_granule
        border = self.borders.remove_copy(leaf)
        evicted.append(_evicted(leaf, cut))
        self.eviction_ages.add(now_s - leaf.last_use_s, num_granules)
        tree.count_evictable(leaf, -num_blocks)
        tree.order.remove(leaf)
        if cut:
            num_left = cut // KEY_BYTES * self.blocks_per_granule
            tree.pool.evict(slice_extents(leaf.extents, num_left, num_blocks))
            leaf.extents = slice_extents(leaf.extents, 0, num_left)
            del leaf.keys[cut:]
            self.file(leaf)
        else:
            tree.order.gave_up(leaf, now_s)
            tree.pool.evict(leaf.extents)
            self._remove(tree, leaf)
            if (parent := leaf.parent) is not None:
                del parent.children[leaf]
                if not parent.children and not parent.pins:
                    self.file(parent)
        if border is not None:  # what follows it, on any rank, cannot be matched any more
            for segment in self.borders.after(border):
                self._evict_below(segment, now_s, evicted)

    def unlist(self, top: Segment, evicted: list[Evicted]) -> None:
        """Take a segment and its descendants out of the tree; what nobody uses is freed now, the rest with its last."""
        tree = self.trees[top.group][top.kvp_rank]
        below, borders = [top], []
        for segment in below:
            below += segment.children
        for segment in reversed(below):  # children before their parents
            if not segment.is_listed:
                continue
            if (border := self.borders.remove_copy(segment)) is not None:
                borders.append(border)
            evicted.append(_evicted(segment, 0))
            self._remove(tree, segment)
            segment.is_listed = False
            if segment.pins:
                continue
            if segment.ticket:
                tree.order.remove(segment)
            tree.count_evictable(segment, -segment.num_granules * self.blocks_per_granule)
            tree.pool.evict(segment.extents)
            if (parent := segment.parent) is not None:
                del parent.children[segment]
                if parent.is_listed and not parent.children and not parent.pins and segment is top:
                    self.file(parent)
        for border in borders:
            for segment in self.borders.after(border):
                self.unlist(segment, evicted)

    def _remove(self, tree: RankTree, segment: Segment) -> None:
        """It is matched no more."""
        del tree.heads[segment.head]
        if (created := self.created.get(segment.creator)) is not None:
            created.pop(segment, None)
        if segment in self.borders.before:
            copies = self.borders.copies_before(segment)
            self.borders.end(segment)
            for copy in copies:
                self._refile(copy)
                self._refile_before(copy)

    def _evict_below(self, top: Segment, now_s: float, evicted: list[Evicted]) -> None:
        """Evict a segment and its descendants, but for those in use and the way to them."""
        tree = self.trees[top.group][top.kvp_rank]
        below = [top]
        for segment in below:
            below += segment.children
        for segment in reversed(below):
            if not segment.pins and not segment.children:
                self.trim(tree, segment, segment.num_granules, now_s, evicted)

    def _refile_before(self, segment: Segment) -> None:
        """What follows the shards before has changed, and with it what is lost with their ends."""
        for copy in self.borders.copies_before(segment):
            self._refile(copy)
            self._refile_before(copy)

    def _refile(self, segment: Segment) -> None:
        if segment.ticket:
            self.trees[segment.group][segment.kvp_rank].order.remove(segment)
            self.file(segment)


def _evicted(segment: Segment, cut: int) -> Evicted:
    """The record of what leaves a segment from byte `cut` of its keys on; its waiters are named, and wait no more."""
    waiters = tuple(segment.waiters)
    segment.waiters.clear()
    first = segment.first + cut // KEY_BYTES
    return Evicted(segment.kvp_rank, segment.group, first, bytes(segment.keys[cut:]), waiters)
