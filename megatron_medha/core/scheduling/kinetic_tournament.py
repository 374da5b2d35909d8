"""The first of lines that move in time, within levels that do not: a kinetic tournament. It knows no sequences.

A binary tree in which each node holds the winner of its subtree and the moment until
which that result is certain, the earliest crossing of two lines below it. Asking for the winner re-plays only
matches that have expired; changing an entry re-plays one path. Both cost O(log n) instead of a sort of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

_NEVER_S = float("inf")


@dataclass(slots=True, eq=False)
class Entry:
    """A line, and the item it stands for: the lowest level wins, then the lowest at_zero + slope * now_s. Immutable.

    Compiled, a tuple would be taken apart and put together again wherever it is moved.
    """

    level: int
    at_zero: float
    slope: float
    arrival_s: float  # and item_id: for ties
    item_id: str
    item: Any


class KineticTournament:
    """Entries, by id, and the first of them at the moment asked."""

    def __init__(self) -> None:
        self._num_slots = 1
        self._entries: list[Entry | None] = [None, None]  # by node; winners above, leaves from _num_slots on
        self._expires_s: list[float] = [_NEVER_S, _NEVER_S]
        self._slot_of: dict[str, int] = {}
        self._free_slots: list[int] = [0]

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._slot_of

    def add(self, entry: Entry, now_s: float) -> None:
        """Add an entry; its id must be new."""
        if not self._free_slots:
            self._double()
        slot = self._slot_of[entry.item_id] = heappop(self._free_slots)
        leaf = self._num_slots + slot
        self._entries[leaf] = entry
        self._replay_path(leaf, now_s)

    def replace(self, entry: Entry, now_s: float) -> None:
        """Give the item of that id, which must be there, another line: one path, where pop and add play two."""
        leaf = self._num_slots + self._slot_of[entry.item_id]
        self._entries[leaf] = entry
        self._replay_path(leaf, now_s)

    def pop(self, item_id: str, now_s: float) -> Entry:
        """Take an entry out; its id must be there."""
        slot = self._slot_of.pop(item_id)
        leaf = self._num_slots + slot
        entry = self._entries[leaf]
        assert entry is not None
        self._entries[leaf] = None
        heappush(self._free_slots, slot)
        self._replay_path(leaf, now_s)
        return entry

    def first(self, now_s: float) -> Entry | None:
        """The winner as of now; None if nobody takes part."""
        if self._expires_s[1] <= now_s:
            self._refresh(1, now_s)
        return self._entries[1]

    def _refresh(self, node: int, now_s: float) -> None:
        """Play all expired matches of the subtree again; the node's own must have expired. Leaves never do."""
        expires_s, left = self._expires_s, 2 * node
        if expires_s[left] <= now_s:
            self._refresh(left, now_s)
        if expires_s[left + 1] <= now_s:
            self._refresh(left + 1, now_s)
        _replay(self._entries, expires_s, node, now_s)

    def _replay_path(self, leaf: int, now_s: float) -> None:
        entries, expires_s = self._entries, self._expires_s
        while leaf > 1:
            # The sibling's side may have expired unseen and its winner be stale. Then what is found here has expired
            # too, and is played again when somebody looks.
            leaf >>= 1
            winner, until_s = entries[leaf], expires_s[leaf]
            _replay(entries, expires_s, leaf, now_s)
            if entries[leaf] is winner and expires_s[leaf] == until_s:
                return  # nothing above has changed by this

    def _double(self) -> None:
        """Put the tree under a new root as its left half, level by level; no match has to be played for that."""
        entries: list[Entry | None] = [None, self._entries[1]]
        expires_s = [_NEVER_S, self._expires_s[1]]
        width = 1  # of the old tree's level
        while width <= self._num_slots:
            entries += self._entries[width : 2 * width] + [None] * width
            expires_s += self._expires_s[width : 2 * width] + [_NEVER_S] * width
            width *= 2
        self._entries, self._expires_s = entries, expires_s
        self._free_slots = list(range(self._num_slots, 2 * self._num_slots))  # in order, which makes it a heap
        self._num_slots *= 2


def _replay(entries: list[Entry | None], expiries_s: list[float], node: int, now_s: float) -> None:
    left, right = 2 * node, 2 * node + 1
    expires_s = expiries_s[left]
    if expiries_s[right] < expires_s:
        expires_s = expiries_s[right]
    one, other = entries[left], entries[right]
    if one is None or other is None:
        winner = other if one is None else one
    elif one.level != other.level:
        winner = one if one.level < other.level else other  # at any time: such lines need not cross
    else:
        one_value, other_value = one.at_zero + one.slope * now_s, other.at_zero + other.slope * now_s
        if one_value < other_value or one_value == other_value and (
            (one.arrival_s, one.item_id) < (other.arrival_s, other.item_id)
        ):
            winner, loser = one, other
        else:
            winner, loser = other, one
        if loser.slope < winner.slope:  # the loser's line falls faster and will cross
            crossing_s = (loser.at_zero - winner.at_zero) / (winner.slope - loser.slope)
            if crossing_s < expires_s:
                # A crossing that rounding puts into the past is re-played at the next look.
                expires_s = crossing_s if crossing_s > now_s else now_s
    entries[node] = winner
    expiries_s[node] = expires_s
