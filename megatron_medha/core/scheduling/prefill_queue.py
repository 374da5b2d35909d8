"""The prefills whose next chunk may start, in the order they should: by priority class, by triage, by policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf

from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.kinetic_queue import ITEM, ITEM_ID, LEVEL, KineticQueue, Place
from megatron_medha.core.scheduling.policies import Priority

_BEFORE_ALL_CLASSES = -(2**40)  # below any priority, which are integers of 32 bits
_MOST_LOSSES_PER_LIVE = 4  # entries of self._losses; of more, those that mean nothing any more are taken out ...
_LEAST_SWEPT = 256         # ... if there are so many at all


@dataclass(slots=True, eq=False)
class _Kind:
    """Prefills of one kind, and what they have in common."""

    is_lost: bool     # large, and cannot meet its deadline any more, however fast it goes
    is_waiting: bool  # owns no KV
    is_large: bool    # cannot end within one step, however empty
    queue: KineticQueue = field(default_factory=KineticQueue)
    least_level: int = 0  # of those in the queue, or less


class PrefillQueue:
    """A queue for each of the six kinds of prefill, read as one.

    Kinds are kept apart because thousands may wait while no memory is free, or be too large for what is left of a
    step, and a batch must find the few that can join it behind any number of those. Priority classes are not kept
    apart: clients choose them, and may choose as many as there are requests.

    Triage: by slack alone, those that are late go first. A long prefill whose deadline is lost would then hold up
    others until theirs are lost too, and in the end all are late by about as much. So it lets all of its class go
    first that can still be in time, and keeps what the progress share gives it; among the lost, the least remaining
    work goes first. A prompt that ends within a step is never put back: there is nothing to be gained by it.
    """

    def __init__(
        self, policy: Callable[[Sequence], Priority], is_preemptive: bool, num_step_tokens: int
    ) -> None:
        self.num_step_tokens = num_step_tokens  # that fit into an empty step; of effect on what is added from now on
        self._policy = policy
        self._is_preemptive = is_preemptive
        self._kinds = {
            (is_lost, is_waiting, is_large): _Kind(is_lost, is_waiting, is_large)
            for is_lost, is_large in ((False, False), (False, True), (True, True))
            for is_waiting in (False, True)
        }
        self._kind_of: dict[str, _Kind] = {}  # by request id
        # Heap of (moment, count, sequence): when a large one is lost unless it runs. What has run or gone since may be
        # in it still, until its moment comes.
        self._losses: list[tuple[float, int, Sequence]] = []
        self._num_losses = 0

    def __len__(self) -> int:
        return len(self._kind_of)

    def add(self, seq: Sequence, now_s: float) -> None:
        """Make `seq` a candidate: its next chunk may start. One that is there is given its new place."""
        request, request_id = seq.request, seq.request_id
        is_waiting = seq.is_waiting
        is_large = seq.num_unscheduled_tokens > self.num_step_tokens
        is_lost = is_large and seq.lost_s < now_s
        kind = self._kind_of.get(request_id)
        if (
            kind is None or kind.is_waiting is not is_waiting or kind.is_large is not is_large
            or kind.is_lost is not is_lost
        ):  # fmt: skip
            if kind is not None:
                kind.queue.remove(request_id, now_s)
            self._kind_of[request_id] = kind = self._kinds[is_lost, is_waiting, is_large]
        if is_large and not is_lost and seq.lost_s < inf:
            self._num_losses += 1
            heappush(self._losses, (seq.lost_s, self._num_losses, seq))
            if len(self._losses) > max(_LEAST_SWEPT, _MOST_LOSSES_PER_LIVE * len(self._kind_of)):
                self._sweep_losses()
        line = Priority(seq.remaining_work_s) if is_lost else self._policy(seq)
        # By class, in each class those that are not lost first.
        level = 2 * (request.priority if is_waiting or self._is_preemptive else _BEFORE_ALL_CLASSES) + is_lost
        if level < kind.least_level or not len(kind.queue):
            kind.least_level = level
        kind.queue.add(request_id, level, line, request.arrival_s, (seq, kind), now_s)

    def discard(self, seq: Sequence, now_s: float) -> None:
        """Take `seq` out, if it is there."""
        kind = self._kind_of.pop(seq.request_id, None)
        if kind is not None:
            kind.queue.remove(seq.request_id, now_s)

    def candidates(self, now_s: float) -> Candidates:
        """All of them, most urgent first, as of now. The queue must not change while this is read."""
        while self._losses and self._losses[0][0] < now_s:
            _, _, seq = heappop(self._losses)
            kind = self._kind_of.get(seq.request_id)
            if seq.is_prefill and kind is not None and kind.is_large and not kind.is_lost and seq.lost_s < now_s:
                self.add(seq, now_s)
        return Candidates(list(self._kinds.values()), len(self._kind_of), now_s)

    def _sweep_losses(self) -> None:
        """Keep one entry of each that may still be lost: each chunk of a prompt leaves one behind."""
        latest = {
            seq.request_id: (lost_s, count, seq)
            for lost_s, count, seq in sorted(self._losses, key=_count)
            if seq.is_prefill and seq.lost_s == lost_s and seq.request_id in self._kind_of
        }
        self._losses = list(latest.values())
        heapify(self._losses)


def _count(loss: tuple[float, int, Sequence]) -> int:
    return loss[1]


class Candidates:
    """An iterator over prefills, most urgent first, from which whole kinds can be left out midway."""

    def __init__(self, kinds: list[_Kind], num_candidates: int, now_s: float) -> None:
        self._kinds = kinds
        self._num_candidates = num_candidates
        self._now_s = now_s
        self._has_waiting = self._has_large = True

    def __len__(self) -> int:
        return self._num_candidates

    def leave_out_waiting(self) -> None:
        """From here on only those that own KV."""
        self._has_waiting = False

    def leave_out_large(self) -> None:
        """From here on only those that might end within a step."""
        self._has_large = False

    def __iter__(self) -> Iterator[Sequence]:
        now_s = self._now_s
        places: list[Place] = []
        unfinished: dict[str, KineticQueue] = {}  # queues of which more can be asked for, by the last id known
        lost: list[_Kind] = []  # looked into when the others of their class have been seen, which is hardly ever
        for kind in self._kinds:
            if not len(kind.queue) or not self._includes(kind):
                continue
            if kind.is_lost:
                lost.append(kind)
            else:
                self._extend(places, kind.queue, kind.queue.first_places(now_s), unfinished)
        places.sort()
        lost_level = min([kind.least_level for kind in lost], default=0)
        index = -1
        while (index := index + 1) < len(places) or lost:  # grows while it is read
            if lost and (index == len(places) or places[index][LEVEL] > lost_level):
                following = places[index:]
                for kind in lost:
                    if self._includes(kind):
                        self._extend(following, kind.queue, kind.queue.first_places(now_s), unfinished)
                places[index:] = sorted(following)
                lost = []
                if index == len(places):
                    return
            place = places[index]
            item: tuple[Sequence, _Kind] = place[ITEM]
            seq, kind = item
            if not self._includes(kind):
                continue
            yield seq
            if unfinished and (request_id := place[ITEM_ID]) in unfinished and self._includes(kind):
                queue, following = unfinished[request_id], places[index + 1 :]
                self._extend(following, queue, queue.more_places(now_s), unfinished)
                places[index + 1 :] = sorted(following)

    def _extend(
        self, places: list[Place], queue: KineticQueue, more: list[Place], unfinished: dict[str, KineticQueue]
    ) -> None:
        places += more
        if queue.has_rest:
            unfinished[more[-1][ITEM_ID]] = queue

    def _includes(self, kind: _Kind) -> bool:
        return (self._has_waiting or not kind.is_waiting) and (self._has_large or not kind.is_large)
