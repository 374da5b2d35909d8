"""Points inside a step that may be held: where a rank looks whether another step goes first, and computes that one.

Attention of all rows is computed at once and looks while it goes on; linear layers are computed by blocks of rows.
Before what ranks do together they agree on which steps have gone first: in each layer once behind attention and once
before each further block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

_LOOK, _OVERTAKE, _AGREE = range(3)  # PointKind of native/points.h
_At = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_ALIGNMENT = 16  # rows, which matrix tiles take at once


class Points(Protocol):
    """What is done at the points of one step."""

    interval_s: float  # between two looks, at least

    def is_overtaken(self) -> bool:
        """Whether another step goes first; takes some 40 us."""

    def overtake(self) -> None:
        """Compute those that go first."""

    def agree(self, count: int = 1) -> None:
        """Settle with the other ranks what goes before what they do together next, and compute that.

        count: points that others have at this place one after the other.
        """


def pass_by(points: Points) -> None:
    """Look, and compute what goes first."""
    if points.is_overtaken():
        points.overtake()


@dataclass(frozen=True, slots=True)
class HeldStep:
    """A step as its layers compute it: its points and the number of blocks, the same on all its ranks."""

    points: Points
    num_blocks: int
    is_alone: bool  # no other rank of its pipeline stage computes anything together with this one

    def blocks(self, num_rows: int) -> Iterator[slice]:
        """One after the other, a point before each; without what ranks do together."""
        for rows in self._blocks(num_rows):
            pass_by(self.points)
            if rows.start < rows.stop:
                yield rows

    def agreed_blocks(self, num_rows: int) -> Iterator[slice]:
        """The same behind attention, for what ranks do together."""
        for number, rows in enumerate(self._blocks(num_rows)):
            if number:
                self.points.agree()
            if rows.start < rows.stop:
                yield rows

    def _blocks(self, num_rows: int) -> list[slice]:
        """Some are empty where a rank has few rows."""
        count = self.num_blocks
        ends = [min(-(-num_rows * i // count // _ALIGNMENT) * _ALIGNMENT, num_rows) for i in range(count)]
        return [slice(first, end) for first, end in zip(ends, [*ends[1:], num_rows], strict=True)]


@contextmanager
def points_in_calls(library: ctypes.CDLL, points: Points) -> Iterator[None]:
    """While it lasts, calls of the native library on this thread have these points. Errors at one come out here."""
    found: BaseException | None = None

    def at(kind: int) -> int:
        nonlocal found
        try:
            if kind == _LOOK:
                return points.is_overtaken()
            if found is None:
                points.agree() if kind == _AGREE else points.overtake()
        except BaseException as error:  # ctypes would drop it
            found = error
            return 1 if kind == _LOOK else -1  # a look has the threads stop first
        return 0 if found is None else -1

    callback = _At(at)
    library.medha_set_points(callback, round(1e9 * points.interval_s))
    try:
        yield
    except MemoryError:
        if found is None:
            raise
    finally:
        library.medha_set_points(None, 0)
    if found is not None:
        raise found
