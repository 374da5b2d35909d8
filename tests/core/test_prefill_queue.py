"""The order of candidates over classes, waiting and started prefills."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.policies import fcfs
from megatron_medha.core.scheduling.prefill_queue import PrefillQueue


def sequence(
    name: str, arrival_s: float, priority: int = 0, is_started: bool = False, num_tokens: int = 1
) -> Sequence:
    request = Request(
        request_id=name, num_prompt_tokens=num_tokens, max_output_tokens=1, arrival_s=arrival_s, priority=priority
    )
    seq = Sequence(request=request, deadline_s=1.0, total_work_s=1.0)
    if is_started:
        seq.move_to(Status.PREFILLING)
    return seq


def queue_of(*sequences: Sequence, is_preemptive: bool = True) -> PrefillQueue:
    queue = PrefillQueue(fcfs, is_preemptive, num_step_tokens=100)
    for seq in sequences:
        queue.add(seq, 0.0)
    return queue


def ids(queue: PrefillQueue) -> list[str]:
    return [seq.request_id for seq in queue.candidates(0.0)]


def test_started_and_waiting_prefills_of_a_class_mix_by_policy() -> None:
    assert ids(queue_of(sequence("w1", 1.0), sequence("s2", 2.0, is_started=True), sequence("w3", 3.0))) == [
        "w1", "s2", "w3"
    ]  # fmt: skip


def test_a_lower_class_goes_first_whatever_the_policy_says() -> None:
    assert ids(queue_of(sequence("a", 1.0, priority=1), sequence("b", 9.0, priority=0))) == ["b", "a"]


def test_without_preemption_whoever_has_begun_goes_before_all_classes() -> None:
    queue = queue_of(
        sequence("w", 1.0), sequence("s", 9.0, priority=5, is_started=True), is_preemptive=False
    )
    assert ids(queue) == ["s", "w"]


def test_the_waiting_can_be_left_out_midway() -> None:
    queue = queue_of(sequence("w1", 1.0), sequence("w2", 2.0), sequence("s3", 3.0, is_started=True))
    candidates, seen = queue.candidates(0.0), []
    for seq in candidates:
        seen.append(seq.request_id)
        candidates.exclude_waiting()
    assert seen == ["w1", "s3"]


def test_a_waiting_one_next_in_line_is_left_out_too() -> None:
    queue = queue_of(sequence("s1", 1.0, is_started=True), sequence("w2", 2.0), sequence("s3", 3.0, is_started=True))
    candidates, seen = queue.candidates(0.0), []
    for seq in candidates:
        seen.append(seq.request_id)
        candidates.exclude_waiting()
    assert seen == ["s1", "s3"]


def test_the_large_can_be_left_out_midway() -> None:
    queue = queue_of(*(sequence(f"l{index}", index, num_tokens=101) for index in range(50)), sequence("small", 99.0))
    candidates, seen = queue.candidates(0.0), []
    for seq in candidates:
        seen.append(seq.request_id)
        candidates.exclude_large()
    assert seen == ["l0", "small"]


def test_one_of_which_little_is_left_is_no_longer_large() -> None:
    seq = sequence("a", 0.0, num_tokens=150)
    queue = queue_of(seq)
    queue.discard(seq, 0.0)
    seq.num_scheduled_tokens = 60
    queue.add(seq, 0.0)
    candidates = queue.candidates(0.0)
    candidates.exclude_large()
    assert [seq.request_id for seq in candidates] == ["a"]


def test_one_that_is_discarded_is_gone_and_a_second_time_does_no_harm() -> None:
    seq = sequence("a", 1.0)
    queue = queue_of(seq, sequence("b", 2.0))
    queue.discard(seq, 0.0)
    queue.discard(seq, 0.0)
    assert ids(queue) == ["b"] and len(queue) == 1


def long_one(name: str, arrival_s: float, lost_s: float, **more: Any) -> Sequence:
    """A prompt of two seconds' work and more than a step that is lost from lost_s on."""
    seq = sequence(name, arrival_s, num_tokens=1000, **more)
    seq.remaining_work_s, seq.triage_deadline_s = 2.0, lost_s + 2.0
    return seq


def order(queue: PrefillQueue, now_s: float) -> list[str]:
    return [seq.request_id for seq in queue.candidates(now_s)]


def test_a_long_prefill_whose_deadline_is_lost_goes_behind_those_that_can_be_in_time() -> None:
    queue = queue_of(long_one("lost", 1.0, 5.0), long_one("timely", 2.0, 50.0), sequence("short", 3.0))
    assert order(queue, 5.0) == ["lost", "timely", "short"]
    assert order(queue, 5.1) == ["timely", "short", "lost"]
    assert order(queue, 50.1) == ["short", "lost", "timely"], "among the lost, by remaining work, then arrival"


def test_a_higher_class_goes_first_even_if_it_is_lost() -> None:
    queue = queue_of(long_one("lost", 1.0, 5.0), long_one("batch", 0.0, 50.0, priority=1))
    assert order(queue, 9.0) == ["lost", "batch"]


