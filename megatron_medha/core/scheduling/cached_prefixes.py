"""The scheduler's side of the prefix cache: told what sequences do, it knows who gets a new place in the queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.prefix_cache import PrefixCache
from megatron_medha.core.kv.segment import KEY_BYTES
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.deadlines import Deadlines
from megatron_medha.core.scheduling.policies import Priority
from megatron_medha.core.scheduling.prefix_siblings import PrefixSiblings
from megatron_medha.core.scheduling.prefix_waits import PrefixWaits


class CachedPrefixes:
    """Cache, waiting sequences and siblings together."""

    def __init__(
        self, cache: PrefixCache, memory: KVMemory, deadlines: Deadlines, priority: Callable[[Sequence], Priority]
    ) -> None:
        self.siblings = PrefixSiblings(deadlines, memory, cache.granule_tokens, priority)
        self._cache = cache
        cache.prefill_s = deadlines.prefill_s
        self._waits = PrefixWaits(cache)
        self._moved: dict[str, Sequence] = {}  # waiting, of which another part is cached than before

    def set_time(self, now_s: float) -> None:
        """Before an event, or a batch."""
        self._cache.now_s = now_s

    def stand(self, seq: Sequence) -> None:
        """It waits: its cursors stand behind what is cached of it, and are looked at again when that changes."""
        self._waits.add(seq)

    def begin(self, seq: Sequence, start: int) -> None:
        """It waits no more: its first chunk, behind its hits, is in a batch."""
        self._waits.discard(seq)
        seq.num_cached_tokens = start
        seq.num_promised_tokens = min(seq.num_promised_tokens, start)
        # Those that want the granule that it computes first look whether to wait for it.
        self._note(self._waits.wanting(self.siblings.next_key(seq)))

    def leave(self, seq: Sequence) -> None:
        """It ends or loses its KV: it waits no more, and nobody for it."""
        self._waits.discard(seq)
        self.siblings.leave(seq)
        self._note(self.siblings.stop(seq))

    def computed(self, seq: Sequence, is_prefilled: bool) -> None:
        """It has computed more, in all stages: others may begin behind it."""
        for granules in self._cache.publish(seq):
            waiting = self._waits.published(seq.keys, granules)
            self._note([other for other in waiting if self.siblings.awaited(other) is None])
        self._note(self.siblings.stop(seq) if is_prefilled else self.siblings.advance(seq))
        if is_prefilled:  # it has sampled a token
            self._cache.prove(seq)
        if 0 < seq.publish_tokens <= seq.num_computed_tokens:
            seq.publish_tokens, seq.change_tokens = 0, seq.grow_tokens

    def take_keys(self, filled_keys: Iterable[tuple[str, bytes]], sequences: dict[str, Sequence]) -> None:
        """Outputs have filled granules; they can be published when the token after is sampled."""
        granule_tokens = self._cache.granule_tokens
        for request_id, keys in filled_keys:
            seq = sequences.get(request_id)
            if seq is not None and not seq.is_done:
                seq.keys += keys
                num_granules = (seq.num_known_tokens + 1) // granule_tokens
                assert len(seq.keys) == num_granules * KEY_BYTES, f"{request_id}: keys of other than its granules"
                seq.publish_tokens = num_granules * granule_tokens
                seq.change_tokens = min(seq.change_tokens, seq.publish_tokens)

    def failed(self, seq: Sequence) -> None:
        """Nothing that it computed is found any more."""
        self._cache.forget(seq)

    def ended(self, seq: Sequence) -> None:
        """It has given its blocks back for the last time."""
        self._cache.index.settle(seq.request_id)

    def lose_all(self) -> None:
        """The ranks came up empty."""
        self._cache.clear()

    def moved(self) -> list[Sequence]:
        """Waiting sequences of which another part is cached than before, with their cursors set anew."""
        if self._cache.evicted:
            self._note(self._waits.evicted(self._cache.evicted))
            self._cache.evicted.clear()
        if not self._moved:
            return []
        moved = [seq for seq in self._moved.values() if seq.is_waiting]
        self._moved = {}
        for seq in moved:
            self.siblings.leave(seq)
            self._waits.discard(seq)
            self._waits.add(seq)
        return moved

    def _note(self, waiting: Iterable[Sequence]) -> None:
        for seq in waiting:
            self._moved[seq.request_id] = seq
