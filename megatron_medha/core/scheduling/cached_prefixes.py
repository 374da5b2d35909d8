"""The scheduler's side of the prefix cache: told what sequences do, it knows who gets a new place in the queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import inf

from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.prefix_cache import PrefixCache
from megatron_medha.core.kv.segment import KEY_BYTES
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.scheduling.deadlines import Deadlines
from megatron_medha.core.scheduling.policies import Priority
from megatron_medha.core.scheduling.prefix_siblings import PrefixSiblings
from megatron_medha.core.scheduling.prefix_waits import PrefixWaits

# Sequences that get a new place after one event: of those in no queue, while others will follow; of the rest.
_MAX_FREED, _MAX_MOVED = 12, 4


class CachedPrefixes:
    """Cache, waiting sequences and siblings together.

    Of thousands that begin alike, each may have another part cached after every event. A few at a time get their new
    place; the others are chosen, if they are, by an older one, and then matched again.
    """

    def __init__(
        self, cache: PrefixCache, memory: KVMemory, deadlines: Deadlines, priority: Callable[[Sequence], Priority]
    ) -> None:
        self.siblings = PrefixSiblings(deadlines, memory, cache.granule_tokens, priority)
        self._cache = cache
        cache.prefill_s, cache.decode_s = deadlines.prefill_s, deadlines.decode_s
        self._waits = PrefixWaits(cache, deadlines)
        # Waiting, of which another part is cached than before; and those that have waited for another, in no queue. A
        # plain dict's first entry is found behind all that were taken out before.
        self._moved: OrderedDict[str, Sequence] = OrderedDict()
        self._freed: OrderedDict[str, Sequence] = OrderedDict()

    def set_time(self, now_s: float) -> None:
        """Before an event, or a batch."""
        self._cache.now_s = now_s

    def stand(self, seq: Sequence) -> None:
        """It waits: its cursors stand behind what is cached of it, and are looked at again when that changes."""
        self._waits.add(seq)

    def begin(self, seq: Sequence, start: int) -> None:
        """It waits no more: its first chunk, behind its hits, is in a batch."""
        self._waits.begin(seq)
        seq.num_cached_tokens = start
        seq.num_promised_tokens = min(seq.num_promised_tokens, start)
        for other in self._waits.wanting(self.siblings.next_key(seq)):
            if other.request_id not in self._moved and self.siblings.is_sooner(other, self._cache.now_s):
                self._moved[other.request_id] = other

    def leave(self, seq: Sequence) -> None:
        """It ends or loses its KV: it waits no more, and nobody for it."""
        self._waits.discard(seq)
        self.siblings.leave(seq)
        self._free(self.siblings.stop(seq))

    def computed(self, seq: Sequence, is_prefilled: bool) -> None:
        """It has computed more of its prompt, in all stages: others may begin behind it."""
        self._publish(seq)
        self._free(self.siblings.stop(seq) if is_prefilled else self.siblings.advance(seq))
        if is_prefilled:  # it has sampled a token
            self._cache.prove(seq)

    def publish_output(self, seq: Sequence) -> None:
        """A decode ends or is preempted: others can continue its output. Nobody does before, as a rule."""
        if seq.keys and seq.status is Status.DECODING:
            self._publish(seq)
            self._cache.prove(seq)

    def take_keys(self, filled_keys: Iterable[tuple[str, bytes]], sequences: dict[str, Sequence]) -> None:
        """Outputs have filled granules."""
        for request_id, keys in filled_keys:
            seq = sequences.get(request_id)
            if seq is not None and not seq.is_done:
                seq.keys += keys
                num_granules = (seq.num_known_tokens + 1) // self._cache.granule_tokens
                assert len(seq.keys) == num_granules * KEY_BYTES, f"{request_id}: keys of other than its granules"

    def failed(self, seq: Sequence) -> None:
        """Nothing that it computed is found any more."""
        self._cache.forget(seq)
        seq.keys = b""

    def ended(self, seq: Sequence) -> None:
        """It has given its blocks back for the last time."""
        self._cache.index.settle(seq.request_id)

    def lose_all(self) -> None:
        """The ranks came up empty."""
        self._cache.clear()

    def note_evicted(self) -> None:
        """Less is cached of those that wait for what is evicted."""
        if self._cache.evicted:
            for seq in self._waits.evicted(self._cache.evicted):
                self._moved[seq.request_id] = seq
            self._cache.evicted.clear()

    def moved(self, are_all: bool) -> list[Sequence]:
        """Waiting sequences that get a new place, with their cursors updated. are_all: of those in no queue.

        The rest are chosen, if they are, by an older place, and then matched again.
        """
        self.note_evicted()
        moved: list[Sequence] = []
        for waiting, most in ((self._freed, inf if are_all else _MAX_FREED), (self._moved, _MAX_MOVED)):
            most += len(moved)
            while waiting and len(moved) < most:
                _, seq = waiting.popitem(last=False)
                if seq.is_waiting:
                    self.siblings.leave(seq)
                    self._waits.again(seq)
                    moved.append(seq)
        return moved

    def is_current(self, seq: Sequence) -> bool:
        """Whether the cursors of a waiting sequence stand where they should."""
        name = seq.request_id
        return name not in self._moved and name not in self._freed and self.siblings.awaited(seq) is None

    def _publish(self, seq: Sequence) -> None:
        for granules in self._cache.publish(seq):
            for waiting in self._waits.published(seq.keys, granules):
                if self.siblings.awaited(waiting) is None:
                    self._moved[waiting.request_id] = waiting

    def _free(self, waiting: Iterable[Sequence]) -> None:
        for seq in waiting:
            self._freed[seq.request_id] = seq
