"""Stages and KVP ranks as resources."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.stats.timeline import StageSpan


def run(pipeline: Pipeline, *steps: StepTimes) -> list[float]:
    """Each enters as soon as stage 0 is free."""
    return [
        round(pipeline.run(index, times, pipeline.first_stage_free_s), 9) for index, times in enumerate(steps)
    ]


def test_batches_follow_each_other_through_the_stages() -> None:
    assert run(Pipeline(spp=2), *[StepTimes(((1.0, 1.0),))] * 3) == [2.0, 3.0, 4.0]


def test_the_slowest_stage_sets_the_pace() -> None:
    assert run(Pipeline(spp=2), *[StepTimes(((1.0, 3.0),))] * 3) == [4.0, 7.0, 10.0]


def test_hops_delay_a_batch_and_occupy_no_stage() -> None:
    assert run(Pipeline(spp=2), *[StepTimes(((1.0, 1.0),), (0.5,))] * 3) == [2.5, 3.5, 4.5]


def test_ranks_that_share_nothing_do_not_wait_for_each_other() -> None:
    pipeline = Pipeline(spp=2, kvp=2)
    run(pipeline, StepTimes(((1.0, 1.0), (3.0, 3.0))))
    spans: list[StageSpan] = []
    pipeline = Pipeline(spp=2, kvp=2, on_span=spans.append)
    run(pipeline, StepTimes(((1.0, 1.0), (3.0, 3.0))))
    assert {(span.stage, span.kvp_rank): span.end_s for span in spans} == {
        (0, 0): 1.0, (1, 0): 2.0, (0, 1): 3.0, (1, 1): 6.0
    }  # fmt: skip
    assert pipeline.first_stage_free_s == 3.0


def test_ranks_that_share_a_request_go_at_the_pace_of_the_slowest() -> None:
    spans: list[StageSpan] = []
    pipeline = Pipeline(spp=2, kvp=3, on_span=spans.append)
    end_s = pipeline.run(0, StepTimes(((1.0, 1.0), (3.0, 3.0), (0.5, 0.5)), tied=((0, 1),)), 0.0)
    ends = {(span.stage, span.kvp_rank): span.end_s for span in spans}
    assert ends[0, 0] == ends[0, 1] == 3.0 and ends[1, 0] == ends[1, 1] == end_s == 6.0
    assert ends[1, 2] == 1.0
    assert pipeline.busy_s[0] == [1.0, 3.0, 0.5]


def test_a_rank_without_work_is_left_alone() -> None:
    pipeline = Pipeline(spp=1, kvp=2)
    assert pipeline.run(0, StepTimes(((2.0,), ())), 1.0) == 3.0
    assert pipeline.busy_s == [[2.0, 0.0]]


@given(st.lists(st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)), min_size=1, max_size=20), st.floats(0, 1))
def test_one_rank_of_several_is_the_same_as_one_rank(steps: list[tuple[float, float]], hop_s: float) -> None:
    alone = run(Pipeline(spp=2), *[StepTimes((seconds,), (hop_s,)) for seconds in steps])
    beside = run(Pipeline(spp=2, kvp=2), *[StepTimes((seconds, ()), (hop_s,)) for seconds in steps])
    assert alone == pytest.approx(beside)


def test_the_duration_of_a_step_is_that_of_its_slowest_rank_with_its_hops() -> None:
    assert StepTimes(((1.0, 2.0), (4.0, 0.5), ()), (0.25,)).duration_s == 4.75
