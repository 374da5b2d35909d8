"""What a batch that overtakes does to all that is on its way through the stages."""

from __future__ import annotations

import io
import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.sim.held_batches import InterruptiblePipeline, Passage
from megatron_medha.sim.pipeline import StepTimes
from megatron_medha.stats.decision_log import DecisionLog, read_log
from megatron_medha.stats.explanation import WaitReason, explain_request
from megatron_medha.stats.timeline import StageSpan, Timeline

SWITCH_S = 0.001
SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=100_000,
)  # fmt: skip
# Of the 50 ms of a step 20 are spent on nothing: chunks of a step's budget are a bad bargain.
COST = RooflineCost(
    shape=SHAPE, hardware=Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10, step_overhead_s=2e-2)
)


def batch(number: int, *, overtakes: int | None = None, may_be_held: bool = False, num_tokens: int = 100) -> Batch:
    chunk = Chunk(f"r{number}", 0, num_tokens, False)
    return Batch(number, (chunk,), (), 0.0, 1.0, 1.0, (), overtakes, may_be_held)


def pipeline(spp: int = 1, kvp: int = 1) -> InterruptiblePipeline:
    return InterruptiblePipeline(spp, kvp, None, (4,) * spp, lambda num_tokens: SWITCH_S)


def times(*stage_s: float) -> StepTimes:
    return StepTimes((stage_s,))


def test_a_batch_that_overtakes_begins_at_the_next_point_and_the_held_one_ends_later_by_it() -> None:
    stages = pipeline()
    stages.enter(batch(0, may_be_held=True), times(1.0), 0.0)
    moved = {one.batch.batch_id: one for one in stages.enter(batch(1, overtakes=0), times(0.05), 0.304)}
    assert moved[1].start_s[0][0] == pytest.approx(0.31), "a layer takes 250 ms, so points are 10 ms apart"
    assert moved[1].done_s == pytest.approx(0.36)
    assert moved[0].done_s == pytest.approx(1.0 + 0.05 + SWITCH_S)
    assert moved[0].held_s == [pytest.approx(0.05 + SWITCH_S)]


def test_a_batch_that_may_not_be_held_is_waited_for() -> None:
    stages = pipeline()
    stages.enter(batch(0), times(1.0), 0.0)
    moved = {one.batch.batch_id: one for one in stages.enter(batch(1, overtakes=0), times(0.05), 0.3)}
    assert (moved[0].done_s, moved[1].done_s) == (1.0, 1.05)


def test_on_every_stage_whatever_large_batch_is_there_is_held() -> None:
    stages = pipeline(spp=2)
    stages.enter(batch(0, may_be_held=True), times(1.0, 1.0), 0.0)
    stages.enter(batch(1, may_be_held=True), times(1.0, 1.0), 1.0)
    moved = {one.batch.batch_id: one for one in stages.enter(batch(2, overtakes=0), times(0.1, 0.1), 1.5)}
    assert moved[2].done_s == pytest.approx(1.5 + 0.1 + 0.1, abs=0.02)
    assert [moved[0].held_s[1], moved[1].held_s[0]] == [pytest.approx(0.1 + SWITCH_S)] * 2
    assert moved[0].held_s[0] == moved[1].held_s[1] == 0.0
    assert moved[1].start_s[1][0] == pytest.approx(2.0 + 0.1 + SWITCH_S), "the one behind is later, too"


def test_ranks_that_share_a_request_are_held_together() -> None:
    stages = pipeline(kvp=2)
    shared = StepTimes(((1.0,), (0.8,)), tied=((0, 1),))
    stages.enter(Batch(0, (Chunk("r", 0, 9, False, (0, 1)),), (), 0.0, 1.0, 1.0, (), None, True), shared, 0.0)
    moved = {one.batch.batch_id: one for one in stages.enter(batch(1, overtakes=0), StepTimes(((0.1,), ())), 0.5)}
    assert list(moved[0].end_s[0].values()) == [pytest.approx(1.1 + SWITCH_S)] * 2


