"""Where one sequence's KV lies: token positions to slots of a pool, and runs of slots to read in place.

A slot is one token's place in the pool: block b holds slots [b * block_size, (b + 1) * block_size).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class SlotTable:
    """The extents of one sequence in token order. They are only ever appended to."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._runs: list[tuple[int, int, int]] = []  # (first token, first slot, number of slots)
        self.num_slots = 0
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
        assert 0 <= start <= end <= self.num_slots, f"tokens [{start}, {end}) of the {self.num_slots} of this sequence"
        if not num_tokens:
            return np.empty(0, dtype=np.int64)
        first_token, first_slot, count = self._runs[-1]
        if start >= first_token:
            return np.arange(first_slot + start - first_token, first_slot + end - first_token, dtype=np.int64)
        pieces = [
            np.arange(slot + max(start - token, 0), slot + min(end - token, length), dtype=np.int64)
            for token, slot, length in self._runs
            if token < end and token + length > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def part(self, start: int, end: int) -> SlotTable:
        """A table of the tokens [start, end) alone, from the first of them on, wherever in a block."""
        found = SlotTable(1)  # in slots, not in blocks
        for token, slot, count in self._runs:
            first, last = max(start, token), min(end, token + count)
            if first < last:
                found.append([(slot + first - token, last - first)])
        return found

    def runs_in_order(self) -> np.ndarray:
        """All runs in the order of their tokens, int64 [R, 2] of (first token, first slot); a view that stays true."""
        return self._in_order[: len(self._runs)]
