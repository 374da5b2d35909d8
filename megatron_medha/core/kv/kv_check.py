"""Checks that the KV accounting is right as a whole. Slow: for tests and for kv_audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import KEY_BYTES, Holding, Segment
from megatron_medha.core.kv.segment_forest import RankTree


def check(index: PrefixIndex, holdings: Iterable[Holding], owned: Iterable[tuple[int, int, Iterable[Extent]]]) -> None:
    """Assert that every block is free, owned or cached exactly once, and that the index is sound.

    holdings: of all live sequences. owned: (group, KVP rank, blocks) that belong to one sequence alone.
    """
    holdings = list(holdings)
    references = Counter(holding.deepest for holding in holdings if holding.deepest is not None)
    owned_blocks: dict[tuple[int, int], list[int]] = {}
    for group, kvp_rank, extents in owned:
        owned_blocks.setdefault((group, kvp_rank), []).extend(_ids(extents))
    copies: dict[bytes, set[Segment]] = {}
    begins: set[Segment] = set()
    for group, trees in enumerate(index.trees):
        for kvp_rank, tree in enumerate(trees):
            listed = list(tree.heads.values())
            segments = dict.fromkeys(listed)
            for holding in holdings:
                if (holding.group, holding.kvp_rank) == (group, kvp_rank):
                    _check_holding(holding)
                    segment = holding.deepest
                    while segment is not None:  # those of sequences that failed are known only to their users
                        segments[segment] = None
                        segment = segment.parent
            for segment in segments:
                assert (segment.group, segment.kvp_rank) == (group, kvp_rank)
                _check_segment(index, segment, references[segment], tree.heads.get(segment.head) is segment)
            _check_tree(index, tree, list(segments), owned_blocks.get((group, kvp_rank), []))
            for segment in listed:
                if segment.end % index.shard_granules == 0:
                    copies.setdefault(bytes(segment.keys[-KEY_BYTES:]), set()).add(segment)
            begins.update(s for s in listed if s.parent is None and s.first)
    listed_copies = {key: set(segments) for key, segments in index.borders.copies.items()}
    assert copies == listed_copies, "copies of granules before borders are not those that are known"
    assert begins == set(index.borders.before), "a segment that begins a shard is not known as such"


def _check_holding(holding: Holding) -> None:
    if holding.deepest is not None:
        assert holding.deepest.end == holding.end, f"{holding.request_id} ends inside a segment"
    else:
        assert holding.end == holding.first and not holding.duplicates
    assert all(holding.first <= a < b <= holding.end for a, b in holding.duplicates)


def _check_segment(index: PrefixIndex, segment: Segment, num_references: int, is_listed: bool) -> None:
    assert segment.keys and len(segment.keys) % KEY_BYTES == 0, "a segment without granules"
    assert segment.is_listed == is_listed, "what is in the tree is listed, and nothing else"
    assert segment.num_references == num_references, f"{segment.num_references} references, {num_references} sequences"
    assert segment.pins == num_references + sum(child.pins > 0 for child in segment.children), "pins are miscounted"
    assert segment.first // index.shard_granules == (segment.end - 1) // index.shard_granules, "it crosses a border"
    num_blocks = sum(count for _, count in segment.extents)
    assert num_blocks == segment.num_granules * index.blocks_per_granule, "blocks and keys disagree"
    if segment.parent is None:
        assert segment.first % index.shard_granules == 0, "an orphan inside a shard"
    else:
        assert segment in segment.parent.children and segment.first == segment.parent.end, "an orphan child"
        assert segment.parent.is_listed or not segment.is_listed, "its parent cannot be matched"
    can_be_evicted = is_listed and not segment.pins and not segment.children
    assert bool(segment.ticket) == can_be_evicted, "the eviction order holds the unused leaves and nothing else"


def _check_tree(index: PrefixIndex, tree: RankTree, segments: list[Segment], owned: list[int]) -> None:
    assert all(segment.head == head for head, segment in tree.heads.items()), "a head is under another key"
    cached = [block for segment in segments for block in _ids(segment.extents)]
    free = _ids(tree.pool.free_extents)
    uses = Counter(free + owned + cached)
    wrong = [block for block in range(tree.pool.num_blocks) if uses[block] != 1]
    assert not wrong and len(uses) == tree.pool.num_blocks, f"not free, owned or cached exactly once: {wrong[:10]}"
    assert tree.pool.num_free_blocks == len(free) and tree.pool.num_cached_blocks == len(cached)
    num_evictable = sum(s.num_granules for s in segments if not s.pins) * index.blocks_per_granule
    assert tree.num_evictable_blocks == num_evictable, f"{tree.num_evictable_blocks} evictable, {num_evictable} found"
    num_of_sessions = sum(s.num_granules for s in segments if not s.pins and s.session) * index.blocks_per_granule
    assert tree.num_session_blocks == num_of_sessions, "evictable blocks of sessions are miscounted"
    assert len(tree.order) == sum(bool(segment.ticket) for segment in segments)


def _ids(extents: Iterable[Extent]) -> list[int]:
    return [block for first, count in extents for block in range(first, first + count)]
