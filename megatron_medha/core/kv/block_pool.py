"""KV memory in blocks: the pool of one KVP rank.

Blocks are handed out as extents (runs of consecutive block ids): a 10M-token prompt is a few
integers instead of a list of 600,000, and kernels see long contiguous ranges of KV.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Extent(NamedTuple):
    """Blocks [first_block, first_block + num_blocks)."""

    first_block: int
    num_blocks: int


def _extent(first_block: int, num_blocks: int) -> Extent:
    return tuple.__new__(Extent, (first_block, num_blocks))  # half the time of the class's own


@dataclass(slots=True)
class BlockPool:
    """The blocks of one KVP rank: each is free, owned by exactly one table, or cached by the prefix index."""

    num_blocks: int
    num_free_blocks: int = field(init=False)
    num_cached_blocks: int = field(init=False, default=0)
    num_blocks_ever_freed: int = field(init=False, default=0)  # or made evictable: the pace of memory
    _starts: list[int] = field(init=False)        # of the free extents, ascending
    _lengths: dict[int, int] = field(init=False)  # start -> length
    _by_length: list[int] = field(init=False)     # length * num_blocks + start, ascending: pairs are slow

    def __post_init__(self) -> None:
        self.num_free_blocks = self.num_blocks
        self._starts = [0] if self.num_blocks else []
        self._lengths = {0: self.num_blocks} if self.num_blocks else {}
        self._by_length = [self.num_blocks * self.num_blocks] if self.num_blocks else []

    @property
    def free_extents(self) -> tuple[Extent, ...]:
        """The free runs, ascending, never adjacent to one another."""
        return tuple(Extent(start, self._lengths[start]) for start in self._starts)

    @property
    def num_owned_blocks(self) -> int:
        """Blocks that belong to one sequence alone."""
        return self.num_blocks - self.num_free_blocks - self.num_cached_blocks

    def allocate(self, num_blocks: int) -> tuple[Extent, ...] | None:
        """Take that many blocks in as few extents as possible; None, and nothing taken, if there are too few."""
        if num_blocks > self.num_free_blocks:
            return None
        taken: list[Extent] = []
        needed = num_blocks
        while needed:
            # The shortest run that holds all of it keeps long runs whole for long prompts;
            # where none does, the longest run leaves the fewest pieces.
            index = min(bisect_left(self._by_length, needed * self.num_blocks), len(self._by_length) - 1)
            length, start = divmod(self._by_length[index], self.num_blocks)
            count = min(needed, length)
            self._take(start, count)
            taken.append(_extent(start, count))
            needed -= count
        return tuple(taken)

    def extend(self, last_block: int) -> Extent | None:
        """Take one block, the neighbour of `last_block` if it is free; None if the pool is empty."""
        if self._lengths.get(last_block + 1):
            self._take(last_block + 1, 1)
            return _extent(last_block + 1, 1)
        taken = self.allocate(1)
        return taken[0] if taken else None

    def free(self, extents: Iterable[Extent]) -> None:
        """Give blocks back; giving back what is already free is a bug and stops at once."""
        for start, count in extents:
            end = start + count
            assert 0 <= start and end <= self.num_blocks, f"blocks [{start}, {end}) are not of this pool"
            index = bisect_right(self._starts, start)
            following = self._starts[index] if index < len(self._starts) else self.num_blocks
            assert end <= following, f"double free of block {following}"
            if index and (previous := self._starts[index - 1]) + self._lengths[previous] >= start:
                assert previous + self._lengths[previous] == start, f"double free of block {start}"
                start = previous
                self._remove(previous)
            if end < self.num_blocks and following == end:
                end += self._lengths[following]
                self._remove(following)
            self._insert(start, end - start)
            self.num_free_blocks += count
            self.num_blocks_ever_freed += count
        assert self.num_free_blocks + self.num_cached_blocks <= self.num_blocks, "cached blocks freed as if owned"

    def cache(self, num_blocks: int) -> None:
        """That many owned blocks now belong to the prefix index."""
        self.num_cached_blocks += num_blocks
        assert self.num_owned_blocks >= 0, "more blocks cached than there were owned"

    def evict(self, extents: list[Extent]) -> None:
        """Give cached blocks back."""
        count = sum([count for _, count in extents])
        assert count <= self.num_cached_blocks, "more blocks evicted than were cached"
        self.num_cached_blocks -= count
        self.free(extents)
        self.num_blocks_ever_freed -= count  # they were counted when they became evictable

    def _take(self, start: int, count: int) -> None:
        length = self._lengths[start]
        if length > count:  # what is left keeps its place among the starts
            del self._lengths[start], self._by_length[bisect_left(self._by_length, length * self.num_blocks + start)]
            self._lengths[start + count] = length - count
            self._starts[bisect_left(self._starts, start)] = start + count
            insort(self._by_length, (length - count) * self.num_blocks + start + count)
        else:
            self._remove(start)
        self.num_free_blocks -= count

    def _insert(self, start: int, length: int) -> None:
        self._lengths[start] = length
        insort(self._starts, start)
        insort(self._by_length, length * self.num_blocks + start)

    def _remove(self, start: int) -> None:
        length = self._lengths.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, length * self.num_blocks + start)]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // block_size)


def slice_extents(extents: Iterable[Extent], first: int, num_blocks: int) -> list[Extent]:
    """`num_blocks` blocks of the list of blocks that `extents` spell, from the first-th on."""
    taken: list[Extent] = []
    for start, count in extents:
        if num_blocks == 0:
            break
        if first >= count:
            first -= count
            continue
        part = min(count - first, num_blocks)
        taken.append(_extent(start + first, part))
        num_blocks -= part
        first = 0
    assert num_blocks == 0, f"the extents end {num_blocks} blocks too early"
    return taken


def join_extents(extents: list[Extent], more: Iterable[Extent]) -> None:
    """Append blocks to a list of extents; those that touch become one."""
    for start, count in more:
        if extents and (last := extents[-1])[0] + last[1] == start:
            extents[-1] = _extent(last[0], last[1] + count)
        else:
            extents.append(_extent(start, count))
