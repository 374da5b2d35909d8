"""The prefills whose next chunk may start, in the order they should: by priority class, by triage, by policy."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import NamedTuple

from megatron_medha.core.kinetic_queue import KineticQueue, Place
from megatron_medha.core.policies import Policy, Priority
from megatron_medha.core.request import Sequence

_BEFORE_ALL_CLASSES = -inf


class _Kind(NamedTuple):
    """What prefills of one queue have in common."""

    level: float      # priority class
    is_lost: bool     # large, and cannot meet its deadline any more, however fast it goes
    is_waiting: bool  # owns no KV
    is_large: bool    # cannot end within one step, however empty


class PrefillQueue:
    """A queue for each kind of prefill, read as one.

    Kinds are kept apart because thousands may wait while no memory is free, or be too large for what is left of a
    step, and a batch must find the few that can join it behind any number of those.

    Triage: by slack alone, those that are late go first. A long prefill whose deadline is lost would then hold up
    others until theirs are lost too, and in the end all are late by about as much. So it lets all of its class go
    first that can still be in time, and keeps what the progress share gives it; among the lost, the least remaining
    work goes first. A prompt that ends within a step is never put back: there is nothing to be gained by it.
    """

    def __init__(self, policy: Policy, is_preemptive: bool, num_step_tokens: int) -> None:
        self.num_step_tokens = num_step_tokens  # that fit into an empty step; of effect on what is added from now on
        self._policy = policy
        self._is_preemptive = is_preemptive
        self._queues: dict[_Kind, KineticQueue] = {}
        self._sequences: dict[str, tuple[Sequence, _Kind]] = {}
        # Heap of (moment, id): when a large one will be lost unless it runs. May hold what has run or gone since; such
        # entries go when their moment comes.
        self._losses: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, seq: Sequence, now_s: float) -> None:
        """Make `seq` a candidate: its next chunk may start."""
        is_waiting = seq.is_waiting
        level = seq.request.priority if is_waiting or self._is_preemptive else _BEFORE_ALL_CLASSES
        is_large = seq.num_unscheduled_tokens > self.num_step_tokens
        is_lost = is_large and seq.lost_s < now_s
        if is_large and not is_lost and seq.lost_s < inf:
            heappush(self._losses, (seq.lost_s, seq.request_id))
        kind = _Kind(level, is_lost, is_waiting, is_large)
        if (queue := self._queues.get(kind)) is None:
            queue = self._queues[kind] = KineticQueue()
        line = Priority(seq.remaining_work_s) if is_lost else self._policy(seq)
        queue.add(seq.request_id, line, seq.request.arrival_s, now_s)
        self._sequences[seq.request_id] = (seq, kind)

    def discard(self, seq: Sequence, now_s: float) -> None:
        """Take `seq` out, if it is there."""
        _, kind = self._sequences.pop(seq.request_id, (None, None))
        if kind is not None:
            queue = self._queues[kind]
            queue.remove(seq.request_id, now_s)
            if not queue:
                del self._queues[kind]

    def candidates(self, now_s: float) -> Candidates:
        """All of them, most urgent first, as of now. The queue must not change while this is read."""
        while self._losses and self._losses[0][0] < now_s:
            _, request_id = heappop(self._losses)
            seq, kind = self._sequences.get(request_id, (None, None))
            if seq is not None and kind is not None and kind.is_large and not kind.is_lost and seq.lost_s < now_s:
                self.discard(seq, now_s)
                self.add(seq, now_s)
        return Candidates(self._queues, self._sequences, now_s)


class Candidates:
    """An iterator over prefills, most urgent first, from which whole kinds can be left out midway."""

    def __init__(
        self, queues: dict[_Kind, KineticQueue], sequences: dict[str, tuple[Sequence, _Kind]], now_s: float
    ) -> None:
        self._queues = queues
        self._sequences = sequences
        self._now_s = now_s
        self._has_waiting = True
        self._has_large = True

    def __len__(self) -> int:
        return len(self._sequences)

    def leave_out_waiting(self) -> None:
        """From here on only those that own KV."""
        self._has_waiting = False

    def leave_out_large(self) -> None:
        """From here on only those that might end within a step."""
        self._has_large = False

    def __iter__(self) -> Iterator[Sequence]:
        for group in sorted({kind[:2] for kind in self._queues}):  # by class, then those that are not lost
            heads: list[tuple[Place, _Kind, Iterator[Place]]] = []
            for kind, queue in self._queues.items():
                if kind[:2] == group and self._includes(kind):
                    places = queue.in_order(self._now_s)
                    heads.append((next(places), kind, places))
            heapify(heads)  # places never compare equal
            while heads:
                place, kind, places = heads[0]
                if self._includes(kind):
                    yield self._sequences[place[2]][0]
                if self._includes(kind) and (following := next(places, None)) is not None:
                    heapreplace(heads, (following, kind, places))
                else:
                    heappop(heads)

    def _includes(self, kind: _Kind) -> bool:
        return (self._has_waiting or not kind.is_waiting) and (self._has_large or not kind.is_large)
