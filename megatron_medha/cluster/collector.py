"""From the answers of single ranks to what the scheduler waits for: a batch past its first stage, a batch completed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_medha.cluster.messages import PromptLogprobs, SampledToken, StepDone
from megatron_medha.core.batch import Completed, FirstStageDone
from megatron_medha.core.layout import ParallelLayout


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A completed batch: the event for the scheduler, and what it never sees of it."""

    completed: Completed
    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...]


@dataclass(slots=True)
class _PartialResult:
    num_left: list[int]       # answers to come, by stage
    stage_s: list[float]      # the slowest KVP rank's time, by stage
    held_s: float = 0.0       # the longest that a rank held it
    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class StepCollector:
    """Batches the ranks of one replica have; the ranks with tp index 0 answer for theirs."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._in_flight: dict[int, _PartialResult] = {}

    def __len__(self) -> int:
        return len(self._in_flight)

    def submitted(self, batch_id: int) -> None:
        """A batch went out to all ranks."""
        layout = self._layout
        self._in_flight[batch_id] = _PartialResult([layout.kvp] * layout.spp, [0.0] * layout.spp)

    def expects(self, done: StepDone) -> bool:
        """Whether this answer can be: of a batch in flight, to which that stage has not answered in full."""
        flight = self._in_flight.get(done.batch_id)
        return flight is not None and flight.num_left[self._layout.coord_of(done.rank).spp] > 0

    def take(self, done: StepDone) -> Iterable[FirstStageDone | BatchResult]:
        """Note one rank's answer; what it completes comes back, FirstStageDone before the batch's result.

        With one stage there is no FirstStageDone: Completed says it all.
        """
        flight = self._in_flight.get(done.batch_id)
        assert flight is not None, f"rank {done.rank} answers for batch {done.batch_id}, which is not in flight"
        stage = self._layout.coord_of(done.rank).spp
        flight.num_left[stage] -= 1
        assert flight.num_left[stage] >= 0, f"rank {done.rank} answers twice for batch {done.batch_id}"
        flight.stage_s[stage] = max(flight.stage_s[stage], done.duration_s)
        flight.held_s = max(flight.held_s, done.held_s)
        flight.tokens += done.tokens
        flight.prompt_logprobs += done.prompt_logprobs
        flight.failed.update(done.failed)
        if stage == 0 and self._layout.spp > 1 and not flight.num_left[0]:
            yield FirstStageDone(done.batch_id)
        # An answer of the last stage may overtake one of an earlier stage: they come over different connections.
        if not any(flight.num_left):
            del self._in_flight[done.batch_id]
            stopped = tuple(token.request_id for token in flight.tokens if token.is_stop)
            failed = tuple(flight.failed.items())
            completed = Completed(done.batch_id, sum(flight.stage_s), stopped, failed, held_s=flight.held_s)
            yield BatchResult(completed, tuple(flight.tokens), tuple(flight.prompt_logprobs))

    def clear(self) -> None:
        """The ranks are gone; nothing in flight will be answered."""
        self._in_flight.clear()
