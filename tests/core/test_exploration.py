"""Whatever happens in whatever order to a few requests, no block is lost or shared by mistake, no request is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exploration import FOUR, Broken, Explorer
from explored_state import Bounds, Script

from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.prefix_index import PrefixIndex
from megatron_medha.core.kv.segment import Holding, Segment
from megatron_medha.core.kv.segment_forest import SegmentForest
from megatron_medha.core.kv.sequence import Sequence
from megatron_medha.core.scheduling.scheduler import Scheduler

THREE = Bounds(
    {"A": Script("pab", 3, 4), "B": Script("pcd", 3, 4), "C": Script("ef", 3, 1)},
    num_blocks=2, num_failures=0, num_losses=0, num_late=0,
)  # fmt: skip


def test_three_requests_of_which_two_begin_alike_are_explored_to_the_end() -> None:
    explorer = Explorer(THREE)
    assert explorer.run(max_states=20_000), "there is nothing left to look at"
    explorer.check_waits()
    assert min(explorer.num_hits, explorer.num_evictions, explorer.num_preemptions) > 0


@pytest.mark.parametrize("eviction", ["value", "ttl"])
def test_sessions_that_go_on_and_end_are_explored_to_the_end(eviction: str) -> None:
    scripts = {
        "A": Script("pab", 3, 2, session="s"), "B": Script("pabc", 5, 2, session="s", ends_session=True),
        "C": Script("ef", 3, 1),
    }  # fmt: skip
    explorer = Explorer(Bounds(scripts, num_blocks=2, num_aborts=0, num_failures=0, num_losses=0, eviction=eviction))
    assert explorer.run(max_states=40_000), "there is nothing left to look at"
    explorer.check_waits()
    assert min(explorer.num_hits, explorer.num_evictions) > 0


@pytest.mark.parametrize(
    ("spp", "num_aborts", "num_losses"),
    [
        (1, 0, 0), (2, 0, 0),
        pytest.param(1, 1, 1, marks=pytest.mark.slow), pytest.param(2, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_batches_that_are_held_while_others_overtake_are_explored_to_the_end(
    spp: int, num_aborts: int, num_losses: int
) -> None:
    bounds = replace(
        THREE, spp=spp, num_blocks=4, num_losses=num_losses, num_aborts=num_aborts, interruptible=True
    )  # fmt: skip
    explorer = Explorer(bounds)
    assert explorer.run(max_states=60_000), "there is nothing left to look at"
    explorer.check_waits()
    assert min(explorer.num_overtakings, explorer.num_hits) > 0


def test_who_waits_for_what_another_computes_is_never_lost() -> None:
    scripts = {"A": Script("pqab", 7, 1), "B": Script("pqac", 7, 1)}
    explorer = Explorer(Bounds(scripts, num_blocks=4, num_aborts=2, num_late=0))
    assert explorer.run(max_states=20_000), "there is nothing left to look at"
    explorer.check_waits()
    assert explorer.num_sibling_waits > 0


def test_an_exploration_goes_on_from_a_file_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole, first, rest = Explorer(THREE), Explorer(THREE), Explorer(THREE)
    whole.run(max_states=6_000)
    first.run(max_states=2_000)
    first.save(tmp_path / "states")
    rest.resume(tmp_path / "states")
    rest.run(max_states=6_000)
    assert rest.progress() == whole.progress()
    assert (rest.index_of, rest.actions, rest.drains) == (whole.index_of, whole.actions, whole.drains)
    assert rest.check_waits() == whole.check_waits()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_states_of_four_requests_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    explorer = Explorer(Bounds(FOUR))

    def report(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    explorer.run(max_states=1_000_000, report=report)
    report(f"{explorer.progress()}; at most {explorer.check_waits()} events to the end of all")
    assert len(explorer.index_of) >= 1_000_000
    counts = explorer.num_hits, explorer.num_evictions, explorer.num_preemptions, explorer.num_sibling_waits
    assert min(counts) > 1000


def test_a_request_that_computes_again_and_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    restart = Scheduler._restart

    def restart_from_the_prompt(self: Scheduler, seq: Sequence, now_s: float) -> None:
        seq.num_output_tokens, seq.keys = 0, seq.request.prefix_keys
        restart(self, seq, now_s)

    monkeypatch.setattr(Scheduler, "_restart", restart_from_the_prompt)
    monkeypatch.setattr(KVMemory, "grow", lambda self, seq: False)
    monkeypatch.setattr("megatron_medha.core.scheduling.scheduler.victim", lambda memory, seq, *rest: seq)
    explorer = Explorer(replace(THREE, num_aborts=0))
    with pytest.raises(Broken, match="never ends|events for"):
        explorer.run(max_states=20_000)
        explorer.check_waits()


def test_an_eviction_that_ignores_pins_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = SegmentForest.pin

    def pin_evictable(self: SegmentForest, segment: Segment) -> None:
        was_leaf = bool(segment.ticket)
        pin(self, segment)
        if was_leaf:
            self.file(segment)

    monkeypatch.setattr(SegmentForest, "pin", pin_evictable)
    with pytest.raises(Broken):
        Explorer(THREE).run(max_states=20_000)


def test_a_preempted_request_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    restart = Scheduler._restart

    def restart_forgetting(self: Scheduler, seq: Sequence, now_s: float) -> None:
        restart(self, seq, now_s)
        self._prefills.discard(seq, now_s)

    monkeypatch.setattr(Scheduler, "_restart", restart_forgetting)
    with pytest.raises(Broken, match="is lost"):
        Explorer(THREE).run(max_states=20_000)


def test_a_duplicate_that_is_not_freed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own_extents: Callable[..., list[Extent]] = PrefixIndex.own_extents

    def without_duplicates(self: PrefixIndex, holding: Holding, extents: list[Extent]) -> list[Extent]:
        duplicates, holding.duplicates = holding.duplicates, []
        own = own_extents(self, holding, extents)
        holding.duplicates = duplicates
        return own

    monkeypatch.setattr(PrefixIndex, "own_extents", without_duplicates)
    with pytest.raises(Broken, match="exactly once"):
        Explorer(replace(THREE, num_blocks=4)).run(max_states=20_000)


def test_a_request_that_is_never_begun_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Callable[..., Any] = KVMemory.plan

    def plan_once(self: KVMemory, seq: Sequence) -> Any:
        return None if seq.num_preemptions else plan(self, seq)

    monkeypatch.setattr(KVMemory, "plan", plan_once)
    with pytest.raises(Broken, match="nothing runs"):
        Explorer(THREE).run(max_states=20_000)
