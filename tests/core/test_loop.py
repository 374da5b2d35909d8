"""The one loop, with a scheduler and a world of cardboard."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.core.batch import Aborted, Batch, Event, Output, TokenOut
from megatron_medha.core.loop import serve


def batch(batch_id: int) -> Batch:
    return Batch(batch_id=batch_id, chunks=(), released=(), created_s=0.0, budget_s=1.0, predicted_s=1.0)


class Paper:
    """Decisions, Runtime and Observer in one: notes every call in order."""

    def __init__(self, num_events: int, num_rooms: int, num_batches: int) -> None:
        self.calls: list[str] = []
        self.num_events, self.num_rooms, self.num_batches = num_events, num_rooms, num_batches

    def now_s(self) -> float:
        return 1.5

    def next_event(self) -> Event | None:
        self.num_events -= 1
        return Aborted("a") if self.num_events >= 0 else None

    def has_room(self) -> bool:
        self.num_rooms -= 1
        return self.num_rooms >= 0

    def handle(self, event: Event, now_s: float) -> list[Output]:
        self.calls.append(f"handle {now_s}")
        return [TokenOut("a", 0, None)]

    def schedule(self, now_s: float) -> Batch | None:
        self.num_batches -= 1
        self.calls.append(f"schedule {now_s}")
        return batch(self.num_batches) if self.num_batches >= 0 else None

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        self.calls.append("handled")

    def scheduled(self, batch: Batch, now_s: float) -> None:
        self.calls.append(f"scheduled {batch.batch_id}")

    def emit(self, output: Output) -> None:
        self.calls.append("emit")

    def submit(self, batch: Batch) -> None:
        self.calls.append(f"submit {batch.batch_id}")


def test_an_event_is_handled_observed_and_answered_before_batches_are_made() -> None:
    world = Paper(num_events=1, num_rooms=9, num_batches=1)
    serve(world, world, (world,))
    assert world.calls == [
        "handle 1.5", "handled", "emit", "schedule 1.5", "scheduled 0", "submit 0", "schedule 1.5"
    ]  # fmt: skip


def test_nothing_is_scheduled_into_a_world_without_room() -> None:
    world = Paper(num_events=2, num_rooms=0, num_batches=5)
    serve(world, world)
    assert world.calls == ["handle 1.5", "emit"] * 2


def test_a_world_with_room_for_two_gets_two_batches() -> None:
    world = Paper(num_events=1, num_rooms=2, num_batches=5)
    serve(world, world)
    assert [call for call in world.calls if call.startswith("submit")] == ["submit 4", "submit 3"]


def test_a_world_that_has_ended_is_not_asked_again() -> None:
    world = Paper(num_events=0, num_rooms=5, num_batches=5)
    serve(world, world)
    assert world.calls == []
