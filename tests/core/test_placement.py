"""Where a request is placed among replicas."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.scheduling.placement import ReplicaLoad, choose_replica, predicted_finish_s

SECONDS = st.floats(0.0, 1e4)
LOADS = st.builds(ReplicaLoad, st.booleans(), SECONDS, SECONDS, st.floats(0.0, 3.0))


def load(remaining_s: float = 0.0, prompt_s: float = 1.0, decode_share: float = 0.0, ready: bool = True) -> ReplicaLoad:
    return ReplicaLoad(ready, remaining_s, prompt_s, decode_share)


def test_a_request_goes_where_its_prompt_is_done_first() -> None:
    assert choose_replica([load(5.0), load(2.0), load(3.0)]) == 1


def test_a_replica_with_more_work_but_a_faster_machine_may_be_done_first() -> None:
    assert choose_replica([load(1.0, prompt_s=4.0), load(2.0, prompt_s=1.0)]) == 1


def test_replicas_with_equal_prospects_are_taken_in_order() -> None:
    assert choose_replica([load(), load(), load()]) == 0


def test_decodes_that_take_half_of_every_step_double_the_wait() -> None:
    assert predicted_finish_s(load(1.0, 1.0, 0.5)) == 2 * predicted_finish_s(load(1.0, 1.0))
    assert choose_replica([load(decode_share=0.3), load(decode_share=0.1)]) == 1


def test_a_replica_that_recovers_gets_nothing_while_another_is_ready() -> None:
    assert choose_replica([load(ready=False), load(100.0)]) == 1
    assert choose_replica([load(2.0, ready=False), load(1.0, ready=False)]) == 1


@given(st.lists(LOADS, min_size=1, max_size=8))
def test_nobody_who_may_be_chosen_would_be_done_earlier(loads: list[ReplicaLoad]) -> None:
    chosen = choose_replica(loads)
    candidates = [entry for entry in loads if entry.is_ready] or loads
    assert loads[chosen] in candidates
    assert predicted_finish_s(loads[chosen]) == min(map(predicted_finish_s, candidates))


def test_decodes_that_take_more_than_nine_tenths_of_every_step_count_as_nine_tenths() -> None:
    assert predicted_finish_s(load(1.0, 1.0, 0.9)) == predicted_finish_s(load(1.0, 1.0, 3.0)) == 2.0 / (1.0 - 0.9)


def test_among_equals_the_lowest_index_is_taken_behind_one_that_is_not_ready() -> None:
    assert choose_replica([load(ready=False), load(3.0), load(3.0)]) == 1
