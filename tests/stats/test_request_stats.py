"""What a request's moments mean, and how they add up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Chunk,
    Completed,
    FinishReason,
    Output,
    Preempted,
    Rejected,
    TokenOut,
)
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending, RequestStats, RequestTracker
from megatron_medha.stats.slo_targets import DeadlineMisses, Slo
from megatron_medha.stats.summary import GapCounts, LengthClasses, Summary, percentile
from megatron_medha.stats.summary_table import summary_table


def outcome(
    ttft_s: float | None = 0.2, num_out: int = 11, tpot_s: float = 0.05, ending: Ending = Ending.FINISHED,
    **more: object,
) -> RequestStats:  # fmt: skip
    request = Request(
        request_id="r", num_prompt_tokens=int(more.pop("num_prompt", 100)), max_output_tokens=num_out, arrival_s=10.0
    )
    first_s = None if ttft_s is None else 10.0 + ttft_s
    return RequestStats(
        request=request,
        ending=ending,
        first_scheduled_s=10.1,
        first_token_s=first_s,
        last_token_s=None if first_s is None else first_s + (num_out - 1) * tpot_s,
        num_tokens_out=0 if first_s is None else num_out,
        **{"isolated_s": 0.1, "execution_s": 0.5, **more},
    )


def test_latencies_are_those_of_the_field() -> None:
    one = outcome()
    assert one.ttft_s == pytest.approx(0.2)
    assert one.tpot_s == pytest.approx(0.05)
    assert one.e2e_s == pytest.approx(0.7)
    assert one.normalized_s == pytest.approx(0.7 / 11)
    assert one.scheduling_delay_s == pytest.approx(0.1)
    assert one.preempted_s == pytest.approx(0.1)
    assert one.slowdown == pytest.approx(2.0)


def test_a_single_token_has_no_tpot_and_meets_every_target_for_it() -> None:
    one = outcome(num_out=1)
    assert one.tpot_s is None
    assert Slo(tpot_s=1e-6).is_met(one)


@pytest.mark.parametrize(
    ("ttft_s", "isolated_s", "is_met"),
    [(0.49, 0.1, True), (0.51, 0.1, False), (1.49, 1.0, True), (1.51, 1.0, False)],
)
def test_the_deadline_is_a_multiple_of_the_time_alone_but_never_below_half_a_second(
    ttft_s: float, isolated_s: float, is_met: bool
) -> None:
    assert Slo().is_met(outcome(ttft_s, isolated_s=isolated_s)) is is_met


@pytest.mark.parametrize("ending", [Ending.REJECTED, Ending.ABORTED, Ending.UNFINISHED])
def test_who_does_not_finish_meets_nothing(ending: Ending) -> None:
    assert not Slo().is_met(outcome(ending=ending))


def test_every_target_that_is_set_counts() -> None:
    one = outcome(ttft_s=0.2, tpot_s=0.05)
    assert Slo(ttft_s=0.3, tpot_s=0.06, e2e_s=0.8).is_met(one)
    assert not Slo(ttft_s=0.1).is_met(one)
    assert not Slo(tpot_s=0.04).is_met(one)
    assert not Slo(e2e_s=0.6).is_met(one)
    assert not Slo(tbt_s=0.1).is_met(outcome(deadline_miss_rate=0.2))


def test_one_long_stall_is_as_many_misses_as_deadlines_passed_meanwhile() -> None:
    misses = DeadlineMisses(tbt_s=0.05)
    misses.first_token(0.5, 0.5)
    misses.next_token(2.02)
    assert (misses.num_missed, misses.num_deadlines) == (40, 41)


def test_early_tokens_make_up_for_late_ones() -> None:
    misses = DeadlineMisses(tbt_s=0.05)
    misses.first_token(0.4, 0.5)
    misses.next_token(0.14)
    assert misses.rate == 0.0
    misses.next_token(0.07)
    assert misses.num_missed == 1


def test_a_late_first_token_misses_its_own_deadline_and_those_of_the_tokens_after_it() -> None:
    misses = DeadlineMisses(tbt_s=0.1)
    misses.first_token(0.85, 0.5)
    assert (misses.num_missed, misses.num_deadlines) == (4, 4)


def test_percentiles_are_interpolated_as_numpy_does() -> None:
    numpy = pytest.importorskip("numpy")
    values = sorted(random.Random(0).random() for _ in range(101))
    for percent in (0, 1, 37.5, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)), rel=1e-12)


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=200))
def test_percentiles_of_gaps_are_within_half_a_bin_of_a_sample(gaps_s: list[float]) -> None:
    counts = GapCounts()
    for gap_s in gaps_s:
        counts.add(gap_s)
    for percent in (50, 90, 99):
        found = counts.percentile(percent)
        rank = int(percent / 100.0 * (len(gaps_s) - 1))
        exact = sorted(gaps_s)[rank]
        assert found is not None and exact * 0.9949 <= found <= exact * 1.0051
    assert counts.max_s == max(gaps_s)


def test_classes_are_the_papers() -> None:
    classes = LengthClasses()
    assert [classes.of(n) for n in (1, 8191, 8192, 100_000, 100_001)] == ["short", "short", "medium", "medium", "long"]


def test_classes_that_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match="classes.short_below=10"):
        LengthClasses(short_below=10, long_above=5)


def test_attainment_counts_everybody_who_came() -> None:
    summary = Summary(LengthClasses(), Slo())
    for one in (
        outcome(), outcome(ttft_s=0.9), outcome(ttft_s=None, ending=Ending.REJECTED),
        outcome(num_prompt=200_000, isolated_s=10.0, ttft_s=14.0),
    ):
        summary.add(one)
    values = summary.as_values()
    assert values["classes"]["short"]["attainment"] == pytest.approx(1 / 3)
    assert values["classes"]["long"]["attainment"] == 1.0
    assert values["all"]["attainment"] == pytest.approx(0.5)
    assert values["all"]["num_rejected"] == 1
    assert values["duration_s"] == pytest.approx(14.5)
    assert values["all"]["goodput_per_s"] == pytest.approx(2 / 14.5)


def test_the_table_fits_a_terminal_and_names_every_class() -> None:
    summary = Summary(LengthClasses(), Slo())
    for num_prompt in (100, 50_000, 200_000):
        summary.add(outcome(num_prompt=num_prompt))
    text = summary_table(summary.as_values())
    assert all(name in text for name in ("short", "medium", "long", "TTFT", "meet the SLO"))
    assert max(map(len, text.splitlines())) <= 130


def chunk(request_id: str, start: int, num_tokens: int, *, samples: bool = False) -> Chunk:
    return Chunk(request_id, start, num_tokens, samples)


class Tracked:
    """A tracker fed with what a scheduler would say, and what it passes on."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self.tracker = RequestTracker(
            lambda request: RequestStats(request=request) if request.num_prompt_tokens < 1000 else None,
            on_chunk=lambda stats, chunk, now_s: self.heard.append(("chunk", stats.num_computed_before(chunk), now_s)),
            on_first_token=lambda stats, now_s: self.heard.append(("first", now_s)),
            on_preempted=lambda stats, num_tokens, now_s: self.heard.append(("preempted", num_tokens, now_s)),
            on_end=lambda stats, outcome, now_s: self.heard.append((outcome, now_s)),
        )

    def arrive(self, request_id: str, num_tokens: int = 100) -> RequestStats | None:
        request = Request(request_id=request_id, num_prompt_tokens=num_tokens, max_output_tokens=5, arrival_s=0.0)
        self.tracker.handled(Arrived(request), [], 0.0)
        return self.tracker.live.get(request_id)

    def schedule(self, now_s: float, *chunks: Chunk) -> None:
        self.tracker.scheduled(Batch(0, chunks, (), now_s, 0.05, 0.05), now_s)

    def complete(self, now_s: float, *outputs: Output, failed: tuple[tuple[str, str], ...] = ()) -> None:
        self.tracker.handled(Completed(0, 0.05, failed=failed), outputs, now_s)


