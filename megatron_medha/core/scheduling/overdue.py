"""Which prefill has been overdue longest. It knows deadlines; whose they are, the scheduler knows."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from megatron_medha.core.kv.sequence import Sequence

# Entries of the dead that are kept for each of the living, and in all: the heap is swept when there are more. A client
# may name a deadline days ahead (x-slo-ttft-ms), and until then nothing else would take its entry out.
_MAX_ENTRIES_PER_SEQUENCE = 4
_MIN_ENTRIES_SWEPT = 256


class OverdueHeap:
    """A heap of deadlines; who has ended or has another deadline by now may be in it still."""

    def __init__(self, sequences: dict[str, Sequence]) -> None:
        """sequences: all that live, by id; looked at, never changed."""
        self._sequences = sequences
        self._heap: list[tuple[float, float, str]] = []  # (deadline, arrival, id)

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, seq: Sequence) -> None:
        """Its deadline is new, or it is a prefill again."""
        heap = self._heap
        heappush(heap, (seq.deadline_s, seq.request.arrival_s, seq.request_id))
        if len(heap) > _MIN_ENTRIES_SWEPT and len(heap) > _MAX_ENTRIES_PER_SEQUENCE * len(self._sequences):
            self._heap = list({entry for entry in heap if self._holds(entry)})
            heapify(self._heap)

    def longest(self, now_s: float) -> Sequence | None:
        """The prefill with the earliest deadline that has passed."""
        heap = self._heap
        while heap and heap[0][0] < now_s:
            seq = self._sequences.get(heap[0][2])
            # One whose last chunk is in the pipeline needs nothing any more; if it loses its KV it is added again.
            if seq is not None and seq.is_prefill and seq.num_unscheduled_tokens and seq.deadline_s == heap[0][0]:
                return seq
            heappop(heap)
        return None

    def _holds(self, entry: tuple[float, float, str]) -> bool:
        """Whether it is the deadline of one that lives."""
        seq = self._sequences.get(entry[2])
        return seq is not None and seq.deadline_s == entry[0]
