"""The prefills whose next chunk may start, in the order they should: by priority class, by triage, by policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf

from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.kinetic_queue import ITEM, ITEM_ID, LEVEL, KineticQueue, RankedEntry
from megatron_medha.core.scheduling.policies import Priority

_FIRST_LEVEL = -(2**40)  # below any priority, which are integers of 32 bits
# Entries of self._late_heap for each prefill, and in all: of more, those that mean nothing any more are taken out.
_MAX_LATE_ENTRIES_PER_SEQUENCE = 4
_MIN_LATE_ENTRIES_SWEPT = 256


@dataclass(slots=True, eq=False)
class _Bucket:
    """Prefills of one kind, and what they have in common."""

    is_late: bool     # large, and cannot meet its deadline any more, however fast it goes
    is_waiting: bool  # owns no KV
    is_large: bool    # cannot end within one step, however empty
    queue: KineticQueue = field(default_factory=KineticQueue)
    min_level: int = 0  # of those in the queue, or less


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
        # By request id: one that waits for what a prefill computes, and is more urgent. See prefix_siblings.py.
        self.leads: dict[str, Sequence] = {}
        self._policy = policy
        self._is_preemptive = is_preemptive
        self._buckets = {
            (is_late, is_waiting, is_large): _Bucket(is_late, is_waiting, is_large)
            for is_late, is_large in ((False, False), (False, True), (True, True))
            for is_waiting in (False, True)
        }
        self._bucket_of: dict[str, _Bucket] = {}  # by request id
        # Heap of (moment, count, sequence): when a large one is lost unless it runs. What has run or gone since may be
        # in it still, until its moment comes.
        self._late_heap: list[tuple[float, int, Sequence]] = []
        self._num_late_entries = 0

    def __len__(self) -> int:
        return len(self._bucket_of)

    def add(self, seq: Sequence, now_s: float) -> None:
        """Make `seq` a candidate: its next chunk may start. One that is there is given its new place."""
        request, request_id = seq.request, seq.request_id
        is_waiting = seq.is_waiting
        is_large = seq.num_unscheduled_tokens > self.num_step_tokens
        claimant = self._claimant(seq, now_s) if self.leads else seq
        is_late = is_large and claimant.triage_s < now_s
        bucket = self._bucket_of.get(request_id)
        if (
            bucket is None or bucket.is_waiting is not is_waiting or bucket.is_large is not is_large
            or bucket.is_late is not is_late
        ):  # fmt: skip
            if bucket is not None:
                bucket.queue.remove(request_id, now_s)
            self._bucket_of[request_id] = bucket = self._buckets[is_late, is_waiting, is_large]
        if is_large and not is_late and claimant.triage_s < inf:
            self._num_late_entries += 1
            heappush(self._late_heap, (claimant.triage_s, self._num_late_entries, seq))
            if len(self._late_heap) > max(
                _MIN_LATE_ENTRIES_SWEPT, _MAX_LATE_ENTRIES_PER_SEQUENCE * len(self._bucket_of)
            ):
                self._sweep_late()
        line = Priority(claimant.remaining_work_s) if is_late else self._policy(claimant)
        # By class, in each class those that are not lost first.
        level = 2 * (claimant.request.priority if is_waiting or self._is_preemptive else _FIRST_LEVEL) + is_late
        if level < bucket.min_level or not len(bucket.queue):
            bucket.min_level = level
        bucket.queue.add(request_id, level, line, request.arrival_s, (seq, bucket), now_s)

    def discard(self, seq: Sequence, now_s: float) -> None:
        """Take `seq` out, if it is there."""
        bucket = self._bucket_of.pop(seq.request_id, None)
        if bucket is not None:
            bucket.queue.remove(seq.request_id, now_s)

    def candidates(self, now_s: float) -> PrefillCandidates:
        """All of them, most urgent first, as of now. The queue must not change while this is read."""
        while self._late_heap and self._late_heap[0][0] < now_s:
            _, _, seq = heappop(self._late_heap)
            bucket = self._bucket_of.get(seq.request_id)
            if (
                seq.is_prefill
                and bucket is not None
                and bucket.is_large
                and not bucket.is_late
                and (self._claimant(seq, now_s) if self.leads else seq).triage_s < now_s
            ):
                self.add(seq, now_s)
        return PrefillCandidates(list(self._buckets.values()), len(self._bucket_of), now_s)

    def _claimant(self, seq: Sequence, now_s: float) -> Sequence:
        """Whose urgency counts: its own, or that of one that waits for it."""
        lead = self.leads.get(seq.request_id)
        if lead is None:
            return seq

        def place(one: Sequence) -> tuple[int, bool, float]:
            return one.request.priority, one.triage_s < now_s, self._policy(one).at(now_s)

        return lead if place(lead) < place(seq) else seq

    def _sweep_late(self) -> None:
        """Keep one entry of each that may still be lost: each chunk of a prompt leaves one behind."""
        latest = {
            seq.request_id: (triage_s, count, seq)
            for triage_s, count, seq in sorted(self._late_heap, key=_count)
            if seq.is_prefill and seq.triage_s == triage_s and seq.request_id in self._bucket_of
        }
        self._late_heap = list(latest.values())
        heapify(self._late_heap)


def _count(loss: tuple[float, int, Sequence]) -> int:
    return loss[1]


class PrefillCandidates:
    """An iterator over prefills, most urgent first, from which whole kinds can be left out midway."""

    def __init__(self, buckets: list[_Bucket], num_candidates: int, now_s: float) -> None:
        self._buckets = buckets
        self._num_candidates = num_candidates
        self._now_s = now_s
        self._has_waiting = self._has_large = self._has_small = True

    def __len__(self) -> int:
        return self._num_candidates

    def exclude_waiting(self) -> None:
        """From here on only those that own KV."""
        self._has_waiting = False

    def exclude_large(self) -> None:
        """From here on only those that might end within a step."""
        self._has_large = False

    def exclude_small(self) -> None:
        """From here on only those that cannot end within a step."""
        self._has_small = False

    def __iter__(self) -> Iterator[Sequence]:
        now_s = self._now_s
        places: list[RankedEntry] = []
        unfinished: dict[str, KineticQueue] = {}  # queues of which more can be asked for, by the last id known
        lost: list[_Bucket] = []  # looked into when the others of their class have been seen, which is hardly ever
        for bucket in self._buckets:
            if not len(bucket.queue) or not self._includes(bucket):
                continue
            if bucket.is_late:
                lost.append(bucket)
            else:
                self._extend(places, bucket.queue, bucket.queue.first_entries(now_s), unfinished)
        places.sort()
        late_level = min([bucket.min_level for bucket in lost], default=0)
        index = -1
        while (index := index + 1) < len(places) or lost:  # grows while it is read
            if lost and (index == len(places) or places[index][LEVEL] > late_level):
                following = places[index:]
                for bucket in lost:
                    if self._includes(bucket):
                        self._extend(following, bucket.queue, bucket.queue.first_entries(now_s), unfinished)
                places[index:] = sorted(following)
                lost = []
                if index == len(places):
                    return
            place = places[index]
            item: tuple[Sequence, _Bucket] = place[ITEM]
            seq, bucket = item
            if not self._includes(bucket):
                continue
            yield seq
            if unfinished and (request_id := place[ITEM_ID]) in unfinished and self._includes(bucket):
                queue, following = unfinished[request_id], places[index + 1 :]
                self._extend(following, queue, queue.more_entries(now_s), unfinished)
                places[index + 1 :] = sorted(following)

    def _extend(
        self,
        places: list[RankedEntry],
        queue: KineticQueue,
        more: list[RankedEntry],
        unfinished: dict[str, KineticQueue],
    ) -> None:
        places += more
        if queue.has_rest:
            unfinished[more[-1][ITEM_ID]] = queue

    def _includes(self, bucket: _Bucket) -> bool:
        is_of_size = self._has_large if bucket.is_large else self._has_small
        return is_of_size and (self._has_waiting or not bucket.is_waiting)
