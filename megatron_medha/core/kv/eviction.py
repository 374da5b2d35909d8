"""In which order cached segments are evicted. Holds only leaves that nobody uses; what they are, the index says."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Protocol

from megatron_medha.core.kv.segment import Segment

_Entry = tuple[float, int, int, Segment]


class EvictionOrder(Protocol):
    """The evictable leaves of one KVP rank and group."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def add(self, segment: Segment) -> None:
        """It can be evicted from now on."""
        ...

    def remove(self, segment: Segment) -> None:
        """It is in use, has a child, or is gone."""
        ...

    def lowest(self, now_s: float) -> Segment:
        """The one to evict next; it stays."""
        ...


class LruOrder:
    """The one not used for longest goes first; of equal ones the deepest."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []  # entries whose ticket is not their segment's any more are skipped
        self._num_live = 0
        self._next_ticket = 1

    def __len__(self) -> int:
        return self._num_live

    def add(self, segment: Segment) -> None:
        """It can be evicted from now on."""
        assert not segment.ticket, "it is in the order already"
        segment.ticket = self._next_ticket
        self._next_ticket += 1
        self._num_live += 1
        heappush(self._heap, (segment.last_use_s, -segment.first, segment.ticket, segment))
        if len(self._heap) > 64 + 2 * self._num_live:
            self._heap = [entry for entry in self._heap if entry[3].ticket == entry[2]]
            heapify(self._heap)

    def remove(self, segment: Segment) -> None:
        """It is in use, has a child, or is gone."""
        assert segment.ticket, "it is not in the order"
        segment.ticket = 0
        self._num_live -= 1

    def lowest(self, now_s: float) -> Segment:
        """The one to evict next; it stays."""
        while self._heap[0][3].ticket != self._heap[0][2]:
            heappop(self._heap)
        return self._heap[0][3]