@given(st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_a_stage_computes_one_batch_at_a_time_and_every_batch_as_long_as_it_takes(spp: int, seed: int) -> None:
    draw, stages, seen, now_s = Random(seed), pipeline(spp), {}, 0.0
    took_s: dict[int, tuple[float, ...]] = {}
    overtaking: Passage | None = None
    for number in range(12):
        in_flight = list(stages.passages.values())
        can_overtake = bool(in_flight) and (overtaking is None or overtaking.done_s <= now_s)
        is_overtaking = can_overtake and draw.random() < 0.5
        if is_overtaking:
            now_s += draw.uniform(0.0, 0.3)
        else:
            now_s = max(now_s, stages.first_stage_free_s)
        for one in in_flight:
            if one.done_s <= now_s:
                stages.leave(one.batch.batch_id)
        oldest = min(stages.passages, default=number)
        is_overtaking = is_overtaking and oldest < number
        took_s[number] = tuple(draw.uniform(0.001, 0.05 if is_overtaking else 0.5) for _ in range(spp))
        new = batch(number, overtakes=oldest if is_overtaking else None, may_be_held=draw.random() < 0.7)
        if is_overtaking:
            new = new._replace(may_be_held=False)
        elif stages.first_stage_free_s > now_s:
            continue
        for one in stages.enter(new, times(*took_s[number]), now_s):
            seen[one.batch.batch_id] = one
        if is_overtaking:
            overtaking = seen[number]
    for stage in range(spp):
        ordinary = [one for one in seen.values() if one.batch.overtakes is None]
        spans = sorted((one.start_s[stage][0], one.end_s[stage][0], one.batch.batch_id) for one in ordinary)
        assert [number for _, _, number in spans] == sorted(number for _, _, number in spans)
        assert all(end <= start + 1e-9 for (_, end, _), (start, _, _) in zip(spans, spans[1:], strict=False))
        held_s = dict.fromkeys(seen, 0.0)
        for one in seen.values():
            own_s = one.end_s[stage][0] - one.start_s[stage][0] - one.held_s[stage]
            assert own_s == pytest.approx(took_s[one.batch.batch_id][stage])
            assert stage == 0 or one.start_s[stage][0] >= one.end_s[stage - 1][0] - 1e-9
            if one.batch.overtakes is None:
                continue
            start, end = one.start_s[stage][0], one.end_s[stage][0]
            for other_start, other_end, number in spans:
                if start < other_end - 1e-9 and other_start + 1e-9 < end:
                    assert other_start - 1e-9 <= start and end <= other_end + 1e-9, "within one, or beside all"
                    assert seen[number].batch.may_be_held
                    held_s[number] += end - start + SWITCH_S
        assert all(seen[number].held_s[stage] == pytest.approx(seconds) for number, seconds in held_s.items())


def run(interruptible: bool, spp: int = 1) -> tuple[RecordingSimRuntime, str, str, Scheduler]:
    """A long prompt, and short ones beside it."""
    requests = [Request(request_id="long", num_prompt_tokens=5000, max_output_tokens=4, arrival_s=0.0)]
    requests += [
        Request(request_id=f"s{i}", num_prompt_tokens=20, max_output_tokens=8, arrival_s=0.11 + 0.13 * i)
        for i in range(8)
    ]
    log, trace = io.StringIO(), io.StringIO()
    timeline = Timeline(trace, spp=spp, kvp=1, rank_name="rank", start_s=0.0, end_s=1e9)
    stages = InterruptiblePipeline(spp, 1, timeline.span, (2,) * spp, lambda num_tokens: SWITCH_S)
    world = RecordingSimRuntime(requests, true_step_s(COST), spp, pipeline=stages if interruptible else None)
    scheduler = make(interruptible, spp)
    world.wakes_at_s = scheduler.wakes_at_s
    serve(scheduler, world, (timeline, DecisionLog(log, {"config": {}})))
    timeline.close()
    return world, log.getvalue(), trace.getvalue(), scheduler


def make(interruptible: bool, spp: int) -> Scheduler:
    memory = KVMemory(num_blocks=20_000, block_size=4, max_context_len=SHAPE.max_context_len)
    return Scheduler(SchedulerConfig(interruptible=interruptible), COST, memory, spp)


@pytest.mark.parametrize("spp", [1, 2])
def test_a_long_prompt_is_faster_in_large_chunks_and_short_ones_wait_no_longer(spp: int) -> None:
    (without, *_), (with_, *_) = run(False, spp), run(True, spp)
    assert with_.records["long"].ttft_s < (0.9 if spp == 1 else 0.97) * without.records["long"].ttft_s
    worst = [max(one.ttft_s for name, one in world.records.items() if name != "long") for world in (without, with_)]
    assert worst[1] <= worst[0] + 0.01 * spp, "longer at most by the time to the next point, on each stage"


def test_an_explanation_says_when_a_request_was_held_and_when_it_overtook() -> None:
    _, log, _, _ = run(True)
    _, records = read_log(log.splitlines())
    found = explain_request(records, make(True, 1), "long")
    assert found is not None
    held = [phase for phase in found.phases if phase.why is WaitReason.HELD]
    assert held and any(phase.ahead for phase in held)
    _, records = read_log(log.splitlines())
    short = explain_request(records, make(True, 1), "s0")
    assert short is not None and [phase.num_overtaking for phase in short.phases] == [1]


def test_a_timeline_has_tracks_for_batches_that_overtake_and_says_how_long_others_were_held() -> None:
    _, _, trace, _ = run(True)
    events = json.loads(trace)["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {"stage 0", "stage 0, overtaking"}
    slices = [event for event in events if event["ph"] == "X"]
    held = [one for one in slices if "held_ms" in one["args"]]
    overtaking = [one for one in slices if one["tid"] == 1]
    assert held and overtaking
    assert {one["args"]["overtakes"] for one in overtaking} <= {one["args"]["batch"] for one in held}


def test_spans_of_a_pipeline_come_when_their_batch_has_left() -> None:
    spans: list[StageSpan] = []
    stages = InterruptiblePipeline(1, 1, spans.append, (1,), lambda num_tokens: SWITCH_S)
    stages.enter(batch(0, may_be_held=True), times(1.0), 0.0)
    stages.enter(batch(1, overtakes=0), times(0.1), 0.2)
    assert not spans
    stages.leave(1)
    stages.leave(0)
    assert [span.batch_id for span in spans] == [1, 0]
    assert spans[1].held_s == pytest.approx(0.1 + SWITCH_S)
