"""Waiting sequences whose next granules another is computing right now: they wait for it where that is sooner.

The one that computes is as urgent as the most urgent of those that wait for it. It frees them when it has come as far
as they agree with it, and when it ends or loses its KV before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.segment import KEY_BYTES
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.deadlines import Deadlines
from megatron_medha.core.scheduling.policies import Priority


@dataclass(slots=True, eq=False)
class _Prefill:
    """A prefill that has begun."""

    seq: Sequence
    next_key: bytes  # of the first granule that it has not computed; b"": another is at the same, or there is none
    waiters: dict[str, tuple[Sequence, int]] = field(default_factory=dict)  # with how many granules they agree
    least_common: float = inf  # of these


class PrefixSiblings:
    """Who computes what, and who waits for it. Keeps no queue: what it frees, the scheduler puts back."""

    def __init__(
        self,
        deadlines: Deadlines,
        memory: KVMemory,
        granule_tokens: int,
        priority: Callable[[Sequence], Priority],
    ) -> None:
        self.leads: dict[str, Sequence] = {}  # by who computes: the most urgent of those that wait for it
        self._deadlines = deadlines
        self._memory = memory
        self._granule_tokens = granule_tokens
        self._priority = priority
        self._prefills: dict[str, _Prefill] = {}
        self._by_next_key: dict[bytes, _Prefill] = {}
        self._awaited: dict[str, _Prefill] = {}  # by who waits

    def awaited(self, seq: Sequence) -> Sequence | None:
        """For whom a sequence waits."""
        if not self._awaited:
            return None
        prefill = self._awaited.get(seq.request_id)
        return None if prefill is None else prefill.seq

    # ---- those that compute ----

    def begin(self, seq: Sequence) -> None:
        """It begins behind its hits."""
        if seq.keys:
            self._prefills[seq.request_id] = prefill = _Prefill(seq, b"")
            self._place(prefill, seq.num_scheduled_tokens // self._granule_tokens)

    def next_key(self, seq: Sequence) -> bytes:
        """Of the granule that it computes first, as far as nobody else is at it; b"": there is none."""
        prefill = self._prefills.get(seq.request_id)
        return b"" if prefill is None else prefill.next_key

    def advance(self, seq: Sequence) -> list[Sequence]:
        """It has computed more: those that need not wait for it any longer."""
        prefill = self._prefills.get(seq.request_id)
        if prefill is None:
            return []
        num_computed = min(seq.num_computed_tokens // self._granule_tokens, len(seq.keys) // KEY_BYTES)
        self._place(prefill, num_computed)
        if num_computed < prefill.least_common:
            return []
        freed = [waiting for waiting, num_common in prefill.waiters.values() if num_common <= num_computed]
        for waiting in freed:
            del prefill.waiters[waiting.request_id], self._awaited[waiting.request_id]
        self._choose_lead(prefill)
        return freed

    def stop(self, seq: Sequence) -> list[Sequence]:
        """It has computed its prompt, has ended or lost its KV: those that have waited for it."""
        prefill = self._prefills.pop(seq.request_id, None)
        if prefill is None:
            return []
        if prefill.next_key:
            del self._by_next_key[prefill.next_key]
        freed = [waiting for waiting, _ in prefill.waiters.values()]
        for waiting in freed:
            del self._awaited[waiting.request_id]
        self.leads.pop(seq.request_id, None)
        return freed

    # ---- those that wait ----

    def wait(self, seq: Sequence, now_s: float) -> Sequence | None:
        """Let a waiting sequence wait for another if that is predicted to be sooner; which one."""
        found = self._sooner(seq, now_s)
        if found is None:
            return None
        prefill, num_common = found
        prefill.waiters[seq.request_id] = (seq, num_common)
        prefill.least_common = min(prefill.least_common, num_common)
        self._awaited[seq.request_id] = prefill
        lead = self.leads.get(prefill.seq.request_id)
        if lead is None or self._urgency(seq, now_s) < self._urgency(lead, now_s):
            self.leads[prefill.seq.request_id] = seq
        return prefill.seq

    def is_sooner(self, seq: Sequence, now_s: float) -> bool:
        """Whether a waiting sequence has its first token sooner if it lets another compute its next granules."""
        return bool(self._by_next_key) and self._sooner(seq, now_s) is not None

    def leave(self, seq: Sequence) -> None:
        """It has ended, or is matched again."""
        prefill = self._awaited.pop(seq.request_id, None)
        if prefill is not None:
            del prefill.waiters[seq.request_id]
            if self.leads.get(prefill.seq.request_id) is seq:
                self._choose_lead(prefill)

    def follow_lead(self, seq: Sequence) -> None:
        """A chunk of it is scheduled: that is progress of the one it computes for, too."""
        lead = self.leads.get(seq.request_id)
        if lead is not None:
            num_common = self._prefills[seq.request_id].waiters[lead.request_id][1]
            num_tokens = min(seq.num_scheduled_tokens, num_common * self._granule_tokens)
            lead.remaining_work_s = self._deadlines.work_s(lead.num_known_tokens, num_tokens)

    # ---- inside ----

    def _place(self, prefill: _Prefill, num_computed: int) -> None:
        """Note which granule it is at; who is there first, is there alone."""
        keys = prefill.seq.keys
        key = keys[num_computed * KEY_BYTES : (num_computed + 1) * KEY_BYTES]
        if key == prefill.next_key:
            return
        if prefill.next_key:
            del self._by_next_key[prefill.next_key]
        prefill.next_key = key if key and key not in self._by_next_key else b""
        if prefill.next_key:
            self._by_next_key[key] = prefill

    def _choose_lead(self, prefill: _Prefill) -> None:
        """The one that is due first, as who is most urgent changes with time."""
        prefill.least_common = min([num_common for _, num_common in prefill.waiters.values()], default=inf)
        waiting = [seq for seq, _ in prefill.waiters.values()]
        if waiting:
            self.leads[prefill.seq.request_id] = min(waiting, key=_due)
        else:
            self.leads.pop(prefill.seq.request_id, None)

    def _sooner(self, seq: Sequence, now_s: float) -> tuple[_Prefill, int] | None:
        first = seq.num_cached_tokens // self._granule_tokens
        limit = (seq.num_known_tokens - 1) // self._granule_tokens
        if first >= limit or not seq.request.reads_cache:
            return None
        prefill = self._by_next_key.get(seq.keys[first * KEY_BYTES : (first + 1) * KEY_BYTES])
        if prefill is None or prefill.seq is seq:
            return None
        other = prefill.seq
        num_common = _num_common(seq.keys, other.keys, first + 1, min(limit, len(other.keys) // KEY_BYTES))
        common_tokens = num_common * self._granule_tokens
        deadlines = self._deadlines
        alone_s = deadlines.work_s(seq.num_known_tokens, seq.num_cached_tokens)
        rest_s = deadlines.work_s(seq.num_known_tokens, common_tokens)
        # Computing beside one that comes first in any case saves a step, and costs the time of what both compute.
        if rest_s + deadlines.fixed_s > alone_s:
            return None
        if not self._comes_first(other, seq, now_s):
            # Otherwise it must be as near to the end of the common part; a step more or less is within what is saved.
            other_s = deadlines.prefill_s(common_tokens) - deadlines.prefill_s(other.num_scheduled_tokens)
            if other_s + self._extra_wait_s(other) + rest_s > alone_s + deadlines.fixed_s:
                return None
        return prefill, num_common

    def _comes_first(self, other: Sequence, seq: Sequence, now_s: float) -> bool:
        """Whether a sequence that begins now is computed behind another on any KVP rank."""
        if self._memory.kvp > 1:
            return False
        lead = self.leads.get(other.request_id, other)
        return min(self._urgency(other, now_s), self._urgency(lead, now_s)) <= self._urgency(seq, now_s)

    def _extra_wait_s(self, other: Sequence) -> float:
        """By how much longer a chunk of it waits behind prefills of others than on the least busy KVP rank."""
        memory = self._memory
        if memory.kvp == 1 or not other.num_unscheduled_tokens:
            return 0.0
        waits_s = memory.waits_s(range(memory.kvp))
        behind_s = waits_s[memory.computing_rank(other)] - other.remaining_work_s
        return max(0.0, behind_s - min(waits_s.values()))

    def _urgency(self, seq: Sequence, now_s: float) -> tuple[int, float]:
        return seq.request.priority, self._priority(seq).at(now_s)


def _due(seq: Sequence) -> tuple[int, float, str]:
    return seq.request.priority, seq.deadline_s, seq.request_id


def _num_common(keys: bytes, others: bytes, low: int, high: int) -> int:
    """With how many granules two sequences begin alike: at least `low`, at most `high`. Keys are chained."""
    while low < high:
        middle = (low + high + 1) // 2
        end = middle * KEY_BYTES
        if keys[end - KEY_BYTES : end] == others[end - KEY_BYTES : end]:
            low = middle
        else:
            high = middle - 1
    return low