def test_a_prefill_that_has_made_progress_is_lost_later_than_it_seemed() -> None:
    seq = long_one("a", 1.0, 5.0)
    queue = queue_of(seq, long_one("b", 2.0, 50.0))
    queue.discard(seq, 4.0)
    seq.remaining_work_s = 1.0
    queue.add(seq, 5.5)
    assert order(queue, 5.9) == ["a", "b"]
    assert order(queue, 6.1) == ["b", "a"]


def test_what_ends_within_a_step_is_never_put_back() -> None:
    short = sequence("short", 1.0)
    short.triage_deadline_s = 1.0
    assert order(queue_of(short, long_one("long", 2.0, 50.0)), 9.0) == ["short", "long"]


@pytest.mark.parametrize("lost_s", [5.0, inf])
def test_what_is_gone_or_never_lost_leaves_no_trace(lost_s: float) -> None:
    seq = long_one("a", 1.0, lost_s)
    queue = queue_of(seq)
    queue.discard(seq, 1.0)
    assert order(queue, 9.0) == [] and not len(queue)


def num_lines_run(work: Callable[[], object]) -> int:
    """Lines of Python that `work` runs: its cost, the same on every machine."""
    lines = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def lines_of_an_arrival_and_a_look(priorities: Sequence_[int]) -> int:
    queue = queue_of(*(sequence(f"r{index}", index, priority) for index, priority in enumerate(priorities)))
    next(iter(queue.candidates(0.0)))
    newcomer = sequence("newcomer", 1e6, priority=len(priorities))

    def arrive_and_look() -> None:
        queue.add(newcomer, 0.0)
        next(iter(queue.candidates(0.0)))

    return num_lines_run(arrive_and_look)


def test_thousands_of_different_priorities_cost_what_one_does() -> None:
    assert lines_of_an_arrival_and_a_look(range(4000)) <= 2 * lines_of_an_arrival_and_a_look([0] * 4000)


def test_among_thousands_of_priorities_the_order_is_exact() -> None:
    numbers = [(index * 7919) % 4001 - 2000 for index in range(4001)]
    queue = queue_of(*(sequence(str(number), 0.0, number) for number in numbers))
    assert ids(queue) == [str(number) for number in range(-2000, 2001)]


@dataclass
class Plain:
    """A prefill as it was when it was added."""

    seq: Sequence
    level: int  # of its class
    is_waiting: bool
    is_large: bool
    triage_s: float
    remaining_s: float
    is_late: bool

    def key(self, now_s: float) -> tuple[int, float, float, str]:
        if self.is_large and self.triage_s < now_s:
            self.is_late = True
        value = self.remaining_s if self.is_late else fcfs(self.seq).at(now_s)
        return 2 * self.level + self.is_late, value, self.seq.request.arrival_s, self.seq.request_id


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 49), st.integers(-1, 1), st.booleans(), st.sampled_from([99, 100, 101, 500]),
            st.sampled_from([0.0, 2.0, 5.0, inf]), st.integers(1, 3), st.integers(0, 3),
        ),
        st.tuples(st.just("discard"), st.integers(0, 49)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 1.0, 2.5])),
        st.tuples(st.just("look"), st.integers(0, 60), st.integers(0, 60)),
    ),
    min_size=60,
    max_size=120,
)  # fmt: skip


@settings(max_examples=25)
@given(STEPS, st.booleans())
def test_the_order_is_that_of_a_sort_by_class_lateness_policy_arrival_and_id(
    steps: list[tuple[Any, ...]], is_preemptive: bool
) -> None:
    queue, plain, now_s = PrefillQueue(fcfs, is_preemptive, num_step_tokens=100), {}, 0.0
    for kind, *values in steps:
        if kind == "add":
            number, priority, is_started, num_tokens, ahead_s, remaining_s, arrival_s = values
            name = f"r{number:02}"
            seq = plain[name].seq if name in plain else sequence(name, arrival_s, priority, is_started, num_tokens)
            if name in plain and is_started and seq.is_waiting:
                seq.move_to(Status.PREFILLING)
            seq.remaining_work_s, seq.triage_deadline_s = float(remaining_s), now_s + ahead_s + remaining_s
            queue.add(seq, now_s)
            is_first = not seq.is_waiting and not is_preemptive
            plain[name] = Plain(
                seq, -(2**40) if is_first else seq.request.priority, seq.is_waiting,
                seq.request.num_prompt_tokens > 100, seq.triage_s, seq.remaining_work_s, False,
            )  # fmt: skip
        elif kind == "discard":
            name = f"r{values[0]:02}"
            queue.discard(plain.pop(name).seq if name in plain else sequence(name, 0.0), now_s)
        elif kind == "wait":
            now_s += values[0]
        else:
            waiting_left_out_at, large_left_out_at = values
            expected = []
            for each in sorted(plain.values(), key=lambda each: each.key(now_s)):
                is_out = each.is_waiting and len(expected) > waiting_left_out_at
                if not is_out and not (each.is_large and len(expected) > large_left_out_at):
                    expected.append(each.seq.request_id)
            candidates, found = queue.candidates(now_s), []
            assert len(candidates) == len(plain)
            for seq in candidates:
                found.append(seq.request_id)
                if len(found) > waiting_left_out_at:
                    candidates.exclude_waiting()
                if len(found) > large_left_out_at:
                    candidates.exclude_large()
            assert found == expected
        assert len(queue) == len(plain)
