"""Where the ranks of a replica agree at which point of a step another one overtakes it: a file that all have mapped.

Collectives of two steps must come in the same order on all ranks that take part in both. So one rank of a pipeline
stage, the leader, decides at each point of a step that may be held, and the others wait there for its word. They meet
in the step's collectives anyway; where a rank has no part in one, it meets the leader's later points.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_medha.parallel.shm_channel import shared_file

_WORDS_PER_LINE = 8  # int64: what different ranks write lies in different lines of the cache
_NUM_DECISIONS = 64  # remembered; a rank is never so many behind, as a step is answered only when all have taken it up
_DECISION_LINES = 2 * _NUM_DECISIONS // _WORDS_PER_LINE
_LINES_PER_RANK = 3 + _DECISION_LINES
_NUM_POINTS = 1 << 24  # of a step, at most


class Decision(NamedTuple):
    """A step is computed at a point of another one."""

    place: int
    batch_id: int


def place_of(batch_id: int, point: int) -> int:
    """A point of a step, in the order that a rank passes them."""
    assert 0 <= point < _NUM_POINTS
    return batch_id * _NUM_POINTS + point


def end_of(batch_id: int) -> int:
    """Behind all points of a step."""
    return place_of(batch_id, _NUM_POINTS - 1)


class PointBoard:
    """For each rank: the newest step it has passed on, the place it has reached as a leader, and its decisions."""

    def __init__(self, path: Path, rank: int, num_ranks: int) -> None:
        """path: of a file of `size_of(num_ranks)` bytes, zeros at first. rank: among all of the replica."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.size_of(num_ranks))
        self._words = memoryview(self._memory).cast("q")
        self._rank = rank

    @staticmethod
    def size_of(num_ranks: int) -> int:
        """Bytes for so many ranks."""
        return num_ranks * _LINES_PER_RANK * _WORDS_PER_LINE * 8

    @classmethod
    def open(cls, device: torch.device) -> PointBoard | None:
        """Of all ranks; None on a GPU, alone, and unless all are on one machine. Collective."""
        num_ranks = dist.get_world_size()
        if device.type != "cpu" or num_ranks == 1:
            return None
        group = dist.group.WORLD
        assert group is not None
        return shared_file(lambda path: cls(path, dist.get_rank(), num_ranks), cls.size_of(num_ranks), group)

    def passed_on(self, batch_id: int, *, is_overtaking: bool) -> None:
        """Its hidden states are on their way to the next stage."""
        self._words[self._word(self._rank, 0) + is_overtaking] = batch_id

    def newest_passed_on(self, rank: int, *, is_overtaking: bool) -> int:
        """By that rank, of the steps that overtake others or of the rest."""
        return self._words[self._word(rank, 0) + is_overtaking]

    def reached(self, place: int) -> None:
        """All that was decided up to there is written."""
        self._words[self._word(self._rank, 1)] = place

    def place_reached(self, leader: int) -> int:
        """By that rank."""
        return self._words[self._word(leader, 1)]

    def decide(self, decision: Decision) -> None:
        """As a leader."""
        number = self.num_decisions(self._rank)
        at = self._word(self._rank, 3) + 2 * (number % _NUM_DECISIONS)
        self._words[at], self._words[at + 1] = decision
        self._words[self._word(self._rank, 2)] = number + 1

    def num_decisions(self, leader: int) -> int:
        """Ever taken by that rank."""
        return self._words[self._word(leader, 2)]

    def decision(self, leader: int, number: int) -> Decision:
        """That it has taken, counted from 0."""
        assert 0 <= self.num_decisions(leader) - number <= _NUM_DECISIONS, "a decision that is forgotten"
        at = self._word(leader, 3) + 2 * (number % _NUM_DECISIONS)
        return Decision(self._words[at], self._words[at + 1])

    @staticmethod
    def _word(rank: int, line: int) -> int:
        return (rank * _LINES_PER_RANK + line) * _WORDS_PER_LINE
