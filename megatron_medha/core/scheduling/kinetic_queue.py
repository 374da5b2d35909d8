"""A queue in levels, in each of which priorities move in time along straight lines. It knows nothing of sequences.

Who looks into it wants the first few in order. They are kept apart from the rest: the front, a handful of lines that
are evaluated and sorted whenever somebody looks, and behind it a tournament (kinetic_tournament.py) of any number
of others, of which only the winner's value is needed: while it comes after the whole front, nobody else there matters.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

from megatron_medha.core.scheduling.kinetic_tournament import Entry, KineticTournament
from megatron_medha.core.scheduling.policies import Priority

_MIN_HEAD = 4   # more are pulled to the front when somebody asks for more, and stay there
_MAX_HEAD = 16   # all that a batch looks at, as a rule
_MAX_PULLED = 3  # since the last look so few have come before the end of the front; of a newcomer there, nobody knows
_MAX_NEW = 32     # in the front before the next look; of a burst, the others join the rest one by one, not at the look

# (level, priority at the moment asked, arrival, id, item); places of several queues merge by all but the last. Their
# type says no more because compiled tuples of known types are taken apart and put together again when they are moved.
RankedEntry = tuple[Any, ...]
LEVEL, ITEM_ID, ITEM = 0, 3, 4  # where they stand in a place


class KineticQueue:
    """Items in order of level, then of priority at the moment asked; ties go by (arrival, id).

    A level is a number in an item's key and nothing more: thousands of different ones cost what one does.
    """

    def __init__(self) -> None:
        self._front: dict[str, Entry] = {}  # at the last look these came before all of the rest; newcomers join here
        self._rest = KineticTournament()

    def __len__(self) -> int:
        return len(self._front) + len(self._rest)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._front or item_id in self._rest

    @property
    def has_rest(self) -> bool:
        """Whether there are more than the last look has shown."""
        return len(self._rest) > 0

    def add(self, item_id: str, level: int, priority: Priority, arrival_s: float, item: Any, now_s: float) -> None:
        """Add an item, or give the one of that id a new level and priority."""
        entry = Entry(level, priority.at_zero, priority.slope, arrival_s, item_id, item)
        if item_id in self._rest:
            self._rest.replace(entry, now_s)
        elif item_id in self._front or len(self._front) < _MAX_NEW:
            self._front[item_id] = entry
        else:
            self._rest.add(entry, now_s)

    def remove(self, item_id: str, now_s: float) -> None:
        """Take an item out; it must be there."""
        if self._front.pop(item_id, None) is None:
            self._rest.pop(item_id, now_s)

    def first_entries(self, now_s: float) -> list[RankedEntry]:
        """The first few, in order, as of now."""
        places: list[RankedEntry] = [
            (entry.level, entry.at_zero + entry.slope * now_s, entry.arrival_s, entry.item_id, entry.item)
            for entry in self._front.values()
        ]
        if len(places) > 1:
            places.sort()
            while len(places) > _MAX_HEAD:
                self._demote(places, now_s)
        if len(self._rest):
            num_pulled = 0
            while (place := self._next(now_s)) is not None and (len(places) < _MIN_HEAD or place < places[-1]):
                if len(places) > _MIN_HEAD and (num_pulled >= _MAX_PULLED or len(places) == _MAX_HEAD):
                    self._demote(places, now_s)  # as a newcomer, whom any number of the rest may precede
                else:
                    self._pull(place, now_s)
                    insort(places, place)
                    num_pulled += 1
        return places

    def more_entries(self, now_s: float) -> list[RankedEntry]:
        """The next few, in order; call it at the same moment as first_entries."""
        places: list[RankedEntry] = []
        while len(places) < _MIN_HEAD and (place := self._next(now_s)) is not None:
            self._pull(place, now_s)
            places.append(place)
        return places

    def _next(self, now_s: float) -> RankedEntry | None:
        entry = self._rest.first(now_s)
        if entry is None:
            return None
        return entry.level, entry.at_zero + entry.slope * now_s, entry.arrival_s, entry.item_id, entry.item

    def _demote(self, places: list[RankedEntry], now_s: float) -> None:
        self._rest.add(self._front.pop(places.pop()[ITEM_ID]), now_s)

    def _pull(self, place: RankedEntry, now_s: float) -> None:
        self._front[place[ITEM_ID]] = self._rest.pop(place[ITEM_ID], now_s)