def test_a_request_is_followed_from_its_first_chunk_to_its_end_through_a_preemption() -> None:
    tracked = Tracked()
    stats = tracked.arrive("a")
    assert stats is not None
    tracked.schedule(1.0, chunk("a", 0, 60))
    tracked.schedule(2.0, chunk("other", 7, 1), chunk("a", 60, 40, samples=True))
    tracked.complete(3.0, TokenOut("a", 0, None))
    tracked.schedule(4.0, chunk("a", 100, 1, samples=True))  # a decode is nothing to write down
    tracked.complete(5.0, TokenOut("a", 0, None), Preempted("a", 101))
    assert stats.num_scheduled_tokens == 0
    tracked.schedule(6.0, chunk("a", 0, 102, samples=True))
    tracked.complete(7.0, TokenOut("a", 0, FinishReason.LENGTH))
    tracked.tracker.handled(Aborted("a"), [], 8.0)
    assert tracked.heard == [
        ("chunk", 0, 1.0), ("chunk", 0, 2.0), ("first", 3.0), ("preempted", 101, 5.0), ("chunk", 101, 6.0),
        ("length", 7.0),
    ]  # fmt: skip
    assert (stats.first_scheduled_s, stats.first_token_s, stats.ending) == (1.0, 3.0, Ending.FINISHED)
    assert (stats.num_preemptions, stats.num_tokens_lost, stats.num_ever_scheduled) == (1, 101, 102)
    assert not tracked.tracker.live


def test_every_other_end_is_told_once_with_its_reason() -> None:
    tracked = Tracked()
    gone, failed, refused = (tracked.arrive(name) for name in ("gone", "failed", "refused"))
    assert tracked.arrive("untracked", 2000) is None
    tracked.tracker.handled(Aborted("gone"), [], 1.0)
    tracked.complete(2.0, Rejected("failed", "bad", False), failed=(("failed", "bad"),))
    tracked.complete(3.0, Rejected("refused", "too long", True), Rejected("untracked", "too long", True))
    assert tracked.heard == [("aborted", 1.0), ("failed: bad", 2.0), ("rejected: too long", 3.0)]
    assert [one and (one.ending, one.why) for one in (gone, failed, refused)] == [
        (Ending.ABORTED, None), (Ending.REJECTED, "bad"), (Ending.REJECTED, "too long"),
    ]  # fmt: skip
