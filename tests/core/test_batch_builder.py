"""A batch while it is being formed, on a machine whose seconds add up exactly."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_medha.core.cost.step_cost import CostModel, StepLoad
from megatron_medha.core.kv.kv_memory import ChunkShard, KVMemory
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.batch_builder import BatchBuilder, PlannedChunk
from megatron_medha.core.scheduling.chunking import Chunking, ChunkRule

HERE = (ChunkShard(0, 0),)


class Halves(CostModel):
    """Half a second a sequence, one a token, and for chunks so much a token of their context."""

    def __init__(self, context_s: float = 0.0) -> None:
        self._context_s = context_s

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        return num_tokens + 0.5 * num_sequences

    def attention_s(self, start: int, num_tokens: int) -> float:
        return self._context_s * start * num_tokens

    def decode_attention_s(self, context: int) -> float:
        return 0.125 * context

    def observe(self, load: StepLoad, duration_s: float) -> None: ...

    @property
    def revision(self) -> int:
        return 0


def builder_of(
    chunking: Chunking = Chunking.ADAPTIVE, context_s: float = 0.0, kvp: int = 1, shard_tokens: int | None = None,
    **bounds: int,
) -> BatchBuilder:  # fmt: skip
    limits = {"tile_tokens": 4, "max_tokens": 100, "fixed_tokens": 30, "max_chunk_tokens": 90, **bounds}
    memory = KVMemory(
        num_blocks=1000, block_size=4, max_context_len=4000, kvp=kvp, max_tokens_per_shard=shard_tokens, watermark=0.0
    )
    return BatchBuilder(ChunkRule(chunking=chunking, **limits), Halves(context_s), memory)


def begun(builder: BatchBuilder, budget_s: float, has_waiting_decodes: bool = False) -> BatchBuilder:
    builder.begin(budget_s, has_waiting_decodes)
    return builder


def sequence(num_tokens: int, num_scheduled: int = 0, name: str = "a", **more: Any) -> Sequence:
    request = Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=9, arrival_s=0.0)
    return Sequence(request=request, deadline_s=1.0, total_work_s=1.0, num_scheduled_tokens=num_scheduled, **more)


def filled(builder: BatchBuilder, num_tokens: int, part: ChunkShard = HERE[0]) -> BatchBuilder:
    builder.add(PlannedChunk(sequence(num_tokens, name="filler"), num_tokens, (part,)))
    return builder


def test_a_new_batch_is_empty_and_forgets_the_last_one() -> None:
    builder = filled(begun(builder_of(kvp=2), 50.0), 9)
    assert not builder.is_empty and builder.num_tokens == 9 and len(builder.prefills) == 1
    builder.begin(20.0, True)
    assert builder.is_empty and builder.num_tokens == 0 and builder.prefills == [] and builder.budget_s == 20.0
    assert len(builder.loads) == 2


def test_decodes_read_their_context_and_their_own_key() -> None:
    builder = begun(builder_of(), 50.0)
    builder.add_decodes([sequence(5, 7), sequence(5, 11)])
    (load,) = builder.loads
    assert (load.num_tokens, load.num_sequences, load.decode_context) == (2, 2, 20)
    assert load.attention_s == 20 * 0.125 and builder.num_tokens == 2


def test_decodes_over_several_ranks_read_on_each_what_it_holds() -> None:
    builder = begun(builder_of(kvp=3, shard_tokens=8), 50.0)
    one, two = sequence(13, name="one"), sequence(6, name="two")
    builder._memory.take(one, (1, 0))
    builder._memory.take(two, (0,))
    one.num_scheduled_tokens, two.num_scheduled_tokens = 13, 6
    builder.add_decodes([one, two])
    assert [load.decode_context for load in builder.loads] == [6 + 7, 9, 0]
    assert [load.num_sequences for load in builder.loads] == [2, 1, 0]
    assert [load.attention_s for load in builder.loads] == [13 * 0.125, 9 * 0.125, 0.0]
    assert builder.num_tokens == 2 and builder.slowest_load is builder.loads[0]


def test_the_step_waits_for_the_slowest_rank() -> None:
    builder = begun(builder_of(kvp=2), 50.0)
    filled(builder, 5, ChunkShard(0, 0))
    filled(builder, 6, ChunkShard(1, 0))
    assert builder.slowest_load is builder.loads[1] and builder.num_tokens == 6


@pytest.mark.parametrize(
    ("budget_s", "expected"), [(20.5, 20), (20.4, 16), (24.5, 24), (60.5, 57), (57.5, 57), (57.4, 56)]
)
def test_what_fits_is_whole_tiles_within_the_budget_or_all_that_is_left(budget_s: float, expected: int) -> None:
    assert begun(builder_of(), budget_s).fit(sequence(60, 3), HERE) == expected


def test_what_fits_is_bound_by_the_share_of_the_budget_and_by_a_limit() -> None:
    builder = begun(builder_of(), 40.5)
    assert builder.fit(sequence(90), HERE) == 40
    assert builder.fit(sequence(90), HERE, 0.5) == 16
    assert builder.fit(sequence(90), HERE, limit=10) == 10
    assert builder.fit(sequence(90), HERE, limit=0) == 0


def test_what_fits_on_several_ranks_is_what_the_fullest_has_room_for() -> None:
    builder = filled(begun(builder_of(kvp=2), 40.5), 20, ChunkShard(1, 0))
    assert builder.fit(sequence(90), HERE) == 40
    assert builder.fit(sequence(90), (ChunkShard(0, 0), ChunkShard(1, 0))) == 16
    assert builder.fit(sequence(90), (ChunkShard(1, 0), ChunkShard(0, 0))) == 16


def test_no_chunk_crosses_the_end_of_its_shard() -> None:
    builder = begun(builder_of(kvp=2, shard_tokens=16), 50.0)
    assert builder.fit(sequence(40, 3), HERE) == 13 == builder.fit_credit(sequence(40, 3), HERE, 99.0)
    assert builder.tile(sequence(40, 14), HERE) == 2
    assert not builder.fits_whole(sequence(20, 3), HERE) and builder.fits_whole(sequence(16, 3), HERE)


@pytest.mark.parametrize(
    ("num_scheduled", "num_filled", "expected"),
    [(0, 0, 4), (57, 0, 3), (0, 97, 3), (0, 99, 1), (0, 100, 0), (60, 0, 0)],
)
def test_a_tile_ends_with_the_prompt_or_with_the_buffers_of_the_step(
    num_scheduled: int, num_filled: int, expected: int
) -> None:
    builder = begun(builder_of(), 1.0)
    if num_filled:
        filled(builder, num_filled)
    assert builder.tile(sequence(60, num_scheduled), HERE) == expected
    assert begun(builder_of(max_chunk_tokens=2), 1.0).tile(sequence(60), HERE) == 2


CONTEXT = (ChunkShard(0, 8),)  # with 0.5 s a token of context and token: a token costs 1 + 4, a chunk 0.5 more


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [
        (161.0, 16),  # half of the budget
        (80.5, 16),   # 16 tokens take 80.5 exactly
        (80.4, 8),
        (40.5, 8),
        (40.4, 4),
        (20.5, 4),
        (20.4, 4),    # cut in two twice, never again
        (1.0, 4),
    ],
)
def test_a_tile_that_breaks_the_budget_is_cut_in_two_twice_at_most(budget_s: float, expected: int) -> None:
    builder = builder_of(context_s=0.5, tile_tokens=16)
    assert begun(builder, budget_s, has_waiting_decodes=True).tile(sequence(60), CONTEXT) == expected
    assert begun(builder, budget_s).tile(sequence(60), CONTEXT) == 16, "nobody waits for the step"


def test_a_tile_beside_others_is_left_whole_while_it_takes_half_of_the_budget_at_most() -> None:
    for budget_s, expected in ((161.0, 16), (160.9, 8)):
        builder = begun(builder_of(context_s=0.5, tile_tokens=16, max_tokens=1000), budget_s, has_waiting_decodes=True)
        filled(builder, 150)
        assert builder.tile(sequence(60), CONTEXT) == expected


def test_a_tile_is_not_cut_for_less_than_a_quarter_of_its_time() -> None:
    class Reading(Halves):
        def attention_s(self, start: int, num_tokens: int) -> float:
            return self._context_s

    for context_s, expected in ((15.0, 8), (15.5, 8), (16.0, 16)):
        builder = builder_of(tile_tokens=16)
        builder._cost = Reading(context_s)  # 16 tokens take 16.5 + c, 8 take 8.5 + c: a quarter less at c = 15.5
        assert begun(builder, 10.0, has_waiting_decodes=True).tile(sequence(60), HERE) == expected


def test_tiles_are_cut_under_adaptive_chunks_only_and_never_below_a_token() -> None:
    for chunking in (Chunking.FIXED, Chunking.WHOLE):
        builder = begun(builder_of(chunking, context_s=0.5), 1.0, has_waiting_decodes=True)
        assert builder.tile(sequence(60), CONTEXT) == 4
    builder = begun(builder_of(context_s=0.5, tile_tokens=2), 1.0, has_waiting_decodes=True)
    assert builder.tile(sequence(60), CONTEXT) == 1
    builder = begun(builder_of(context_s=0.5, tile_tokens=1), 1.0, has_waiting_decodes=True)
    assert builder.tile(sequence(60), CONTEXT) == 1


def test_where_no_tile_fits_a_cut_one_may() -> None:
    builder = builder_of(context_s=0.5, tile_tokens=16)
    assert begun(builder, 41.0, has_waiting_decodes=True).fit(sequence(60), CONTEXT) == 8
    assert begun(builder, 41.0).fit(sequence(60), CONTEXT) == 0
    assert begun(builder, 20.0, has_waiting_decodes=True).fit(sequence(60), CONTEXT) == 0
    assert begun(builder, 41.0, has_waiting_decodes=True).fit(sequence(60), CONTEXT, limit=3) == 3
    assert begun(builder, 41.0, has_waiting_decodes=True).fit(sequence(60), CONTEXT, limit=0) == 0
    assert begun(builder, 82.0, has_waiting_decodes=True).fit(sequence(60), CONTEXT, 0.5) == 0, "not for a share"


@pytest.mark.parametrize(("num_tokens", "fits"), [(40, True), (41, False)])
def test_a_prompt_fits_whole_if_all_of_it_keeps_the_budget_of_each_rank(num_tokens: int, fits: bool) -> None:
    builder = begun(builder_of(kvp=2), 40.5)
    assert builder.fits_whole(sequence(num_tokens + 5, 5), HERE) == fits
    filled(builder, 10, ChunkShard(1, 0))
    assert not builder.fits_whole(sequence(40), (ChunkShard(0, 0), ChunkShard(1, 0)))
    assert builder.fits_whole(sequence(30), (ChunkShard(0, 0), ChunkShard(1, 0))) is (40.5 >= 10.5 + 30.5)


def test_a_prompt_fits_whole_within_the_bounds_of_a_chunk_and_the_buffers_of_a_step() -> None:
    builder = begun(builder_of(), 1e6)
    assert builder.fits_whole(sequence(90), HERE) and not builder.fits_whole(sequence(91), HERE)
    filled(builder, 20)
    assert builder.fits_whole(sequence(80), HERE) and not builder.fits_whole(sequence(81), HERE)


def test_no_prompt_of_which_little_is_computed_has_more_than_max_prefill_tokens() -> None:
    builder = begun(builder_of(kvp=2), 40.5)
    assert builder.max_prefill_tokens() == 40 + 4
    filled(builder, 20, ChunkShard(0, 0))
    assert builder.max_prefill_tokens() == 40 + 4, "the other rank is empty"
    filled(builder, 30, ChunkShard(1, 0))
    assert builder.max_prefill_tokens() == 16 + 4


def test_a_credit_pays_for_whole_tiles_within_the_budget() -> None:
    builder = filled(begun(builder_of(), 60.5), 10)
    assert builder.fit_credit(sequence(90), HERE, 20.5) == 20
    assert builder.fit_credit(sequence(90), HERE, 20.4) == 16
    assert builder.fit_credit(sequence(7), HERE, 20.5) == 7
    assert builder.fit_credit(sequence(90), HERE, 99.0) == 48, "the budget is kept"
    assert builder.fit_credit(sequence(90), HERE, 3.0) == 0


def test_a_credit_pays_for_one_tile_that_breaks_the_budget() -> None:
    builder = filled(begun(builder_of(), 60.5), 59)
    assert builder.fit_credit(sequence(90), HERE, 4.5) == 4
    assert builder.fit_credit(sequence(90), HERE, 4.4) == 0
    assert builder.fit_credit(sequence(2), HERE, 2.5) == 2
    assert builder.fit_credit(sequence(90, 90), HERE, 99.0) == 0


def test_a_credit_goes_by_time_whatever_chunks_are_made_by() -> None:
    assert begun(builder_of(Chunking.WHOLE), 60.5).fit_credit(sequence(90), HERE, 20.5) == 20


def test_room_that_is_held_counts_from_the_start_and_is_given_back_when_it_is_not_wanted() -> None:
    builder = begun(builder_of(context_s=0.5), 60.5)
    seq = sequence(90)
    builder.defer(PlannedChunk(seq, 8, CONTEXT), 40)
    assert builder.num_tokens == 8 and builder.prefills == [] and builder.loads[0].attention_s == 32.0
    builder.undefer(seq)
    assert builder.is_empty and builder.loads[0] == StepLoad()


def test_what_is_held_takes_what_others_have_left_up_to_what_it_wanted() -> None:
    builder = begun(builder_of(), 60.5)
    first, last = sequence(90, name="first"), sequence(90, name="last")
    builder.defer(PlannedChunk(first, 8, HERE), 12)
    builder.defer(PlannedChunk(last, 4, HERE), 40)
    filled(builder, 4)
    assert builder.add_deferred() == []
    assert [(each.seq.request_id, each.num_tokens) for each in builder.prefills] == [
        ("filler", 4), ("last", 40), ("first", 12)
    ]  # fmt: skip
    assert builder.add_deferred() == [], "each of them once"
    assert builder.num_tokens == 56


def test_what_is_held_keeps_its_part_though_others_have_filled_the_step() -> None:
    builder = begun(builder_of(), 30.5)
    builder.defer(PlannedChunk(sequence(90, name="kept"), 8, HERE), 40)
    builder.defer(PlannedChunk(sequence(90, name="nothing"), 0, HERE), 40)
    filled(builder, 22)
    assert [seq.request_id for seq in builder.add_deferred()] == ["nothing"]
    assert [(each.seq.request_id, each.num_tokens) for each in builder.prefills] == [("filler", 22), ("kept", 8)]


@pytest.mark.parametrize(
    ("chunking", "budget_s", "num_tokens", "is_full"),
    [
        (Chunking.ADAPTIVE, 20.0, 18, False),  # one more takes 19 and twice a half
        (Chunking.ADAPTIVE, 19.9, 18, True),
        (Chunking.ADAPTIVE, 1e6, 99, False),
        (Chunking.ADAPTIVE, 1e6, 100, True),
        (Chunking.FIXED, 1.0, 29, False),
        (Chunking.FIXED, 1e6, 30, True),
        (Chunking.WHOLE, 1.0, 99, False),
        (Chunking.WHOLE, 1e6, 100, True),
    ],
)
def test_a_step_is_full_when_no_rank_can_take_a_token_more(
    chunking: Chunking, budget_s: float, num_tokens: int, is_full: bool
) -> None:
    builder = filled(begun(builder_of(chunking), budget_s), num_tokens)
    assert builder.is_full() == is_full
    both = filled(begun(builder_of(chunking, kvp=2), budget_s), num_tokens, ChunkShard(1, 0))
    assert not both.is_full(), "the first rank is empty"
    assert filled(both, num_tokens, ChunkShard(0, 0)).is_full() == is_full


def test_a_fixed_budget_larger_than_a_step_ends_with_the_step() -> None:
    builder = begun(builder_of(Chunking.FIXED, fixed_tokens=500), 1.0)
    assert not filled(builder, 99).is_full()
    assert filled(begun(builder, 1.0), 100).is_full()


def test_the_share_of_a_chunk_is_what_the_step_would_be_shorter_without_it() -> None:
    builder = begun(builder_of(context_s=0.5, kvp=2), 500.0)
    filled(builder, 9)
    planned = PlannedChunk(sequence(50), 6, (ChunkShard(0, 8), ChunkShard(1, 2)))
    builder.add(planned)
    assert builder.share_s(planned) == 6 + 0.5 + 0.5 * 8 * 6


def test_a_sequence_that_decodes_has_one_token_left() -> None:
    seq = sequence(5, 5, num_output_tokens=1, status=Status.DECODING)
    assert begun(builder_of(), 50.0).fit(seq, HERE) == 1
