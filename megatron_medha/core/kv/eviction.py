"""In which order cached segments are evicted. Holds only leaves that nobody uses; what they are, the index says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush
from math import frexp, inf
from typing import Protocol

from megatron_medha.core.kv.reuse_gaps import ReuseGaps
from megatron_medha.core.kv.segment import Segment

_Entry = tuple[float, int, int, Segment]  # lowest first; the segment is never compared, tickets are unique

_LEAST_WAIT_S = 0.01  # shorter ones are alike
_NO_LOOK = (0.0, 0.0, 0)  # no ticket is 0


class EvictionOrder(Protocol):
    """The evictable leaves of one KVP rank and group."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def add(self, segment: Segment, tip: Segment) -> None:
        """It can be evicted from now on; all up to `tip`, itself as a rule, cannot be matched without its end."""
        ...

    def remove(self, segment: Segment) -> None:
        """It is in use, has a child, has other waiters, or is gone."""
        ...

    def lowest(self, now_s: float, num_session_blocks: int) -> Segment:
        """The one to evict next; it stays. num_session_blocks: evictable blocks of sessions, leaves or not."""
        ...

    def used(self, segment: Segment, now_s: float) -> None:
        """A request begins with it, for the first time since its last use."""
        ...

    def gave_up(self, segment: Segment, now_s: float) -> None:
        """It is evicted whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionRules:
    """What orders go by besides recency."""

    num_blocks: int = 0  # of a rank
    # Predicted seconds to compute granules [first, end) again.
    recompute_s: Callable[[int, int], float] = lambda first, end: float(end - first)
    session_ttl_s: float = 600.0  # so long a session's last segment is kept before those of no session
    session_share: float = 0.5    # of the blocks that sessions' segments may keep so


class LruHeap:
    """Leaves in the order of their last use, of equal ones the deepest first; removed ones are skipped when met."""

    def __init__(self, number: int = 0, bits: int = 0) -> None:
        self._heap: list[_Entry] = []
        self._num_live = 0
        self._number, self._bits = number, bits  # of this heap, the low bits of its tickets

    def __len__(self) -> int:
        return self._num_live

    def add(self, segment: Segment, serial: int, key: float) -> None:
        """Lowest key first."""
        assert not segment.ticket, "it is in the order already"
        segment.ticket = ticket = serial << self._bits | self._number
        self._num_live += 1
        heappush(self._heap, (key, -segment.first, ticket, segment))
        if len(self._heap) > 64 + 2 * self._num_live:
            self._heap = [entry for entry in self._heap if entry[3].ticket == entry[2]]
            heapify(self._heap)

    def remove(self, segment: Segment) -> None:
        """It stands here no more."""
        segment.ticket = 0
        self._num_live -= 1

    def head(self) -> tuple[float, Segment] | None:
        """The lowest, behind its key; None if there is none."""
        while self._heap and self._heap[0][3].ticket != self._heap[0][2]:
            heappop(self._heap)
        return (self._heap[0][0], self._heap[0][3]) if self._heap else None


class LruOrder:
    """The one not used for longest goes first."""

    def __init__(self, rules: EvictionRules) -> None:
        self._heap = LruHeap()
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, segment: Segment, tip: Segment) -> None:
        """See EvictionOrder."""
        self._serial += 1
        self._heap.add(segment, self._serial, segment.last_use_s)

    def remove(self, segment: Segment) -> None:
        """See EvictionOrder."""
        self._heap.remove(segment)

    def lowest(self, now_s: float, num_session_blocks: int) -> Segment:
        """See EvictionOrder."""
        head = self._heap.head()
        assert head is not None, "there is no leaf to evict"
        return head[1]

    def used(self, segment: Segment, now_s: float) -> None:
        """See EvictionOrder."""

    def gave_up(self, segment: Segment, now_s: float) -> None:
        """See EvictionOrder."""


class Kind(Enum):
    """What is known of a leaf's next use; evicted in this order, but for protected sessions, the last two alike."""

    ENDED = 0    # of a session that has ended
    PLAIN = 1    # of no session, or of several
    SESSION = 2  # of one session that goes on
    AWAITED = 3  # a waiting request begins with it


