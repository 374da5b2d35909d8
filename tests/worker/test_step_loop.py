"""The order in which a rank takes, computes and answers steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from megatron_medha.cluster.messages import RankStep, Shutdown, StepDone, ToRank
from megatron_medha.worker.step_loop import run_steps


class FakeRank:
    """Notes what is asked of it; while it computes a step, it looks for others once, as between two layers."""

    def __init__(self, log: list[str], *, receives: bool, answers: bool, num_ahead: int = 0) -> None:
        self.log, self.receives, self.answers = log, receives, answers
        self.num_ahead = num_ahead  # times that something surely follows
        self.take_arrived: Callable[[], None] = lambda: None
        self._announced: deque[RankStep] = deque()

    @property
    def num_queued_steps(self) -> int:
        return len(self._announced)

    def announce(self, step: RankStep) -> None:
        self.log.append(f"announce {step.batch_id}")
        self._announced.append(step)

    def run_ahead(self) -> bool:
        self.num_ahead -= 1
        if self.num_ahead >= 0:
            self.log.append("run ahead")
        return self.num_ahead >= 0

    def compute(self) -> StepDone:
        step = self._announced.popleft()
        self.log.append(f"compute {step.batch_id}")
        if self.receives:
            self.take_arrived()
        return StepDone(step.batch_id, 0, 0.0)

    def finish(self) -> None:
        self.log.append("finish")


class FakeInbox:
    """Messages that are there only once a rank has begun to compute the step named with them."""

    def __init__(self, log: list[str], messages: list[tuple[str | None, ToRank]]) -> None:
        self._log, self._messages = log, deque(messages)

    def wait(self) -> ToRank | None:
        return self._messages.popleft()[1] if self._messages else None

    def poll(self) -> ToRank | None:
        if self._messages and (self._messages[0][0] is None or self._messages[0][0] in self._log):
            return self._messages.popleft()[1]
        return None


def log_of(messages: list[tuple[str | None, ToRank]], **of_rank: Any) -> list[str]:
    log: list[str] = []
    rank: Any = FakeRank(log, **{"receives": False, "answers": True, **of_rank})
    run_steps(rank, FakeInbox(log, messages), lambda done: log.append(f"answer {done.batch_id}"))
    assert log.pop() == "finish"  # however it ends: the next stage must get what was sent to it
    return log


STREAM = [(None, RankStep(1, ())), ("compute 1", RankStep(2, ())), ("answer 2", Shutdown())]


def test_a_later_stage_hears_of_the_next_step_while_it_computes_one() -> None:
    assert log_of(STREAM, receives=True) == [
        "announce 1", "compute 1", "announce 2", "answer 1", "compute 2", "answer 2"
    ]  # fmt: skip


def test_the_first_stage_looks_for_the_next_step_when_it_has_done_one() -> None:
    assert log_of(STREAM) == ["announce 1", "compute 1", "answer 1", "announce 2", "compute 2", "answer 2"]


@pytest.mark.parametrize("receives", [False, True])
def test_steps_that_came_before_the_end_are_computed(receives: bool) -> None:
    messages = [(None, RankStep(1, ())), (None, RankStep(2, ())), (None, Shutdown()), (None, RankStep(3, ()))]
    log = log_of(messages, receives=receives)
    assert log == ["announce 1", "announce 2", "compute 1", "answer 1", "compute 2", "answer 2"]


def test_a_rank_whose_front_is_gone_ends() -> None:
    assert log_of([]) == []


def test_only_the_speaker_of_a_tensor_parallel_group_answers() -> None:
    assert log_of([(None, RankStep(1, ()))], answers=False) == ["announce 1", "compute 1"]


def test_a_rank_runs_ahead_once_it_has_answered_and_looks_for_messages_then() -> None:
    messages = [(None, RankStep(1, ())), ("run ahead", RankStep(2, ())), ("answer 2", Shutdown())]
    assert log_of(messages, num_ahead=1) == [
        "announce 1", "compute 1", "answer 1", "run ahead", "announce 2", "compute 2", "answer 2"
    ]  # fmt: skip


def test_a_step_that_has_come_is_not_made_to_wait_for_what_may_follow() -> None:
    log = log_of([(None, RankStep(1, ())), ("compute 1", RankStep(2, ())), ("answer 2", Shutdown())], num_ahead=9)
    assert "run ahead" not in log
