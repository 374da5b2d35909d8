"""Ranks are told what they do not know yet, and nothing twice."""

from __future__ import annotations

from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.cluster.rank_state import RankStateCache
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling


def describe(request_id: str) -> NewRequest:
    return NewRequest(request_id, b"", 1, Sampling(max_output_tokens=1))


def batch(*chunks: Chunk, released: tuple[str, ...] = ()) -> Batch:
    return Batch(batch_id=0, chunks=chunks, released=released, created_s=0.0, budget_s=1.0, predicted_s=1.0)


def chunk(request_id: str, *kvp_ranks: int) -> Chunk:
    return Chunk(request_id, 0, 1, True, kvp_ranks)


def new_ids(step: RankStep) -> list[str]:
    return [new.request_id for new in step.new_requests]


def test_a_request_is_described_to_each_kvp_rank_with_its_first_chunk_there() -> None:
    mirror = RankStateCache(ParallelLayout(kvp=2), describe)
    first = mirror.steps(batch(chunk("a", 0), chunk("b", 1)))
    assert [new_ids(step) for step in first] == [["a"], ["b"]]
    assert [[part.request_id for part in step.chunks] for step in first] == [["a"], ["b"]]
    onboarding = mirror.steps(batch(chunk("a", 0, 1)))
    assert [new_ids(step) for step in onboarding] == [[], ["a"]]


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
