"""The KV memory of a replica: who may have blocks, on which KVP rank, and what is kept back for whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.block_pool import BlockPool, num_blocks_for
from megatron_medha.core.kv.block_table import KVShard
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.kv.shards import context_in, num_shards, split, tokens_left


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
    pools: list[BlockPool] = field(init=False)
    owners: dict[str, Sequence] = field(init=False, default_factory=dict)  # of blocks, by request id
    reservation: Reservation | None = field(init=False, default=None)
    shard_tokens: int = field(init=False)  # of one sequence on one KVP rank, at most
    _pending_work: list[int] = field(init=False)    # by KVP rank; prompt_len^2 of its prefills
    _num_kept: int = field(init=False)  # blocks below the watermark

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(
                f"the KV memory holds {self.num_blocks} blocks of {self.block_size} tokens; "
                "raise model.kv_memory_gib"
            )
        self.pools = [BlockPool(self.num_blocks) for _ in range(self.kvp)]
        self._pending_work = [0] * self.kvp
        self._num_kept = int(self.watermark * self.num_blocks)
        self.shard_tokens = self.max_tokens_per_shard or self.num_blocks * self.block_size
        if self.shard_tokens % self.block_size or not 0 < self.shard_tokens <= self.num_blocks * self.block_size:
            raise ConfigError(
                f"parallel.max_tokens_per_shard={self.shard_tokens} must be a multiple of {self.block_size} "
                f"and at most the {self.num_blocks * self.block_size} tokens a rank has memory for"
            )

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
        """Over all KVP ranks."""
        return sum(pool.num_free_blocks for pool in self.pools)

    def plan(self, seq: Sequence) -> tuple[int, ...] | None:
        """KVP ranks on which all blocks for the known tokens of `seq` can be taken now; None if they cannot.

        The least pending work first; a rank too full for a whole shard may still hold the last one. All or
        nothing: growing while it prefills could leave several long prompts each waiting for the others' blocks.
        """
        num_tokens = seq.num_known_tokens
        kept = self._num_kept if self.owners else 0
        if self.kvp == 1:
            count = num_blocks_for(num_tokens, self.block_size)
            fits = self.pools[0].num_free_blocks - count >= kept + self._num_reserved(0, seq)
            return (0,) if fits and num_tokens <= self.shard_tokens else None
        unused = sorted(range(self.kvp), key=self._pending_work.__getitem__)
        ranks: list[int] = []
        for shard_tokens in split(num_tokens, self.shard_tokens):
            count = num_blocks_for(shard_tokens, self.block_size)
            for rank in unused:
                if self.pools[rank].num_free_blocks - count >= kept + self._num_reserved(rank, seq):
                    ranks.append(rank)
                    unused.remove(rank)
                    break
            else:
                return None
        return tuple(ranks)

    def parts(self, seq: Sequence, plan: tuple[int, ...]) -> tuple[ChunkShard, ...]:
        """The KVP ranks that take part in the next chunk of `seq`; by its plan while it owns nothing."""
        start = seq.num_scheduled_tokens
        shards = seq.block_table.shards
        if not shards:
            return (ChunkShard(plan[0], 0),)
        if len(shards) == 1:
            return (ChunkShard(shards[0].kvp_rank, start),)
        return tuple([
            ChunkShard(shard.kvp_rank, context_in(index, start, self.shard_tokens))
            for index, shard in enumerate(shards)
            if shard.start <= start
        ])

    def take(self, seq: Sequence, ranks: tuple[int, ...]) -> None:
        """Give `seq` the blocks of a plan made at this very moment."""
        for index, num_tokens in enumerate(split(seq.num_known_tokens, self.shard_tokens)):
            rank = ranks[index]
            extents = self.pools[rank].allocate(num_blocks_for(num_tokens, self.block_size))
            assert extents is not None, f"the plan for {seq.request_id} no longer holds on KVP rank {rank}"
            seq.block_table.shards.append(KVShard(rank, index * self.shard_tokens, list(extents)))
            seq.block_table.unsent.append(append_op(seq.request_id, rank, extents))
            self._pending_work[rank] += seq.request.num_prompt_tokens**2
        self._set_capacity(seq)
        seq.block_table.kvp_ranks = ranks
        self.owners[seq.request_id] = seq
        if self.reservation is not None and self.reservation.request_id == seq.request_id:
            self.reservation = None

    def grow(self, seq: Sequence) -> bool:
        """Give a decode one more block; False, and nothing changed, when there is none."""
        table = seq.block_table
        last = table.shards[-1]
        if last.num_blocks * self.block_size < self.shard_tokens:
            tail = last.extents[-1]
            extent = self.pools[last.kvp_rank].extend(tail.first_block + tail.num_blocks - 1)
            if extent is None:
                return False
            last.append(extent)
            table.unsent.append(append_op(seq.request_id, last.kvp_rank, (extent,)))
        else:
            free = [rank for rank in self.growth_ranks(seq) if self.pools[rank].num_free_blocks]
            if not free:
                return False
            rank = min(free, key=lambda rank: (self._pending_work[rank], rank))
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
        if not is_shard_full and self.pools[last.kvp_rank].num_free_blocks > self._num_kept + self.num_owners:
            self.grow(seq)

    def growth_ranks(self, seq: Sequence) -> set[int]:
        """KVP ranks on which a free block would let `seq` grow."""
        last = seq.block_table.shards[-1]
        if last.num_blocks * self.block_size < self.shard_tokens:
            return {last.kvp_rank}
        return set(range(self.kvp)) - {shard.kvp_rank for shard in seq.block_table.shards}

    def release(self, seq: Sequence) -> None:
        """Take back everything `seq` owns; nothing happens if it owns nothing."""
        if not seq.block_table.shards:
            return
        for shard in seq.block_table.shards:
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
        seq.change_tokens = last_tokens if last_tokens <= capacity else capacity - 1
