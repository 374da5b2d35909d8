"""The prefix cache as sequences use it: what of them is cached, what they hold and publish, room made by eviction."""

from __future__ import annotations

from collections.abc import Callable

from megatron_medha.core.kv.block_pool import BlockPool
from megatron_medha.core.kv.eviction import EVICTION_ORDERS, EvictionRules
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import KEY_BYTES, Evicted, Holding, Match, Segment
from megatron_medha.core.kv.sequence import Sequence


class PrefixCache:
    """Sequences over a PrefixIndex. No clock: the caller sets now_s before."""

    def __init__(self, pools: list[BlockPool], block_size: int, shard_tokens: int, kv: KVConfig) -> None:
        self.granule_tokens = kv.tokens_per_granule(block_size)
        self.prefill_s: Callable[[int], float] = float  # predicted seconds of a prefill of so many tokens
        self.decode_s: Callable[[int], float] = _no_time  # of a decode's attention to so many tokens
        rules = EvictionRules(
            num_blocks=pools[0].num_blocks,
            recompute_s=self._recompute_s,
            session_ttl_s=kv.session_ttl_s,
            session_share=kv.session_share,
        )
        self.index = PrefixIndex(
            [pools],
            self.granule_tokens // block_size,
            max(1, shard_tokens // self.granule_tokens),
            EVICTION_ORDERS[kv.eviction],
            rules,
        )
        self.evicted: list[Evicted] = []  # since somebody has last looked
        self.now_s = 0.0
        self._pools = pools

    def match(self, seq: Sequence, shard: int, kvp_rank: int, known: Segment | None = None) -> Match:
        """What a rank has of a shard of the sequence, all before it given. At least one token is left to compute."""
        first = shard * self.index.shard_granules
        last = (seq.num_known_tokens - 1) // self.granule_tokens if seq.request.reads_cache else 0
        return self.index.match(seq.keys, first, max(first, last), kvp_rank, known=known)

    def longest(self, seq: Sequence, known: Segment | None = None) -> Match | None:
        """The last of the matches that cover most of it, one rank a shard; None if nothing of it is cached.

        known: where an earlier one ended.
        """
        if len(self._pools) == 1:
            match = self.match(seq, 0, 0, known)
            return match if match.deepest is not None else None
        found: Match | None = None
        unused = list(range(len(self._pools)))
        while unused and (found is None or self.is_whole(found)):
            shard = len(self._pools) - len(unused)
            best = max([self.match(seq, shard, rank) for rank in unused], key=_length)
            if not best.num_granules:
                break
            unused.remove(best.kvp_rank)
            found = best
        return found

    def is_whole(self, match: Match) -> bool:
        """Whether it covers its shard."""
        return match.end - match.first == self.index.shard_granules

    def saved_s(self, match: Match) -> float:
        """Predicted seconds of computing it."""
        return self._recompute_s(match.first, match.end)

    def num_available_blocks(self, kvp_rank: int) -> int:
        """Blocks on a rank that are free, or cached and used by nobody."""
        return self._pools[kvp_rank].num_free_blocks + self.index.num_evictable_blocks(kvp_rank)

    def num_blocks_taken(self, match: Match, num_blocks: int) -> int:
        """By how many there are fewer available, once the match and the rest of `num_blocks` are taken."""
        num_cached = match.num_granules * self.index.blocks_per_granule
        return num_blocks - num_cached + self.index.num_unpinned_blocks(match)

    def make_room(self, kvp_rank: int, num_blocks: int) -> None:
        """Evict until so many blocks are free, as far as there are as many available."""
        num_short = num_blocks - self._pools[kvp_rank].num_free_blocks
        if 0 < num_short <= self.index.num_evictable_blocks(kvp_rank):
            self.evicted += self.index.evict(kvp_rank, num_short, self.now_s)

    def hold(self, seq: Sequence, kvp_ranks: tuple[int, ...], planned: Match | None = None) -> None:
        """Take the hits of a sequence that begins on these ranks, one a shard. Before room is made for the rest.

        planned: the match on the only rank, if it has just been made.
        """
        if planned is not None:
            self._hold(seq, planned)
            return
        is_contiguous = bool(seq.keys)
        for shard, kvp_rank in enumerate(kvp_ranks):
            first = shard * self.index.shard_granules
            match = self.match(seq, shard, kvp_rank) if is_contiguous else Match(kvp_rank, 0, first, first, None)
            is_contiguous = is_contiguous and self.is_whole(match)
            self._hold(seq, match)

    def hold_shard(self, seq: Sequence, kvp_rank: int) -> None:
        """A decode goes on on another shard, of which nothing is cached."""
        first = len(seq.block_table.holdings) * self.index.shard_granules
        self._hold(seq, Match(kvp_rank, 0, first, first, None))

    def publish(self, seq: Sequence) -> list[range]:
        """It has computed more: the granules that are new to the cache."""
        computed = min(seq.num_computed_tokens // self.granule_tokens, len(seq.keys) // KEY_BYTES)
        table, new = seq.block_table, []
        for shard, holding in zip(table.shards, table.holdings, strict=True):
            last = min(computed, holding.first + self.index.shard_granules)
            if last > holding.end:
                granules = self.index.publish(holding, seq.keys, last, shard.extents, self.now_s)
                if granules:
                    new.append(granules)
        return new

    def release(self, seq: Sequence, ends_session: bool) -> None:
        """It ends or is preempted: what it has published stays in the cache."""
        table = seq.block_table
        for shard, holding in zip(table.shards, table.holdings, strict=True):
            self.index.release(holding, shard.extents, self.now_s, ends_session)
        table.holdings.clear()

    def prove(self, seq: Sequence) -> None:
        """It has sampled a token."""
        for holding in seq.block_table.holdings:
            self.index.prove(holding)

    def forget(self, seq: Sequence) -> None:
        """It failed: nothing that it computed is found any more."""
        self.evicted += self.index.forget(seq.request_id, seq.block_table.holdings)

    def clear(self) -> None:
        """The ranks came up empty."""
        self.evicted += self.index.clear()

    def _recompute_s(self, first: int, end: int) -> float:
        return self.prefill_s(end * self.granule_tokens) - self.prefill_s(first * self.granule_tokens)

    def _hold(self, seq: Sequence, match: Match) -> None:
        holdings: list[Holding] = seq.block_table.holdings
        previous = holdings[-1] if holdings else None
        session = seq.request.session_id
        holdings.append(self.index.take(seq.request_id, match, self.now_s, session, previous))


def _length(match: Match) -> int:
    return match.end - match.first


def _no_time(num_tokens: int) -> float:
    return 0.0
