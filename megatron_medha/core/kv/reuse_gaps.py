"""How long cached prefixes lie idle before they are used again, measured, and the rate of use that it predicts."""

from __future__ import annotations

from math import log2

_LEAST_S = 0.01     # gaps below are alike
_PER_OCTAVE = 2
_NUM_BINS = 40      # up to 2 ** (40 / 2) * 0.01 s: 3 hours
_EVERY = 64         # observations between two fits
_MAX_WEIGHT = 4096  # observations; older ones fade
_EDGES = [0.0] + [_LEAST_S * 2 ** (i / _PER_OCTAVE) for i in range(_NUM_BINS)]


class ReuseGaps:
    """A histogram of idle times, of uses and of evictions, and from it the rate of use at an age.

    The rate is the highest over all horizons of uses within the horizon / time spent in it (Gittins' index): a prefix
    worth keeping for ten seconds more is not given up because nothing comes in the next one.
    """

    def __init__(self) -> None:
        # Before anything is seen: one use in each bin, so the rate falls with age, as least recently used assumes.
        self._used = [0.5 for _ in range(_NUM_BINS)]
        self._unused = [0.0 for _ in range(_NUM_BINS)]
        self._num_new = 0
        self._weight = 0.5 * _NUM_BINS
        self._rates: list[float] = []
        self.num_fits = 0  # rates are the same while this is
        self._fit()

    def rate(self, idle_s: float) -> float:
        """Uses a second to be expected of what has been idle for so long."""
        return self._rates[_bin(idle_s)]

    def used(self, idle_s: float) -> None:
        """Something idle for so long was used again."""
        self._used[_bin(idle_s)] += 1.0
        self._count()

    def gave_up(self, idle_s: float) -> None:
        """Something idle for so long was evicted: whether it would have been used later, nobody knows."""
        self._unused[_bin(idle_s)] += 1.0
        self._count()

    def _count(self) -> None:
        self._weight += 1.0
        self._num_new += 1
        if self._num_new == _EVERY:
            self._num_new = 0
            self._fit()
            if self._weight > _MAX_WEIGHT:
                self._used = [count / 2 for count in self._used]
                self._unused = [count / 2 for count in self._unused]
                self._weight /= 2

    def _fit(self) -> None:
        left = self._weight
        alive: list[float] = []  # that reach each bin
        times: list[float] = []  # spent in each bin, over all that reach it
        for index, (used, unused) in enumerate(zip(self._used, self._unused, strict=True)):
            width = _EDGES[index + 1] - _EDGES[index]
            alive.append(left)
            times.append((left - (used + unused) / 2) * width)
            left -= used + unused
        rates = []
        for index in range(_NUM_BINS):
            uses = seconds = best = 0.0
            for horizon in range(index, _NUM_BINS):
                uses += self._used[horizon]
                seconds += times[horizon]
                if seconds > 0.0:
                    best = max(best, uses / seconds)
            rates.append(best)
        self._rates = rates
        self.num_fits += 1


def _bin(idle_s: float) -> int:
    if idle_s < _LEAST_S:
        return 0
    return min(_NUM_BINS - 1, 1 + int(_PER_OCTAVE * log2(idle_s / _LEAST_S)))