class ClassedOrder:
    """Leaves in classes of one kind and one cost, each in the order of last use; only their heads are compared.

    What sessions that go on will need is kept for session_ttl_s, up to session_share of the blocks. Beyond that by
    recency, or if is_by_value: what ended sessions leave goes first, then the lowest of (rate of use) x (seconds to
    compute it again). The rate is predicted for the time it has been idle; what a waiting request begins with is used
    once, when that is predicted to run. In a closed loop nearly all sessions wait, and by recency alone the one evicted
    is the next to run. But some wait for minutes, in which others come back many times.
    """

    _BITS = 8

    def __init__(self, rules: EvictionRules, is_by_value: bool) -> None:
        self._rules = rules
        self._is_by_value = is_by_value
        self._heaps: list[LruHeap] = []
        self._numbers: dict[tuple[Kind, int], int] = {}  # of the heap of a kind and a cost
        self._classes: list[tuple[Kind, float]] = []     # of each heap: its kind, and seconds a granule
        self._gaps = {Kind.PLAIN: ReuseGaps(), Kind.SESSION: ReuseGaps()}
        # Of each heap, tier and value of its first at that moment, and its ticket: one look is followed by others.
        self._moment: tuple[float, bool, int] = (-inf, False, 0)
        self._looks: list[tuple[float, float, int]] = []
        self._serial = 0
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    def add(self, segment: Segment, tip: Segment) -> None:
        """See EvictionOrder."""
        kind, key, exponent = Kind.SESSION if segment.session else Kind.PLAIN, segment.last_use_s, 0
        if self._is_by_value and (waiters := segment.waiters or tip.waiters):
            kind, key = Kind.AWAITED, -min(waiters.values())
        elif self._is_by_value and segment.is_ended:
            kind = Kind.ENDED
        if self._is_by_value and kind is not Kind.ENDED:
            exponent = frexp(self._rules.recompute_s(segment.end - 1, tip.end))[1]
        number = self._numbers.get((kind, exponent))
        if number is None:
            number = self._numbers[(kind, exponent)] = len(self._heaps)
            assert number < 1 << self._BITS, "costs of granules differ by too many powers of two"
            self._heaps.append(LruHeap(number, self._BITS))
            self._classes.append((kind, 2.0**exponent))
        self._serial += 1
        self._num_live += 1
        self._heaps[number].add(segment, self._serial, key)

    def remove(self, segment: Segment) -> None:
        """See EvictionOrder."""
        self._num_live -= 1
        self._heaps[segment.ticket & (1 << self._BITS) - 1].remove(segment)

    def lowest(self, now_s: float, num_session_blocks: int) -> Segment:
        """See EvictionOrder."""
        is_protected = num_session_blocks <= self._rules.session_share * self._rules.num_blocks
        moment = now_s, is_protected, sum([gaps.num_fits for gaps in self._gaps.values()])
        looks = self._looks
        if moment != self._moment:
            self._moment = moment
            looks.clear()
        looks += [_NO_LOOK] * (len(self._heaps) - len(looks))
        chosen: Segment | None = None
        least = (inf, inf)
        for number, heap in enumerate(self._heaps):
            if not len(heap) or (lowest := heap.head()) is None:
                continue
            key, head = lowest
            tier, value, ticket = looks[number]
            if ticket != head.ticket:
                tier, value = self._look(number, key, head, now_s, is_protected)
                looks[number] = tier, value, head.ticket
            if (tier, value) < least:
                chosen, least = head, (tier, value)
        assert chosen is not None, "there is no leaf to evict"
        return chosen

    def _look(
        self, number: int, key: float, head: Segment, now_s: float, is_protected: bool
    ) -> tuple[float, float]:
        """Of the first of a heap: its tier, and its value in that."""
        kind, cost_s = self._classes[number]
        if kind is Kind.AWAITED:
            tier = Kind.SESSION.value if is_protected else Kind.PLAIN.value
            return tier, cost_s / max(-key - now_s, _LEAST_WAIT_S)
        tier, idle_s = kind.value, now_s - head.last_use_s
        if kind is Kind.SESSION and (idle_s > self._rules.session_ttl_s or not is_protected):
            tier = Kind.PLAIN.value
        if kind is Kind.ENDED:
            return tier, 0.0
        return tier, self._gaps[kind].rate(idle_s) * cost_s if self._is_by_value else -idle_s

    def used(self, segment: Segment, now_s: float) -> None:
        """See EvictionOrder."""
        self._gaps[Kind.SESSION if segment.session else Kind.PLAIN].used(now_s - segment.last_use_s)

    def gave_up(self, segment: Segment, now_s: float) -> None:
        """See EvictionOrder."""
        if not segment.is_ended:
            self._gaps[Kind.SESSION if segment.session else Kind.PLAIN].gave_up(now_s - segment.last_use_s)


EVICTION_ORDERS: dict[str, Callable[[EvictionRules], EvictionOrder]] = {
    "lru": LruOrder,
    "ttl": lambda rules: ClassedOrder(rules, is_by_value=False),
    "value": lambda rules: ClassedOrder(rules, is_by_value=True),
}
