"""The timeline of real ranks, for Perfetto: their steps as the API server hears of them, and their requests' phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_medha.cluster.messages import StepDone
from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.stats.request_stats import RequestStats, RequestTracker
from megatron_medha.stats.timeline import StageSpan, Timeline
from megatron_medha.system.best_effort_file import BestEffortFile


class RunTimeline:
    """An Observer that is also told of every step a rank has done.

    A step ends when the API server hears of it: the clocks of other machines are not compared with ours. A rank's work
    began as long before as it says it took.
    """

    def __init__(self, timeline: Timeline, layout: ParallelLayout) -> None:
        self._timeline = timeline
        self._layout = layout
        self._requests = RequestTracker(lambda request: RequestStats(request=request), on_end=self._ended)

    @classmethod
    @contextmanager
    def writing(cls, path: Path, layout: ParallelLayout, now_s: float, duration_s: float) -> Iterator[RunTimeline]:
        """A timeline in a file, which is complete when the context ends. Raises ConfigError."""
        try:
            stream = BestEffortFile.open(path, by_line=False)
        except OSError as error:
            raise ConfigError(f"tracking.timeline={path}: cannot be written ({error.strerror})") from error
        with closing(stream):
            timeline = Timeline(
                stream, spp=layout.spp, kvp=layout.kvp, rank_name="KVP rank", start_s=now_s, end_s=now_s + duration_s,
                zero_s=now_s,
            )  # fmt: skip
            try:
                yield cls(timeline, layout)
            finally:
                timeline.close()

    def step_done(self, done: StepDone, now_s: float) -> None:
        """A rank's answer has come, before the batch it belongs to is handled as completed."""
        coord = self._layout.coord_of(done.rank)
        if coord.tp:
            return  # the first of its tensor-parallel ranks, which end together, stands for all
        start_s = now_s - done.duration_s - done.held_s
        self._timeline.span(StageSpan(done.batch_id, coord.spp, coord.kvp, start_s, now_s, done.held_s))

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        self._timeline.handled(event, outputs, now_s)
        self._requests.handled(event, outputs, now_s)

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self._timeline.scheduled(batch, now_s)
        self._requests.scheduled(batch, now_s)

    def _ended(self, stats: RequestStats, outcome: str, now_s: float) -> None:
        stats.last_token_s = now_s  # whatever ended it: its last phase ends here
        self._timeline.ended(stats)
