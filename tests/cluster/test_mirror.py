"""Ranks receive what they do not know yet, and nothing twice."""

from __future__ import annotations

from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.cluster.rank_state import RankStateCache
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp, append_op, drop_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling


def describe(request_id: str) -> NewRequest:
    return NewRequest(request_id, b"", 1, Sampling(max_output_tokens=1))


def batch(*chunks: Chunk, kv_ops: tuple[KVOp, ...] | None = None, released: tuple[str, ...] = ()) -> Batch:
    """Of chunks that all begin with blocks on their ranks, where no other operations are given."""
    if kv_ops is None:
        kv_ops = tuple(append_op(one.request_id, rank, [Extent(0, 1)]) for one in chunks for rank in one.kvp_ranks)
    return Batch(
        batch_id=0, chunks=chunks, released=released, created_s=0.0, budget_s=1.0, predicted_s=1.0, kv_ops=kv_ops
    )


def chunk(request_id: str, *kvp_ranks: int) -> Chunk:
    return Chunk(request_id, 0, 1, True, kvp_ranks)


def new_ids(step: RankStep) -> list[str]:
    return [new.request_id for new in step.new_requests]


def test_a_request_is_described_to_each_kvp_rank_with_its_first_blocks_there() -> None:
    mirror = RankStateCache(ParallelLayout(kvp=2), describe)
    first = mirror.steps(batch(chunk("a", 0), chunk("b", 1)))
    assert [new_ids(step) for step in first] == [["a"], ["b"]]
    assert [[part.request_id for part in step.chunks] for step in first] == [["a"], ["b"]]
    grown = mirror.steps(batch(chunk("a", 0, 1), kv_ops=(append_op("a", 1, [Extent(4, 1)]),)))
    assert [new_ids(step) for step in grown] == [[], ["a"]]
    ahead = mirror.steps(batch(chunk("c", 0), kv_ops=(append_op("c", 0, ()), append_op("c", 1, ()))))
    assert [new_ids(step) for step in ahead] == [["c"], ["c"]], "its blocks for later shards come at once"


def test_operations_go_to_the_rank_they_are_for_and_drops_to_all() -> None:
    mirror = RankStateCache(ParallelLayout(kvp=2), describe)
    here, there, drop = append_op("a", 0, [Extent(0, 1)]), append_op("b", 1, [Extent(0, 1)]), drop_op("c")
    steps = mirror.steps(batch(chunk("a", 0), chunk("b", 1), kv_ops=(drop, there, here)))
    assert [step.kv_ops for step in steps] == [(drop, here), (drop, there)]


def test_sampled_tokens_go_once_to_those_who_know_the_request() -> None:
    mirror = RankStateCache(ParallelLayout(kvp=2), describe)
    mirror.steps(batch(chunk("a", 0), chunk("b", 0, 1)))
    mirror.sampled("a", 7)
    mirror.sampled("b", 8)
    steps = mirror.steps(batch())
    assert [step.sampled for step in steps] == [(("a", 7), ("b", 8)), (("b", 8),)]
    assert all(not step.sampled for step in mirror.steps(batch()))


def test_a_single_rank_is_told_no_token_since_it_samples_them() -> None:
    mirror = RankStateCache(ParallelLayout(), describe)
    mirror.steps(batch(chunk("a", 0)))
    mirror.sampled("a", 7)
    assert mirror.steps(batch())[0].sampled == ()


def test_a_released_request_is_forgotten_and_its_id_may_come_again() -> None:
    mirror = RankStateCache(ParallelLayout(tp=2), describe)
    mirror.steps(batch(chunk("a", 0)))
    mirror.sampled("a", 7)
    (step,) = mirror.steps(batch(chunk("a", 0), released=("a",)))
    assert new_ids(step) == ["a"] and step.sampled == () and step.released == ("a",)


def test_ranks_that_came_up_empty_are_told_everything_again() -> None:
    mirror = RankStateCache(ParallelLayout(spp=2), describe)
    mirror.steps(batch(chunk("a", 0)))
    mirror.sampled("a", 7)
    mirror.clear()
    (step,) = mirror.steps(batch(chunk("a", 0)))
    assert new_ids(step) == ["a"] and step.sampled == ()
