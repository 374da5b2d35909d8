"""The prefills whose next chunk may start, in the order they should: by priority class, then by policy."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_medha.core.kinetic_queue import KineticQueue
from megatron_medha.core.policies import Policy
from megatron_medha.core.request import Sequence

_BEFORE_ALL_CLASSES = float("-inf")


class PrefillQueue:
    """Two queues per priority class: prefills that own KV, and those that wait for some.

    They are kept apart because thousands may wait while no memory is free; those who own it are few, and a batch
    must be able to find them behind any number of others who cannot start.
    """

    def __init__(self, policy: Policy, is_preemptive: bool) -> None:
        self._policy = policy
        self._is_preemptive = is_preemptive
        self._started: dict[float, KineticQueue] = {}
        self._waiting: dict[float, KineticQueue] = {}
        self._sequences: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, seq: Sequence, now_s: float) -> None:
        """Make `seq` a candidate: its next chunk may start."""
        queues, level = self._place_of(seq)
        if (queue := queues.get(level)) is None:
            queue = queues[level] = KineticQueue()
        queue.add(seq.request_id, self._policy(seq), seq.request.arrival_s, now_s)
        self._sequences[seq.request_id] = seq

    def discard(self, seq: Sequence, now_s: float) -> None:
        """Take `seq` out, if it is there; it must own KV exactly if it did when it was added."""
        if self._sequences.pop(seq.request_id, None) is None:
            return
        queues, level = self._place_of(seq)
        queue = queues[level]
        queue.remove(seq.request_id, now_s)
        if not queue:
            del queues[level]

    def candidates(self, now_s: float) -> Candidates:
        """All of them, most urgent first, as of now. The queue must not change while this is read."""
        return Candidates(self._started, self._waiting, self._sequences, now_s)

    def _place_of(self, seq: Sequence) -> tuple[dict[float, KineticQueue], float]:
        if seq.is_waiting:
            return self._waiting, seq.request.priority
        return self._started, seq.request.priority if self._is_preemptive else _BEFORE_ALL_CLASSES


class Candidates:
    """An iterator over prefills, most urgent first, from which those that own no KV can be left out midway."""

    def __init__(
        self,
        started: dict[float, KineticQueue],
        waiting: dict[float, KineticQueue],
        sequences: dict[str, Sequence],
        now_s: float,
    ) -> None:
        self._started = started
        self._waiting = waiting
        self._sequences = sequences
        self._now_s = now_s
        self._has_waiting = True

    def leave_out_waiting(self) -> None:
        """From here on only those that own KV."""
        self._has_waiting = False

    def __iter__(self) -> Iterator[Sequence]:
        for level in sorted({*self._started, *self._waiting}):
            started = iter(self._started[level].in_order(self._now_s) if level in self._started else ())
            waiting = iter(self._waiting[level].in_order(self._now_s) if level in self._waiting else ())
            first, other = next(started, None), next(waiting, None) if self._has_waiting else None
            while first is not None or other is not None:
                if first is not None and (other is None or first < other):
                    yield self._sequences[first[2]]
                    first = next(started, None)
                elif other is not None:
                    yield self._sequences[other[2]]
                    other = next(waiting, None) if self._has_waiting else None
                if not self._has_waiting:
                    other = None
