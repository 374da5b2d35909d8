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
