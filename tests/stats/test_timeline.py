"""Slices of a trace file never overlap the one before on their track: viewers drop those that do."""

from __future__ import annotations

import io
import json
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.stats.timeline import StageSpan, Timeline

SECONDS = st.floats(0.0, 100_000.0)


def slices_of(text: str) -> dict[tuple[int, int], list[tuple[Decimal, Decimal]]]:
    """Start and end of the complete events of every track, to the digit written."""
    tracks: dict[tuple[int, int], list[tuple[Decimal, Decimal]]] = {}
    for event in json.loads(text, parse_float=Decimal)["traceEvents"]:
        if event["ph"] == "X":
            spans = tracks.setdefault((event["pid"], event["tid"]), [])
            spans.append((Decimal(event["ts"]), Decimal(event["ts"]) + Decimal(event["dur"])))
    return tracks


def written(spans: list[StageSpan]) -> str:
    stream = io.StringIO()
    timeline = Timeline(stream, spp=2, kvp=1, rank_name="rank", start_s=0.0, end_s=1e9)
    for span in spans:
        chunk = Chunk(request_id="r", start=0, num_tokens=5, samples_token=False, kvp_ranks=(0,))
        batch = Batch(span.batch_id, (chunk,), (), span.start_s, 1.0, 1.0)
        timeline.scheduled(batch, span.start_s)
        timeline.span(span)
    timeline.close()
    return stream.getvalue()


@given(SECONDS, st.lists(st.floats(1e-9, 3.0), min_size=2, max_size=30))
def test_slices_that_follow_each_other_share_their_border(start_s: float, durations_s: list[float]) -> None:
    spans, at_s = [], start_s
    for number, duration_s in enumerate(durations_s):
        spans.append(StageSpan(number, 0, 0, at_s, at_s + duration_s))
        at_s += duration_s
    (track,) = slices_of(written(spans)).values()
    assert len(track) == len(durations_s)
    for (_, end), (start, _) in zip(track, track[1:], strict=False):
        assert start == end


@given(st.lists(st.tuples(st.integers(0, 1), SECONDS, st.floats(0.0, 2.0)), min_size=1, max_size=30))
def test_whatever_ranks_say_of_their_times_no_two_slices_overlap(told: list[tuple[int, float, float]]) -> None:
    told.sort(key=lambda one: one[1])  # as their answers come; they took what their own clocks say
    spans = [StageSpan(number, stage, 0, end_s - took_s, end_s) for number, (stage, end_s, took_s) in enumerate(told)]
    for track in slices_of(written(spans)).values():
        assert all(start <= end for start, end in track)
        for (_, end), (start, _) in zip(track, track[1:], strict=False):
            assert end <= start
