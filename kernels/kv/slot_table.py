"""Where one sequence's KV lies: token positions to slots of a pool, and runs of slots to read in place.

A slot is one token's place in the pool: block b holds slots [b * block_size, (b + 1) * block_size).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Prefix(NamedTuple):
    """The slots of a sequence's first tokens, in any order; attention without a mask needs no other."""

    runs: tuple[tuple[int, int], ...]  # (first slot, number of slots), long enough to be read where they lie
    scattered: np.ndarray | None       # int64 slots of the short runs, worth copying together; None if there are none


class SlotTable:
    """The extents of one sequence in token order. They are only ever appended to."""

    def __init__(self, block_size: int, min_run_tokens: int) -> None:
        """min_run_tokens: a shorter run is copied together with others rather than attended on its own."""
        self._block_size = block_size
        self._min_run_tokens = min_run_tokens
        self._runs: list[tuple[int, int, int]] = []  # (first token, first slot, number of slots)
        self.num_slots = 0
        # All runs but the last, sorted by length once they can no longer grow, so that a decode of a
        # fragmented sequence does not walk hundreds of runs at every step.
        self._num_sealed_tokens = 0
        self._sealed_long: tuple[tuple[int, int], ...] = ()
        self._sealed_short = np.empty(0, dtype=np.int64)
        self._in_order = np.empty((4, 2), dtype=np.int64)  # as `runs_in_order`; rows past the last run are spare
        self.runs_address = self._in_order.ctypes.data  # of the first of `runs_in_order`; asking numpy takes a us

    @property
    def num_runs(self) -> int:
        """Of `runs_in_order`."""
        return len(self._runs)

    def append(self, extents: Iterable[tuple[int, int]]) -> None:
        """Add extents (first block, number of blocks) at the end."""
        for first_block, num_blocks in extents:
            first_slot, count = first_block * self._block_size, num_blocks * self._block_size
            if self._runs:
                last_token, last_slot, last_count = self._runs[-1]
                if last_slot + last_count == first_slot:
                    self._runs[-1] = (last_token, last_slot, last_count + count)
                    self.num_slots += count
                    continue
                self._seal(last_slot, last_count)
            self._runs.append((self.num_slots, first_slot, count))
            if len(self._runs) > len(self._in_order):
                # A copy, never in place: a batch that is being computed may still read the old one.
                self._in_order = np.concatenate((self._in_order, np.empty_like(self._in_order)))
                self.runs_address = self._in_order.ctypes.data
            self._in_order[len(self._runs) - 1] = self.num_slots, first_slot
            self.num_slots += count

    def slot(self, token: int) -> int:
        """The slot of one token."""
        first_token, first_slot, _ = self._runs[-1]
        if first_token <= token < self.num_slots:
            return first_slot + token - first_token
        return int(self.slots(token, 1)[0])

    def slots(self, start: int, num_tokens: int) -> np.ndarray:
        """Slots of the tokens [start, start + num_tokens), int64."""
        end = start + num_tokens
        assert end <= self.num_slots, f"token {end} lies beyond the {self.num_slots} slots of this sequence"
        first_token, first_slot, count = self._runs[-1]
        if start >= first_token:
            return np.arange(first_slot + start - first_token, first_slot + end - first_token, dtype=np.int64)
        pieces = [
            np.arange(slot + max(start - token, 0), slot + min(end - token, length), dtype=np.int64)
            for token, slot, length in self._runs
            if token < end and token + length > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def runs_in_order(self) -> np.ndarray:
        """All runs in the order of their tokens, int64 [R, 2] of (first token, first slot); a view that stays true."""
        return self._in_order[: len(self._runs)]

    def prefix(self, num_tokens: int) -> Prefix:
        """The slots of the tokens [0, num_tokens)."""
        assert num_tokens <= self.num_slots, f"token {num_tokens} lies beyond the {self.num_slots} slots"
        if num_tokens == 0:
            return Prefix((), None)
        if num_tokens >= self._num_sealed_tokens:
            long = self._sealed_long
            short = [self._sealed_short] if self._sealed_short.size else []
            remaining = [self._runs[-1]]
        else:
            long, short, remaining = (), [], self._runs
        for token, slot, length in remaining:
            count = min(length, num_tokens - token)
            if count <= 0:
                break
            if count >= self._min_run_tokens:
                long = (*long, (slot, count))
            else:
                short.append(np.arange(slot, slot + count, dtype=np.int64))
        if not short:
            return Prefix(long, None)
        if len(short) == 1 and short[0] is not self._sealed_short:
            return Prefix((*long, (int(short[0][0]), len(short[0]))), None)  # a single short run needs no copy
        return Prefix(long, short[0] if len(short) == 1 else np.concatenate(short))

    def _seal(self, slot: int, count: int) -> None:
        if count >= self._min_run_tokens:
            self._sealed_long = (*self._sealed_long, (slot, count))
        else:
            self._sealed_short = np.concatenate((self._sealed_short, np.arange(slot, slot + count, dtype=np.int64)))
        self._num_sealed_tokens += count
