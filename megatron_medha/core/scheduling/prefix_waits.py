"""Waiting sequences and what the prefix cache has of them: kept right by what is published and evicted, no scans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_medha.core.kv.prefix_cache import PrefixCache
from megatron_medha.core.kv.segment import KEY_BYTES, Evicted, Segment
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.deadlines import Deadlines

_FADES = 0.9  # of what earlier beginnings count, with each


@dataclass(slots=True)
class _Wait:
    """One waiting sequence."""

    seq: Sequence
    watched: Segment | None  # the end of what is cached of it; None: nothing is
    next_key: bytes          # of the first granule that is not; b"": no more can be


class PrefixWaits:
    """By request id. A waiting sequence holds nothing of the cache.

    What is evicted goes by when each is predicted to begin: when its relative slack is where that of others was when
    they began, lately. Under load short work passes long, and the one that has waited longest need not be the next.
    """

    def __init__(self, cache: PrefixCache, deadlines: Deadlines) -> None:
        self._cache = cache
        self._deadlines = deadlines
        # Relative slack with which sequences have begun lately, by their work: its sum, and that of the work.
        self._slack_s = self._work_s = 0.0
        self._waits: dict[str, _Wait] = {}
        self._by_next_key: dict[bytes, dict[str, Sequence]] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def again(self, seq: Sequence) -> None:
        """Something that it waits behind has changed."""
        wait = self._waits.get(seq.request_id)
        if wait is None:
            self.add(seq)
            return
        self._forget_key(wait)
        self._place(seq, wait.watched)

    def add(self, seq: Sequence) -> None:
        """It waits: set its cursors behind what is cached of it, and see to it that changes are noticed."""
        if seq.keys and seq.request.reads_cache:
            self._place(seq, None)
        else:
            seq.num_cached_tokens = 0
            seq.start_behind(0)

    def _place(self, seq: Sequence, before: Segment | None) -> None:
        """before: what it has watched until now."""
        cache, request_id = self._cache, seq.request_id
        index, granule_tokens = cache.index, cache.granule_tokens
        match = cache.longest(seq, before)
        num_cached_tokens, end, watched = 0, 0, None
        if match is not None:
            end = match.end
            num_cached_tokens = end * granule_tokens
            begin_s = self._predicted_begin_s(seq, num_cached_tokens)
            watched = index.watch(request_id, match, cache.now_s, begin_s, before)
        else:
            index.unwatch(request_id, before)
        seq.num_cached_tokens = num_cached_tokens
        seq.start_behind(num_cached_tokens)
        next_key = b""
        if num_cached_tokens + granule_tokens < seq.num_known_tokens:
            next_key = seq.keys[end * KEY_BYTES : (end + 1) * KEY_BYTES]
        if next_key:
            self._by_next_key.setdefault(next_key, {})[request_id] = seq
        self._waits[request_id] = _Wait(seq, watched, next_key)

    def begin(self, seq: Sequence) -> None:
        """Its first chunk is in a batch: it waits no more."""
        done_s = self._cache.now_s + seq.total_work_s + seq.margin_s
        self._slack_s = _FADES * self._slack_s + seq.deadline_s - done_s
        self._work_s = _FADES * self._work_s + seq.total_work_s
        self.discard(seq)

    def discard(self, seq: Sequence) -> None:
        """It waits no more."""
        wait = self._waits.pop(seq.request_id, None)
        if wait is None:
            return
        self._cache.index.unwatch(seq.request_id, wait.watched)
        self._forget_key(wait)

    def _forget_key(self, wait: _Wait) -> None:
        if wait.next_key:
            others = self._by_next_key[wait.next_key]
            del others[wait.seq.request_id]
            if not others:
                del self._by_next_key[wait.next_key]

    def published(self, keys: bytes, granules: range) -> list[Sequence]:
        """Those of which more is cached, now that these granules of `keys` are."""
        found: list[Sequence] = []
        if self._by_next_key:
            for granule in granules:
                found += self._by_next_key.get(keys[granule * KEY_BYTES : (granule + 1) * KEY_BYTES], {}).values()
        return found

    def wanting(self, key: bytes) -> list[Sequence]:
        """Those whose first granule that is not cached has this key."""
        return list(self._by_next_key.get(key, {}).values())

    def evicted(self, records: Iterable[Evicted]) -> list[Sequence]:
        """Those of which less is cached, now that these granules are not."""
        return [self._waits[name].seq for record in records for name in record.waiters if name in self._waits]

    def _predicted_begin_s(self, seq: Sequence, num_cached_tokens: int) -> float:
        latest_s, work_s = self._deadlines.latest_begin_s(seq, num_cached_tokens)
        relative_slack = self._slack_s / self._work_s if self._work_s else 0.0
        return latest_s - relative_slack * work_s
