"""Answers of single ranks, in any order that connections allow, become the events the scheduler waits for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.cluster.collector import BatchResult, StepCollector
from megatron_medha.cluster.messages import SampledToken, StepDone
from megatron_medha.core.batch import FirstStageDone
from megatron_medha.core.layout import Coord, ParallelLayout

DEGREES = st.integers(1, 3)


@given(st.data())
def test_any_interleaving_gives_first_stages_before_results_and_results_in_order(data: st.DataObject) -> None:
    layout = ParallelLayout(tp=data.draw(DEGREES), spp=data.draw(DEGREES), kvp=data.draw(DEGREES))
    speakers = [rank for rank in range(layout.world_size) if layout.coord_of(rank).tp == 0]
    num_batches = data.draw(st.integers(1, 4))
    collector = StepCollector(layout)
    for batch_id in range(num_batches):
        collector.submitted(batch_id)
    # Each rank answers in order; between ranks anything goes.
    order = data.draw(st.permutations([rank for rank in speakers for _ in range(num_batches)]))
    answered = dict.fromkeys(speakers, 0)
    events: list[FirstStageDone | BatchResult] = []
    for rank in order:
        coord = layout.coord_of(rank)
        tokens = (SampledToken(f"on-{coord.kvp}", 5),) if coord.spp == layout.spp - 1 else ()
        duration_s = float(1 + coord.kvp)  # the highest kvp rank is the slowest of each stage
        events += collector.take(StepDone(answered[rank], rank, duration_s, tokens))
        answered[rank] += 1
    results = [event for event in events if isinstance(event, BatchResult)]
    assert [result.completed.batch_id for result in results] == list(range(num_batches))
    assert all(result.completed.duration_s == layout.spp * layout.kvp for result in results)
    assert all({token.request_id for token in result.tokens} == {f"on-{kvp}" for kvp in range(layout.kvp)}
               for result in results)
    first_stages = [event.batch_id for event in events if isinstance(event, FirstStageDone)]
    assert first_stages == (list(range(num_batches)) if layout.spp > 1 else [])
    for batch_id in first_stages:
        assert events.index(FirstStageDone(batch_id)) < events.index(results[batch_id])
    assert not len(collector)


def test_a_request_that_failed_on_two_ranks_fails_once_and_a_stop_token_is_told() -> None:
    layout = ParallelLayout(kvp=2)
    collector = StepCollector(layout)
    collector.submitted(3)
    assert not list(collector.take(StepDone(3, 0, 0.1, (SampledToken("a", 2, True),), failed=(("b", "why"),))))
    (result,) = collector.take(StepDone(3, 1, 0.2, failed=(("b", "why"),)))
    assert isinstance(result, BatchResult)
    assert result.completed.stopped == ("a",) and result.completed.failed == (("b", "why"),)


def test_an_answer_for_a_batch_nobody_sent_is_a_bug() -> None:
    collector = StepCollector(ParallelLayout())
    with pytest.raises(AssertionError, match="batch 7"):
        list(collector.take(StepDone(7, 0, 0.1)))


def test_a_second_answer_of_the_same_rank_is_a_bug() -> None:
    layout = ParallelLayout(spp=2)
    collector = StepCollector(layout)
    collector.submitted(0)
    rank = layout.rank_of(Coord(0, 0, 0, 0))
    list(collector.take(StepDone(0, rank, 0.1)))
    with pytest.raises(AssertionError, match="twice"):
        list(collector.take(StepDone(0, rank, 0.1)))
