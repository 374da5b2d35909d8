"""Counts by how long something lay idle, for metrics."""

from __future__ import annotations

from bisect import bisect_left

AGES_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)


class AgeCounts:
    """How many by age; an age on a bound counts below it."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(AGES_S) + 1)
        self.total_s = 0.0

    def add(self, age_s: float, count: int = 1) -> None:
        """So many of one age."""
        self.counts[bisect_left(AGES_S, age_s)] += count
        self.total_s += age_s * count
