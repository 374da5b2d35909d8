"""When idle OpenMP threads have to sleep, and computing ones let others go first."""

from __future__ import annotations

import os
import threading

import pytest

from megatron_medha.worker.startup.cpu_share import give_way, num_threads_of_rank, set_passive_omp_wait


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_medha.worker.startup.cpu_share.num_usable_cores", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")


@pytest.mark.parametrize(("num_threads", "policy"), [(1, None), (2, "PASSIVE"), (4, "PASSIVE")])
def test_threads_sleep_when_they_fill_every_core(num_threads: int, policy: str | None) -> None:
    set_passive_omp_wait(num_threads)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_threads_may_spin_where_a_core_is_left_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_medha.worker.startup.cpu_share.num_usable_cores", lambda: 8)
    set_passive_omp_wait(7)
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_policy_of_the_user_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    set_passive_omp_wait(2)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(("wanted", "num_ranks", "num_threads"), [(None, 1, 2), (None, 2, 1), (None, 8, 1), (4, 2, 4)])
def test_ranks_share_the_cores_unless_told_otherwise(wanted: int | None, num_ranks: int, num_threads: int) -> None:
    assert num_threads_of_rank(wanted, num_ranks) == num_threads


def test_ranks_on_other_machines_take_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert num_threads_of_rank(None, 2) == 2


@pytest.mark.parametrize(("num_threads", "num_ranks", "is_nicer"), [(2, 1, True), (1, 2, True), (1, 1, False)])
def test_threads_that_fill_all_cores_let_others_go_first(num_threads: int, num_ranks: int, is_nicer: bool) -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    found: list[int] = []

    def compute() -> None:
        give_way(num_threads, num_ranks)
        begun = threading.Thread(target=lambda: found.append(nice()))
        begun.start()
        begun.join()
        found.append(nice())

    before = nice()
    thread = threading.Thread(target=compute)  # Linux: a thread has its own
    thread.start()
    thread.join()
    assert nice() == before
    assert [each > before for each in found] == [is_nicer] * 2 or before == 19
