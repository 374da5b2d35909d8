"""The KV memory of a replica: who may have blocks, on which KVP rank, and what is kept back for whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.block_pool import BlockPool, Extent, join_extents, num_blocks_for
from megatron_medha.core.kv.block_table import KVShard
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.kv.prefix_cache import PrefixCache
from megatron_medha.core.kv.segment import Match
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.kv.shards import check_shard_tokens, context_in, num_shards, split, tokens_left

# Of a decode's steps, those that count when a KVP rank is chosen for it: a client need not name a limit of its output.
_MAX_STEPS_AHEAD = 512
# Seconds of prefill that a hit may save less on a rank for each second that it has worked less than another.
_EVENNESS = 0.15


@dataclass(slots=True)
class ChunkShard:
    """One KVP rank's part in the next chunk of a sequence."""

    kvp_rank: int
    context: int  # earlier tokens of the sequence on that rank


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks kept back for one sequence that has waited too long: a share of all that has been freed since."""

    request_id: str
    share: float
    num_blocks_needed: tuple[int, ...]    # by KVP rank
    num_freed_at_start: tuple[int, ...]


@dataclass(slots=True)
class KVMemory:
    """One pool per KVP rank; a sequence is sharded by token range over as many as it needs."""

    num_blocks: int          # of each KVP rank
    block_size: int
    max_context_len: int
    kvp: int = 1
    max_tokens_per_shard: int | None = None  # None: the whole context on one rank
    watermark: float = 0.01  # share of blocks that prompts leave free, for decodes to grow into
    kv: KVConfig = NO_PREFIX_CACHE
    pools: list[BlockPool] = field(init=False)
    cache: PrefixCache | None = field(init=False, default=None)
    owners: dict[str, Sequence] = field(init=False, default_factory=dict)  # of blocks, by request id
    reservation: Reservation | None = field(init=False, default=None)
    shard_tokens: int = field(init=False)  # of one sequence on one KVP rank, at most
    work_s: list[float] = field(init=False)  # by KVP rank: predicted seconds of all its steps; kept by the scheduler
    _pending_work: list[int] = field(init=False)    # by KVP rank; prompt_len^2 of its prefills
    _num_kept: int = field(init=False)  # blocks below the watermark
    _moved: list[Sequence] = field(init=False, default_factory=list)  # whose cursors a plan has set
    # On one rank: whom the last plan was for, and what it has found in the cache.
    _planned: tuple[Sequence, Match] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(
                f"the KV memory holds {self.num_blocks} blocks of {self.block_size} tokens; "
                "raise model.kv_memory_gib"
            )
        self.pools = [BlockPool(self.num_blocks) for _ in range(self.kvp)]
        self._pending_work = [0] * self.kvp
        self.work_s = [0.0] * self.kvp
        self._num_kept = int(self.watermark * self.num_blocks)
        self.shard_tokens = self.max_tokens_per_shard or self.num_blocks * self.block_size
        if self.shard_tokens % self.block_size or not 0 < self.shard_tokens <= self.num_blocks * self.block_size:
            raise ConfigError(
                f"parallel.max_tokens_per_shard={self.shard_tokens} must be a multiple of {self.block_size} "
                f"and at most the {self.num_blocks * self.block_size} tokens a rank has memory for"
            )

        if self.kv.prefix_cache:
            if self.kvp > 1:
                check_shard_tokens(self.shard_tokens, self.kv, self.block_size)
            self.cache = PrefixCache(self.pools, self.block_size, self.shard_tokens, self.kv)

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens one request can have: bound by the context and by the memory."""
        return min(self.max_context_len, self.kvp * self.shard_tokens)

    @property
    def num_owners(self) -> int:
        """Sequences that own blocks."""
        return len(self.owners)

    @property
    def num_free_blocks(self) -> int:
        """Over all KVP ranks; cached ones that nobody uses are as good as free."""
        return sum([self.num_available_blocks(rank) for rank in range(self.kvp)])

    @property
    def num_cached_blocks(self) -> int:
        """Of these, those that hold cached prefixes."""
        cache = self.cache
        return 0 if cache is None else sum([cache.index.num_evictable_blocks(rank) for rank in range(self.kvp)])

    def num_available_blocks(self, kvp_rank: int) -> int:
        """On one KVP rank, free or cached and used by nobody."""
        return self.pools[kvp_rank].num_free_blocks if self.cache is None else self.cache.num_available_blocks(kvp_rank)

    def plan(self, seq: Sequence) -> tuple[int, ...] | None:
        """KVP ranks on which all blocks for the known tokens of `seq` can be taken now; None if they cannot.

        The least pending work first; a rank too full for a whole shard may still hold the last one. All or
        nothing: growing while it prefills could leave several long prompts each waiting for the others' blocks.
        Its cursors then stand behind what is cached of it on these ranks.
        """
        if self.kvp == 1:
            return self._plan_on_one_rank(seq)
        cache = self.cache if seq.keys else None
        unused = sorted(range(self.kvp), key=self._pending_work.__getitem__)
        if cache is not None:  # equally busy ones by what they have done so far
            unused.sort(key=lambda rank: (self._pending_work[rank], self.work_s[rank]))
        has_hits, num_cached_tokens = cache is not None, 0
        ranks: list[int] = []
        for shard, shard_tokens in enumerate(split(seq.num_known_tokens, self.shard_tokens)):
            count = num_blocks_for(shard_tokens, self.block_size)
            matches: dict[int, Match] = {}
            if cache is not None and has_hits:
                matches = {rank: cache.match(seq, shard, rank) for rank in unused}
            for rank in self._preferred(seq, unused, matches):
                match = matches.get(rank)
                taken = count if cache is None or match is None else cache.num_blocks_taken(match, count)
                if self._fits(rank, taken, seq):
                    break
            else:
                return None
            ranks.append(rank)
            unused.remove(rank)
            if cache is not None and match is not None:
                num_cached_tokens += match.num_granules * cache.granule_tokens
                has_hits = cache.is_whole(match)
        self._stand(seq, num_cached_tokens)
        return tuple(ranks)

    def _plan_on_one_rank(self, seq: Sequence) -> tuple[int, ...] | None:
        num_tokens, cache = seq.num_known_tokens, self.cache
        if num_tokens > self.shard_tokens:
            return None
        count = num_blocks_for(num_tokens, self.block_size)
        if cache is None or not seq.keys:
            return (0,) if self._fits(0, count, seq) else None
        match = cache.match(seq, 0, 0)
        self._planned = seq, match
        if not self._fits(0, cache.num_blocks_taken(match, count), seq):
            return None
        self._stand(seq, match.num_granules * cache.granule_tokens)
        return (0,)

    def _fits(self, rank: int, num_blocks: int, seq: Sequence) -> bool:
        """Whether so many blocks can be taken on a rank, and as many are left as must be."""
        num_left = self.pools[rank].num_free_blocks - num_blocks
        if self.cache is not None:
            num_left += self.cache.index.num_evictable_blocks(rank)
        return num_left >= (self._num_kept if self.owners else 0) + self._num_reserved(rank, seq)

    def _preferred(self, seq: Sequence, unused: list[int], matches: dict[int, Match]) -> list[int]:
        """KVP ranks in the order to try them for a shard; one goes first whose hits are worth the wait there.

        What is not taken from a busy rank is computed on another, and published there: hot prefixes spread. Few
        sessions, each at home on the rank with its hits, would leave the others idle: of ranks that cost about as
        much, the one goes first that has worked least.
        """
        if self.cache is None or not any(match.num_granules for match in matches.values()):
            return unused
        waits_s, decodes_s = self.waits_s(unused), self._decodes_s(unused, seq.request.max_output_tokens)
        least_s = min([self.work_s[rank] for rank in unused])
        cost_s = {
            rank: waits_s[rank] + decodes_s[rank] - self.cache.saved_s(matches[rank])
            + _EVENNESS * (self.work_s[rank] - least_s)
            for rank in unused
        }  # fmt: skip
        best = min(unused, key=cost_s.__getitem__)
        return [best, *(rank for rank in unused if rank != best)]

    def waits_s(self, ranks: Iterable[int]) -> dict[int, float]:
        """Predicted seconds of prefills under way on each of these KVP ranks, one after another."""
        waits_s = dict.fromkeys(ranks, 0.0)
        for seq in self.owners.values():
            if seq.num_unscheduled_tokens and seq.is_prefill:
                rank = self.computing_rank(seq)
                if rank in waits_s:
                    waits_s[rank] += seq.remaining_work_s
        return waits_s

    def _decodes_s(self, ranks: Iterable[int], num_steps: int) -> dict[int, float]:
        """Predicted seconds that one more sequence and those on each of these KVP ranks cost one another in decodes.

        A step waits for the rank that reads most. The one more waits while it reads for the others in each step, and
        they together wait about as long for it.
        """
        assert self.cache is not None
        contexts = dict.fromkeys(ranks, 0)
        for owner in self.owners.values():
            for shard in owner.block_table.shards:
                if shard.kvp_rank in contexts:
                    contexts[shard.kvp_rank] += min(self.shard_tokens, owner.num_known_tokens - shard.start)
        num_steps = min(num_steps, _MAX_STEPS_AHEAD)
        return {rank: 2 * num_steps * self.cache.decode_s(context) for rank, context in contexts.items()}

    def computing_rank(self, seq: Sequence) -> int:
        """The KVP rank that writes the next chunk of a sequence that has KV."""
        return seq.block_table.shards[seq.num_scheduled_tokens // self.shard_tokens].kvp_rank

    def _stand(self, seq: Sequence, num_cached_tokens: int) -> None:
        if seq.num_scheduled_tokens != num_cached_tokens:
            seq.start_behind(num_cached_tokens)
            self._moved.append(seq)

    def restore_cursors(self) -> None:
        """Of sequences that were planned and have not begun."""
        for seq in self._moved:
            if not seq.block_table.shards:
                seq.start_behind(seq.num_cached_tokens)
        self._moved.clear()

    def parts(self, seq: Sequence, plan: tuple[int, ...]) -> tuple[ChunkShard, ...]:
        """The KVP ranks that take part in the next chunk of `seq`; by its plan while it owns nothing."""
        start = seq.num_scheduled_tokens
        shards = seq.block_table.shards
        if not shards:
            if len(plan) == 1:
                return (ChunkShard(plan[0], start),)
            return tuple([
                ChunkShard(rank, context_in(index, start, self.shard_tokens))
                for index, rank in enumerate(plan[: num_shards(start + 1, self.shard_tokens)])
            ])
        if len(shards) == 1:
            return (ChunkShard(shards[0].kvp_rank, start),)
        return tuple([
            ChunkShard(shard.kvp_rank, context_in(index, start, self.shard_tokens))
            for index, shard in enumerate(shards)
            if shard.start <= start
        ])

    def take(self, seq: Sequence, ranks: tuple[int, ...]) -> None:
        """Give `seq` the blocks of a plan made at this very moment."""
        if self.cache is not None:
            planned, self._planned = self._planned, None
            self.cache.hold(seq, ranks, planned[1] if planned is not None and planned[0] is seq else None)
        for index, num_tokens in enumerate(split(seq.num_known_tokens, self.shard_tokens)):
            rank = ranks[index]
            extents = self._take_shard(seq, index, rank, num_blocks_for(num_tokens, self.block_size))
            seq.block_table.shards.append(KVShard(rank, index * self.shard_tokens, extents))
            seq.block_table.unsent.append(append_op(seq.request_id, rank, extents))
            self._pending_work[rank] += seq.request.num_prompt_tokens**2
        self._set_capacity(seq)
        seq.block_table.kvp_ranks = ranks
        self.owners[seq.request_id] = seq
        if self.reservation is not None and self.reservation.request_id == seq.request_id:
            self.reservation = None

    def _take_shard(self, seq: Sequence, index: int, rank: int, num_blocks: int) -> list[Extent]:
        """Of the cache what it holds there, the rest from the pool."""
        extents: list[Extent] = []
        if self.cache is not None:
            extents = self.cache.index.extents(seq.block_table.holdings[index].deepest)
            num_blocks -= sum([count for _, count in extents])
            self.cache.make_room(rank, num_blocks)
        own = self.pools[rank].allocate(num_blocks)
        assert own is not None, f"the plan for {seq.request_id} no longer holds on KVP rank {rank}"
        join_extents(extents, own)
        return extents

    def grow(self, seq: Sequence) -> bool:
        """Give a decode one more block; False, and nothing changed, when there is none."""
        table = seq.block_table
        last = table.shards[-1]
        if last.num_blocks * self.block_size < self.shard_tokens:
            if self.cache is not None:
                self.cache.make_room(last.kvp_rank, 1)
            tail = last.extents[-1]
            extent = self.pools[last.kvp_rank].extend(tail.first_block + tail.num_blocks - 1)
            if extent is None:
                return False
            last.append(extent)
            table.unsent.append(append_op(seq.request_id, last.kvp_rank, (extent,)))
        else:
            free = [rank for rank in self.growth_ranks(seq) if self.num_available_blocks(rank)]
            if not free:
                return False
            rank = min(free, key=lambda rank: (self._pending_work[rank], rank))
            if self.cache is not None:
                self.cache.make_room(rank, 1)
                self.cache.hold_shard(seq, rank)
            extents = self.pools[rank].allocate(1)
            assert extents is not None
            table.shards.append(KVShard(rank, last.start + self.shard_tokens, list(extents)))
            table.unsent.append(append_op(seq.request_id, rank, extents))
            table.kvp_ranks += (rank,)
            self._pending_work[rank] += seq.request.num_prompt_tokens**2
        self._set_capacity(seq)
        return True

    def grow_early(self, seq: Sequence) -> None:
        """Give a decode its next block before it needs it, if there is one for everybody who may.

        A rank that knows where the token after the next goes can compute it before it is asked to.
        """
        last = seq.block_table.shards[-1]
        is_shard_full = last.num_blocks * self.block_size >= self.shard_tokens
        if not is_shard_full and self.num_available_blocks(last.kvp_rank) > self._num_kept + self.num_owners:
            self.grow(seq)

    def growth_ranks(self, seq: Sequence) -> set[int]:
        """KVP ranks on which a free block would let `seq` grow."""
        last = seq.block_table.shards[-1]
        if last.num_blocks * self.block_size < self.shard_tokens:
            return {last.kvp_rank}
        return set(range(self.kvp)) - {shard.kvp_rank for shard in seq.block_table.shards}

    def release(self, seq: Sequence, ends_session: bool = False) -> None:
        """Take back everything `seq` owns, but for what it has published; nothing happens if it owns nothing."""
        if not seq.block_table.shards:
            return
        if self.cache is not None:
            self.cache.release(seq, ends_session)
        for shard in seq.block_table.shards:
            if self.cache is None:
                self.pools[shard.kvp_rank].free(shard.extents)
            self._pending_work[shard.kvp_rank] -= seq.request.num_prompt_tokens**2
        seq.block_table.shards.clear()
        seq.block_table.unsent.clear()
        seq.block_table.kvp_ranks = ()
        seq.capacity_tokens = 0
        del self.owners[seq.request_id]

    def chunk_limit(self, start: int) -> int:
        """See tokens_left."""
        return tokens_left(start, self.shard_tokens)

    def reserve(self, seq: Sequence | None, share: float) -> None:
        """Keep `share` of all blocks freed from now on for a sequence that owns none; None ends it.

        Without this a prompt that needs most of the memory starves: the blocks of every request that ends go to
        the next short one.
        """
        if seq is None or seq.block_table.shards:
            self.reservation = None
        elif self.reservation is None or self.reservation.request_id != seq.request_id:
            needed = num_blocks_for(min(self.shard_tokens, seq.num_known_tokens), self.block_size)
            num_ranks = num_shards(seq.num_known_tokens, self.shard_tokens)
            self.reservation = Reservation(
                seq.request_id,
                share,
                tuple(needed if rank < num_ranks else 0 for rank in range(self.kvp)),
                tuple(pool.num_blocks_ever_freed for pool in self.pools),
            )

    def _num_reserved(self, rank: int, seq: Sequence) -> int:
        reservation = self.reservation
        if reservation is None or reservation.request_id == seq.request_id:
            return 0
        freed = self.pools[rank].num_blocks_ever_freed - reservation.num_freed_at_start[rank]
        return min(reservation.num_blocks_needed[rank], int(reservation.share * freed))

    def _set_capacity(self, seq: Sequence) -> None:
        last = seq.block_table.shards[-1]
        seq.capacity_tokens = capacity = last.start + last.num_blocks * self.block_size
        # The last output token is sampled, but never computed.
        last_tokens = seq.request.num_prompt_tokens + seq.request.max_output_tokens - 1
        seq.grow_tokens = last_tokens if last_tokens <= capacity else capacity - 1
