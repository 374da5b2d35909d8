"""The timeline of real ranks, for Perfetto: their steps as the front hears of them, and their requests' phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_medha.cluster.messages import StepDone
from megatron_medha.core.batch import Aborted, Arrived, Batch, Event, Output, Rejected, TokenOut
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.stats.outcome import Ending, Outcome
from megatron_medha.stats.timeline import StageSpan, Timeline
from megatron_medha.system.best_effort_file import BestEffortFile


class RunTimeline:
    """An Observer that is also told of every step a rank has done.

    A step ends when the front hears of it: the clocks of other machines are not compared with ours. A rank's work
    began as long before as it says it took.
    """

    def __init__(self, timeline: Timeline, layout: ParallelLayout) -> None:
        self._timeline = timeline
        self._layout = layout
        self._requests: dict[str, Request] = {}  # that have not ended
        self._first_scheduled_s: dict[str, float] = {}
        self._first_token_s: dict[str, float] = {}

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
        self._timeline.span(StageSpan(done.batch_id, coord.spp, coord.kvp, now_s - done.duration_s, now_s))

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """See Observer."""
        self._timeline.handled(event, outputs, now_s)
        match event:
            case Arrived(request):
                self._requests[request.request_id] = request
            case Aborted(request_id):
                self._end(request_id, Ending.ABORTED, now_s)
            case _:
                pass
        for output in outputs:
            match output:
                case TokenOut(request_id, _, finish_reason):
                    self._first_token_s.setdefault(request_id, now_s)
                    if finish_reason is not None:
                        self._end(request_id, Ending.FINISHED, now_s)
                case Rejected(request_id=request_id):
                    self._end(request_id, Ending.REJECTED, now_s)
                case _:
                    pass

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """See Observer."""
        self._timeline.scheduled(batch, now_s)
        for chunk in batch.chunks:
            self._first_scheduled_s.setdefault(chunk.request_id, now_s)

    def _end(self, request_id: str, ending: Ending, now_s: float) -> None:
        request = self._requests.pop(request_id, None)
        first_scheduled_s = self._first_scheduled_s.pop(request_id, None)
        first_token_s = self._first_token_s.pop(request_id, None)
        if request is not None:  # an Aborted may come after the end
            self._timeline.ended(
                Outcome(
                    request=request, ending=ending, first_scheduled_s=first_scheduled_s, first_token_s=first_token_s,
                    last_token_s=now_s,
                )  # fmt: skip
            )
