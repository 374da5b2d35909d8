"""Who is overdue longest is found, and who has ended leaves nothing behind, however far its deadline was."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_bench import Bench, request

from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.scheduling import overdue
from megatron_medha.core.scheduling.overdue import OverdueHeap
from megatron_medha.core.scheduling.policies import lars
from megatron_medha.core.scheduling.prefill_queue import PrefillQueue

DAYS_S = 1e6


def sequence(name: str, deadline_s: float = 1.0) -> Sequence:
    return Sequence(request=request(name), deadline_s=deadline_s, total_work_s=1.0)


def test_requests_that_named_a_deadline_days_ahead_are_forgotten_when_they_end() -> None:
    bench = Bench()
    for index in range(600):
        bench.arrive(request(f"r{index}", num_out=1, ttft_slo_s=DAYS_S))
        bench.run()
    bench.assert_empty()
    assert len(bench.scheduler._overdue) <= overdue._MIN_ENTRIES_SWEPT


def test_each_chunk_of_a_long_prompt_takes_the_place_of_the_one_before_among_those_that_may_be_lost() -> None:
    queue = PrefillQueue(lars, is_preemptive=True, num_step_tokens=1)
    seq = sequence("long")
    seq.triage_deadline_s = DAYS_S
    for chunk in range(2000):
        seq.remaining_work_s = 2000.0 - chunk
        queue.add(seq, 0.0)
    assert len(queue._late_heap) <= 256
    list(queue.candidates(DAYS_S - 2.0))
    assert not queue._bucket_of["long"].is_late
    list(queue.candidates(DAYS_S))
    assert queue._bucket_of["long"].is_late


@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.booleans()), min_size=300, max_size=400))
def test_the_longest_overdue_is_the_same_however_many_deadlines_have_been_changed(
    changes: list[tuple[int, int, bool]],
) -> None:
    sequences: dict[str, Sequence] = {}
    found = OverdueHeap(sequences)
    for step, (number, deadline, ends) in enumerate(changes):
        name = f"r{number}"
        if ends and name in sequences:
            sequences.pop(name).move_to(Status.ABORTED)
        else:
            seq = sequences.setdefault(name, sequence(name))
            seq.deadline_s = float(step // 50 + deadline)
            found.add(seq)
        now_s = step // 50 + 4.0
        late = [(seq.deadline_s, seq.request.arrival_s, name) for name, seq in sequences.items()]
        expected = min((entry for entry in late if entry[0] < now_s), default=None)
        longest = found.longest(now_s)
        assert (longest.request_id if longest is not None else None) == (expected[2] if expected is not None else None)


def test_a_prefill_is_overdue_after_its_deadline_not_at_it() -> None:
    seq = sequence("a", deadline_s=3.0)
    found = OverdueHeap({"a": seq})
    found.add(seq)
    assert found.longest(3.0) is None
    assert found.longest(3.1) is seq


def test_one_whose_prompt_is_all_scheduled_is_not_overdue_until_it_is_added_again() -> None:
    seq = sequence("a")
    found = OverdueHeap({"a": seq})
    found.add(seq)
    seq.num_scheduled_tokens = seq.num_known_tokens
    assert found.longest(9.0) is None
    seq.num_scheduled_tokens = 0
    assert found.longest(9.0) is None and len(found) == 0
    found.add(seq)
    assert found.longest(9.0) is seq


def test_of_equal_deadlines_the_earlier_arrival_is_overdue_longer_and_then_the_lower_id() -> None:
    sequences = {
        name: Sequence(request=request(name, at_s=at_s), deadline_s=3.0, total_work_s=1.0)
        for name, at_s in (("a", 2.0), ("c", 1.0), ("b", 1.0))
    }
    found = OverdueHeap(sequences)
    for seq in sequences.values():
        found.add(seq)
    order = []
    while (longest := found.longest(9.0)) is not None:
        order.append(longest.request_id)
        del sequences[longest.request_id]
    assert order == ["b", "c", "a"]


def test_deadlines_that_were_changed_are_swept_when_they_are_many_and_those_that_hold_are_kept() -> None:
    sequences = {name: sequence(name, deadline_s=1e6) for name in ("a", "b")}
    found = OverdueHeap(sequences)
    found.add(sequences["b"])
    for index in range(overdue._MIN_ENTRIES_SWEPT):
        sequences["a"].deadline_s = 1e6 - index
        found.add(sequences["a"])
    assert len(found) == 2
    assert found.longest(1e6 + 1) is sequences["a"]
    del sequences["a"]
    assert found.longest(1e6 + 1) is sequences["b"]


def test_deadlines_of_many_that_live_are_kept_however_many_they_are() -> None:
    sequences = {f"r{index}": sequence(f"r{index}", deadline_s=1e6) for index in range(300)}
    found = OverdueHeap(sequences)
    for seq in sequences.values():
        found.add(seq)
        found.add(seq)
    assert len(found) == 600
