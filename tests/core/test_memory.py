"""KV memory: sharding over KVP ranks, all or nothing, and what is kept back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.kv_memory import ChunkShard, KVMemory
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.kv.shards import default_shard_tokens
from megatron_medha.core.request import Request


def sequence(name: str, num_tokens: int) -> Sequence:
    request = Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=100, arrival_s=0.0)
    return Sequence(request=request, deadline_s=1.0, total_work_s=1.0)


def memory_of(num_blocks: int, kvp: int = 1, shard_blocks: int | None = None, watermark: float = 0.0) -> KVMemory:
    return KVMemory(
        num_blocks=num_blocks,
        block_size=4,
        max_context_len=10_000,
        kvp=kvp,
        max_tokens_per_shard=None if shard_blocks is None else 4 * shard_blocks,
        watermark=watermark,
    )


def take(memory: KVMemory, seq: Sequence) -> bool:
    ranks = memory.plan(seq)
    if ranks is not None:
        memory.take(seq, ranks)
    return ranks is not None


def assert_sound(memory: KVMemory, sequences: list[Sequence]) -> None:
    for rank, pool in enumerate(memory.pools):
        blocks = [b for first, count in pool.free_extents for b in range(first, first + count)]
        for seq in sequences:
            for shard in seq.block_table.shards:
                if shard.kvp_rank == rank:
                    assert shard.num_blocks == sum(extent.num_blocks for extent in shard.extents)
                    blocks.extend(b for first, count in shard.extents for b in range(first, first + count))
        assert sorted(blocks) == list(range(memory.num_blocks))
    assert memory.num_owners == sum(bool(seq.block_table.shards) for seq in sequences)


@settings(max_examples=150, deadline=None)
@given(
    kvp=st.integers(1, 4),
    num_blocks=st.integers(1, 12),
    shard_share=st.floats(0.1, 1.0),
    watermark=st.sampled_from([0.0, 0.2]),
    steps=st.lists(st.tuples(st.sampled_from(["take", "grow", "release", "reserve"]), st.integers(1, 60))),
)
def test_after_any_walk_every_block_is_free_or_owned_once(kvp, num_blocks, shard_share, watermark, steps) -> None:
    memory = memory_of(num_blocks, kvp, max(1, int(num_blocks * shard_share)), watermark)
    shard_tokens = memory.max_tokens_per_shard or 0
    owners: list[Sequence] = []
    for index, (kind, number) in enumerate(steps):
        if kind == "take":
            seq = sequence(f"r{index}", number)
            num_free = memory.num_free_blocks
            if take(memory, seq):
                owners.append(seq)
                assert seq.capacity_tokens >= number > seq.capacity_tokens - memory.block_size
                assert [shard.start for shard in seq.block_table.shards] == list(range(0, number, shard_tokens))
                assert len(set(seq.block_table.kvp_ranks)) == len(seq.block_table.shards)
            else:
                assert memory.num_free_blocks == num_free, "all or nothing"
        elif kind == "grow" and owners:
            seq = owners[number % len(owners)]
            ranks, capacity = memory.growth_ranks(seq), seq.capacity_tokens
            can_grow = any(memory.pools[rank].num_free_blocks for rank in ranks)
            assert memory.grow(seq) == can_grow
            assert seq.capacity_tokens == capacity + memory.block_size * can_grow
            assert seq.block_table.kvp_ranks == tuple(shard.kvp_rank for shard in seq.block_table.shards)
        elif kind == "release" and owners:
            seq = owners.pop(number % len(owners))
            memory.release(seq)
            memory.release(seq)  # of no effect
            assert seq.capacity_tokens == 0 and not seq.block_table.shards
        elif kind == "reserve":
            memory.reserve(sequence("waiting", number), 0.5)
        assert_sound(memory, owners)
    for seq in owners:
        memory.release(seq)
    assert memory.num_free_blocks == kvp * num_blocks and memory.num_owners == 0


def test_a_long_sequence_is_sharded_in_token_order_with_the_remainder_last() -> None:
    memory = memory_of(10, kvp=3, shard_blocks=5)
    seq = sequence("a", 44)
    assert take(memory, seq)
    assert [(shard.start, shard.num_blocks) for shard in seq.block_table.shards] == [(0, 5), (20, 5), (40, 1)]


def test_a_sequence_starts_on_the_rank_with_the_least_pending_work() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=10)
    first, second, third = sequence("a", 20), sequence("b", 4), sequence("c", 4)
    for seq in (first, second, third):
        take(memory, seq)
    assert [seq.block_table.kvp_ranks for seq in (first, second, third)] == [(0,), (1,), (1,)]


def test_a_rank_too_full_for_a_whole_shard_may_hold_the_last_one() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=8)
    memory.take(sequence("big", 16), (0,))    # 6 blocks left on rank 0
    memory.take(sequence("huge", 4), (1,))    # 9 blocks left on rank 1
    assert memory.plan(sequence("a", 40)) == (1, 0)


def test_no_chunk_may_cross_the_end_of_a_shard() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=5)
    assert [memory.chunk_limit(start) for start in (0, 13, 19, 20)] == [20, 7, 1, 20]


def test_the_parts_of_a_chunk_are_the_shards_up_to_its_own() -> None:
    memory = memory_of(10, kvp=3, shard_blocks=5)
    seq = sequence("a", 50)
    assert memory.parts(seq, (2, 0, 1)) == (ChunkShard(2, 0),)
    memory.take(seq, (2, 0, 1))
    seq.num_scheduled_tokens = 19
    assert memory.parts(seq, ()) == (ChunkShard(2, 19),)
    seq.num_scheduled_tokens = 20
    assert memory.parts(seq, ()) == (ChunkShard(2, 20), ChunkShard(0, 0))
    seq.num_scheduled_tokens = 45
    assert memory.parts(seq, ()) == (ChunkShard(2, 20), ChunkShard(0, 20), ChunkShard(1, 5))


def test_a_decode_that_fills_its_last_shard_goes_on_on_another_rank() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=5)
    seq = sequence("a", 20)
    memory.take(seq, (1,))
    assert memory.growth_ranks(seq) == {0} and memory.grow(seq)
    assert [(shard.kvp_rank, shard.start, shard.num_blocks) for shard in seq.block_table.shards] == [
        (1, 0, 5), (0, 20, 1)
    ]  # fmt: skip


def test_a_block_is_given_early_only_in_the_same_shard_and_while_there_is_one_for_everybody() -> None:
    memory = memory_of(4, kvp=2, shard_blocks=2)
    seq, other = sequence("a", 4), sequence("b", 4)
    memory.take(seq, (0,))
    memory.grow_early(seq)
    assert seq.block_table.num_blocks == 2 and seq.block_table.unsent[1:] == [append_op("a", 0, [Extent(1, 1)])]
    memory.grow_early(seq)
    assert seq.block_table.num_blocks == 2, "the next one would open a shard"
    memory.take(other, (0,))
    memory.grow_early(other)
    assert other.block_table.num_blocks == 1, "one block is free, and two may need it"


def test_prompts_leave_the_watermark_free_unless_they_are_alone() -> None:
    memory = memory_of(10, watermark=0.2)
    small, large = sequence("small", 4), sequence("large", 36)
    assert take(memory, small)
    assert memory.plan(large) is None
    memory.release(small)
    assert memory.plan(large) == (0,)


def test_a_share_of_what_is_freed_is_kept_for_the_one_it_is_reserved_for() -> None:
    memory = memory_of(10)
    waiting, newcomer = sequence("waiting", 40), sequence("newcomer", 40)
    owners = [sequence(f"r{index}", 4) for index in range(10)]
    assert all(take(memory, seq) for seq in owners)
    memory.reserve(waiting, 0.5)
    for seq in owners:
        memory.release(seq)
    assert memory.plan(newcomer) is None
    assert memory.plan(sequence("short", 20)) == (0,)
    assert memory.plan(waiting) == (0,)
    memory.take(waiting, (0,))
    memory.release(waiting)
    assert memory.plan(newcomer) == (0,), "the reservation ends when it is used"


def test_a_request_can_have_what_memory_and_context_allow() -> None:
    assert memory_of(10, kvp=3, shard_blocks=5).max_request_tokens == 60
    assert memory_of(10_000).max_request_tokens == 10_000


def test_where_nobody_says_how_long_a_shard_is_the_longest_context_is_cut_evenly() -> None:
    assert default_shard_tokens(1000, 16, max_context_len=4096, kvp=2, kv=NO_PREFIX_CACHE) == 2048
    by_16 = KVConfig(prefix_cache=False, partition_tokens=16)
    assert default_shard_tokens(1000, 16, max_context_len=100, kvp=3, kv=by_16) == 48  # whole blocks
    # No more than there is memory for.
    assert default_shard_tokens(50, 16, max_context_len=4096, kvp=2, kv=NO_PREFIX_CACHE) == 800


@pytest.mark.parametrize(("num_blocks", "shard_tokens"), [(0, None), (10, 6), (10, 44)])
def test_impossible_memory_is_the_users_error(num_blocks: int, shard_tokens: int | None) -> None:
    with pytest.raises(ConfigError, match="raise model.kv_memory_gib|parallel.max_tokens_per_shard="):
        KVMemory(num_blocks=num_blocks, block_size=4, max_context_len=100, max_tokens_per_shard=shard_tokens)


def test_a_plan_may_use_all_but_the_watermark_and_what_is_reserved() -> None:
    memory = memory_of(10, watermark=0.39)  # 3 blocks: what is cut off of a block is not kept
    take(memory, sequence("owner", 4))
    assert memory.plan(sequence("a", 24)) == (0,)
    assert memory.plan(sequence("a", 25)) is None


def test_a_plan_on_several_ranks_may_use_all_but_the_watermark_of_each() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=10, watermark=0.2)
    take(memory, sequence("owner", 4))
    assert memory.plan(sequence("a", 4 * 8)) == (1,)
    assert memory.plan(sequence("a", 4 * 9)) is None
    memory = memory_of(10, kvp=2, shard_blocks=8, watermark=0.2)
    take(memory, sequence("owner", 4))
    assert memory.plan(sequence("a", 4 * 15)) == (1, 0)
    assert memory.plan(sequence("a", 4 * 16)) is None


def test_a_prompt_longer_than_a_shard_does_not_fit_one_rank_however_much_is_free() -> None:
    memory = memory_of(10, shard_blocks=5)
    assert memory.plan(sequence("a", 20)) == (0,)
    assert memory.plan(sequence("a", 21)) is None


def test_a_sequence_whose_shards_do_not_fit_on_as_many_ranks_is_not_begun() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=5)
    assert memory.plan(sequence("a", 40)) == (0, 1)
    assert memory.plan(sequence("a", 41)) is None


def test_pending_work_is_the_square_of_the_prompt_on_each_of_its_ranks_until_it_ends() -> None:
    memory = memory_of(100, kvp=3, shard_blocks=10)
    first, second, third = sequence("a", 50), sequence("b", 30), sequence("c", 20)
    for seq, ranks in ((first, (0, 1)), (second, (1,)), (third, (2,))):
        memory.take(seq, ranks)
    assert memory._pending_work == [2500, 2500 + 900, 400]
    assert memory.plan(sequence("d", 4)) == (2,)
    memory.release(first)
    assert memory._pending_work == [0, 900, 400]
    assert memory.plan(sequence("d", 120)) == (0, 2, 1)


def test_a_decode_goes_on_on_the_rank_with_the_least_pending_work_that_has_a_block() -> None:
    def after(works: dict[int, int], full: tuple[int, ...] = ()) -> int:
        memory = memory_of(6, kvp=4, shard_blocks=2)
        seq = sequence("a", 8)
        memory.take(seq, (1,))
        for rank, num_tokens in works.items():
            memory.take(sequence(f"other{rank}", num_tokens), (rank,))
        for rank in full:
            memory.pools[rank].allocate(memory.pools[rank].num_free_blocks)
        assert memory.grow(seq)
        shard = seq.block_table.shards[1]
        assert seq.block_table.unsent[1:] == [append_op(seq.request_id, shard.kvp_rank, shard.extents)]
        assert seq.capacity_tokens == 12
        assert memory._pending_work[seq.block_table.kvp_ranks[1]] >= 64
        return seq.block_table.kvp_ranks[1]

    assert after({}) == 0
    assert after({0: 5, 2: 3, 3: 4}) == 2
    assert after({0: 4, 2: 4, 3: 4}) == 0
    assert after({0: 5, 2: 3, 3: 4}, full=(2,)) == 3
    assert after({0: 1}, full=(0, 2)) == 3


def test_a_decode_grows_beside_its_last_block_and_stops_where_its_shard_ends() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=3)
    seq = sequence("a", 5)
    memory.take(seq, (0,))
    assert memory.growth_ranks(seq) == {0}
    assert memory.grow(seq)
    assert seq.block_table.shards[0].extents == [(0, 3)]
    assert seq.block_table.unsent == [append_op("a", 0, [Extent(0, 2)]), append_op("a", 0, [Extent(2, 1)])]
    assert memory.growth_ranks(seq) == {1}


def test_without_a_free_block_nothing_grows_and_nothing_changes() -> None:
    memory = memory_of(2, kvp=2, shard_blocks=2)
    seq = sequence("a", 4)
    memory.take(seq, (0,))
    memory.pools[0].allocate(1)
    assert not memory.grow(seq)
    assert (seq.block_table.num_blocks, len(seq.block_table.unsent), seq.capacity_tokens) == (1, 1, 4)
    other = sequence("b", 8)
    memory.take(other, (1,))
    assert not memory.grow(other), "its shard is full, and the other rank too"
    assert other.block_table.kvp_ranks == (1,)


def test_the_change_of_a_decode_is_its_last_token_or_the_one_before_its_last_block_is_full() -> None:
    memory = memory_of(10)
    for num_tokens, num_out, expected in ((5, 100, 7), (5, 4, 8), (5, 3, 7), (5, 1, 5), (8, 2, 7), (8, 1, 8)):
        request = Request(request_id="a", num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=0.0)
        seq = Sequence(request=request, deadline_s=1.0, total_work_s=1.0)
        memory.take(seq, (0,))
        assert (seq.capacity_tokens, seq.grow_tokens) == (8, expected)
        memory.release(seq)


def test_a_block_is_given_early_while_more_are_free_than_are_kept_and_may_be_needed() -> None:
    for num_blocks, grows in ((6, False), (7, True)):  # 3 are owned; one is kept, one for each of two owners
        memory = memory_of(num_blocks, watermark=0.2)
        seq, other = sequence("a", 4), sequence("b", 8)
        memory.take(seq, (0,))
        memory.take(other, (0,))
        memory.grow_early(seq)
        assert seq.block_table.num_blocks == 1 + grows


def test_what_is_kept_for_one_that_waits_is_its_share_of_all_that_is_freed_since() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=4)
    owners = [sequence(f"r{index}", 4) for index in range(12)]
    for index, seq in enumerate(owners):
        memory.take(seq, (index % 2,))
    memory.release(owners[0])  # before anything is reserved
    waiting, other = sequence("waiting", 22), sequence("other", 4)  # 4 blocks on one rank, 2 on another
    memory.reserve(waiting, 0.6)
    assert memory.reservation is not None
    assert memory.reservation.num_blocks_needed == (4, 4) and memory.reservation.num_freed_at_start == (1, 0)
    reserved = []
    for index in range(2, 12, 2):
        reserved.append(memory._num_reserved(0, other))
        memory.release(owners[index])
    assert reserved == [0, 0, 1, 1, 2] and memory._num_reserved(0, other) == 3
    assert memory._num_reserved(1, other) == 0 == memory._num_reserved(0, waiting)


def test_never_more_is_kept_for_one_that_waits_than_it_needs() -> None:
    memory = memory_of(10, kvp=3, shard_blocks=5)
    for rank in range(3):
        for index in range(10):
            memory.take(sequence(f"r{rank}.{index}", 4), (rank,))
    memory.reserve(sequence("waiting", 24), 1.0)
    for seq in list(memory.owners.values()):
        memory.release(seq)
    assert [memory._num_reserved(rank, sequence("other", 4)) for rank in range(3)] == [5, 5, 0]


def test_a_reservation_goes_on_for_the_same_one_and_ends_for_another_or_for_nobody() -> None:
    memory = memory_of(10)
    owner, waiting = sequence("owner", 8), sequence("waiting", 40)
    memory.take(owner, (0,))
    memory.reserve(waiting, 0.5)
    first = memory.reservation
    memory.release(owner)
    memory.reserve(waiting, 0.5)
    assert memory.reservation is first, "counted from the beginning"
    memory.reserve(sequence("another", 40), 0.5)
    assert memory.reservation is not None and memory.reservation.request_id == "another"
    assert memory.reservation.num_freed_at_start == (2,) and memory.reservation.share == 0.5
    memory.reserve(None, 0.5)
    assert memory.reservation is None
    memory.reserve(waiting, 0.5)
    other = sequence("other", 4)
    memory.take(other, (0,))
    assert memory.reservation is not None, "others may take what is not kept"
    memory.reserve(other, 0.5)
    assert memory.reservation is None, "it owns blocks already"


def test_one_that_gives_its_blocks_back_is_as_new() -> None:
    memory = memory_of(10, kvp=2, shard_blocks=5)
    seq = sequence("a", 20)
    memory.take(seq, (1,))
    memory.grow(seq)
    memory.release(seq)
    table = seq.block_table
    assert (table.shards, table.unsent, table.kvp_ranks, seq.capacity_tokens) == ([], [], (), 0)
    assert memory.owners == {} and memory.num_free_blocks == 20


def test_memory_that_is_impossible_is_refused_by_its_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        memory_of(0)
    assert str(error.value) == "the KV memory holds 0 blocks of 4 tokens; raise model.kv_memory_gib"
    assert memory_of(1).max_request_tokens == 4
    for shard_tokens in (-4, 6, 44):
        with pytest.raises(ConfigError) as error:
            KVMemory(num_blocks=10, block_size=4, max_context_len=100, max_tokens_per_shard=shard_tokens)
        assert str(error.value) == (
            f"parallel.max_tokens_per_shard={shard_tokens} must be a multiple of 4 "
            "and at most the 40 tokens a rank has memory for"
        )
    assert memory_of(10, kvp=2, shard_blocks=10).max_request_tokens == 80


def test_a_plan_that_no_longer_holds_is_a_bug_that_is_named() -> None:
    memory = memory_of(2)
    memory.take(sequence("b", 4), (0,))
    with pytest.raises(AssertionError, match="^the plan for a no longer holds on KVP rank 0"):
        memory.take(sequence("a", 8), (0,))


def test_memory_is_one_rank_with_a_watermark_of_one_percent_unless_it_says_otherwise() -> None:
    memory = KVMemory(num_blocks=250, block_size=4, max_context_len=1000)
    assert (memory.kvp, memory.max_tokens_per_shard, memory.watermark, memory.num_free_blocks) == (1, None, 0.01, 250)
    take(memory, sequence("owner", 4))
    assert memory.plan(sequence("a", 4 * 247)) == (0,) and memory.plan(sequence("a", 4 * 248)) is None
