"""Virtual time: what happens when, in a simulated replica."""

from __future__ import annotations

import pytest

from experiments.lib.recording_runtime import RecordingSimRuntime, true_step_s
from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Chunk,
    Completed,
    FinishReason,
    FirstStageDone,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=10_000,
)  # fmt: skip
COST = RooflineCost(shape=SHAPE, hardware=Hardware(name="slow", flops_per_s=1e9, memory_bytes_per_s=1e10))


def request(name: str, at_s: float = 0.0, num_tokens: int = 10, num_out: int = 3) -> Request:
    return Request(request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=num_out, arrival_s=at_s)


def batch(batch_id: int, *chunks: Chunk) -> Batch:
    chunks = chunks or (Chunk("a", 0, 10, True),)
    return Batch(batch_id=batch_id, chunks=chunks, released=(), created_s=0.0, budget_s=1.0, predicted_s=1.0)


def events_of(world: RecordingSimRuntime) -> list[tuple[float, object]]:
    seen = []
    while (event := world.next_event()) is not None:
        seen.append((world.now_s(), event))
    return seen


def test_events_come_in_the_order_of_their_time_and_equal_times_as_they_were_pushed() -> None:
    world = RecordingSimRuntime([request("late", 2.0), request("early", 1.0)], lambda batch: 1.0)
    world.abort(1.0, "early")
    assert [(at_s, type(event)) for at_s, event in events_of(world)] == [(1.0, Arrived), (1.0, Aborted), (2.0, Arrived)]


def test_a_batch_on_one_stage_takes_its_true_time_and_blocks_the_next() -> None:
    world = RecordingSimRuntime([request("a")], lambda batch: 0.5)
    world.next_event()
    assert world.has_room()
    world.submit(batch(0))
    assert not world.has_room()
    assert events_of(world) == [(0.5, Completed(batch_id=0, duration_s=0.5))]
    assert world.has_room()


def test_a_batch_moves_through_the_stages_and_the_next_follows_it() -> None:
    world = RecordingSimRuntime([request("a")], lambda batch: 0.4, spp=2)
    world.next_event()
    world.submit(batch(0))
    assert not world.has_room()
    assert world.next_event() == FirstStageDone(0) and world.now_s() == pytest.approx(0.2)
    assert world.has_room()
    world.submit(batch(1))
    times_s = [(round(at_s, 9), event) for at_s, event in events_of(world)]
    assert times_s == [
        (0.4, Completed(batch_id=0, duration_s=0.4)),
        (0.4, FirstStageDone(1)),
        (0.6, Completed(batch_id=1, duration_s=0.4)),
    ]


def test_a_quick_batch_waits_for_the_slow_one_ahead_of_it() -> None:
    durations_s = iter([1.0, 0.2])
    world = RecordingSimRuntime([request("a")], lambda batch: next(durations_s), spp=2)
    world.next_event()
    world.submit(batch(0))
    world.next_event()
    world.submit(batch(1))
    assert [event for _, event in events_of(world) if isinstance(event, Completed)] == [
        Completed(batch_id=0, duration_s=1.0), Completed(batch_id=1, duration_s=0.2)
    ]  # fmt: skip
    assert world.now_s() == pytest.approx(1.1)


def test_lost_ranks_complete_nothing_and_are_free_at_once() -> None:
    world = RecordingSimRuntime([request("a")], lambda batch: 1.0, spp=2)
    world.lose_ranks(0.3)
    world.next_event()
    world.submit(batch(0))
    assert isinstance(world.next_event(), RanksLost) and world.now_s() == 0.3
    assert world.has_room() and world.next_event() is None


def test_the_record_of_a_request_is_what_its_client_saw() -> None:
    world = RecordingSimRuntime([request("a", 1.0), request("b", 1.0)], lambda batch: 1.0)
    world.next_event()
    world.emit(TokenOut("a", 0, None))
    world.emit(Preempted("a", 7))
    world.emit(TokenOut("a", 1, FinishReason.STOP))
    world.emit(Rejected("b", "too long", is_client_fault=True))
    record = world.records["a"]
    assert (record.token_times_s, record.finish_reason, record.num_tokens_lost) == ([1.0, 1.0], FinishReason.STOP, 7)
    assert record.ttft_s == 0.0 and world.records["b"].rejection == "too long"


def test_the_outcome_of_a_batch_can_be_chosen() -> None:
    world = RecordingSimRuntime(
        [request("a")],
        lambda batch: 1.0,
        outcome=lambda batch, duration_s: Completed(
            batch_id=batch.batch_id, duration_s=duration_s, stopped=tuple(chunk.request_id for chunk in batch.chunks)
        ),
    )
    memory = KVMemory(num_blocks=100, block_size=4, max_context_len=1000)
    serve(Scheduler(SchedulerConfig(), COST, memory), world)
    assert world.records["a"].finish_reason is FinishReason.STOP and len(world.records["a"].token_times_s) == 1


def test_the_truth_of_a_cost_model_is_what_the_scheduler_predicts_by_it() -> None:
    errors = []
    for kvp, shard_tokens in ((1, None), (2, 400)):
        truth = true_step_s(COST, kvp, shard_tokens or 1600)

        def check(batch: Batch, truth=truth) -> float:
            errors.append(abs(truth(batch) - batch.predicted_s))
            return truth(batch)

        requests = [request("long", num_tokens=700, num_out=5), *(request(f"r{i}", 0.01 * i) for i in range(9))]
        memory = KVMemory(
            num_blocks=400, block_size=4, max_context_len=1000, kvp=kvp, max_tokens_per_shard=shard_tokens
        )
        serve(Scheduler(SchedulerConfig(), COST, memory), RecordingSimRuntime(requests, check))
    # Decodes over several shards count themselves once per shard, which is the only difference.
    assert max(errors) <= 1e-6


def test_two_simulations_of_the_same_input_are_equal() -> None:
    def times_s() -> dict[str, list[float]]:
        requests = [request(f"r{i}", 0.003 * i, num_tokens=5 + 37 * i % 400, num_out=5) for i in range(40)]
        world = RecordingSimRuntime(requests, true_step_s(COST), spp=2)
        memory = KVMemory(num_blocks=500, block_size=4, max_context_len=1000)
        serve(Scheduler(SchedulerConfig(), COST, memory, 2), world)
        return {name: record.token_times_s for name, record in world.records.items()}

    assert times_s() == times_s()
