"""A pipeline whose batches may be held: one that overtakes takes its turn on every stage at the next point.

An ordinary batch goes through as in Pipeline. For one that overtakes, the times of all that is on the way are laid out
again: what has begun on a stage stays, and all the rest follows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf

from megatron_medha.core.batch import Batch
from megatron_medha.sim.pipeline import Pipeline, StepTimes
from megatron_medha.stats.timeline import StageSpan

_MAX_POINT_S = 0.01  # between two points of a batch at which ranks look for another, at most


@dataclass(slots=True, eq=False)
class Passage:
    """A batch on its way through the stages. Times by stage and KVP rank, of ranks that have a part in it."""

    batch: Batch
    times: StepTimes
    entered_s: float
    start_s: list[dict[int, float]] = field(default_factory=list)
    end_s: list[dict[int, float]] = field(default_factory=list)
    held_s: list[float] = field(default_factory=list)  # by stage

    @property
    def left_first_stage_s(self) -> float:
        """When it leaves the first stage."""
        return max(self.end_s[0].values())

    @property
    def done_s(self) -> float:
        """When it leaves the last one."""
        return max(self.end_s[-1].values())


class InterruptiblePipeline(Pipeline):
    """See the module. At most one batch that overtakes is in it at a time.

    num_layers: of each stage; points are between layers, and within longer ones.
    switch_s: for how long a stage is busy with holding a batch of so many tokens and going on with it.
    """

    def __init__(
        self, spp: int, kvp: int, on_span: Callable[[StageSpan], None] | None, num_layers: tuple[int, ...],
        switch_s: Callable[[int], float],
    ) -> None:  # fmt: skip
        super().__init__(spp, kvp, self._note)
        self._on_final_span = on_span
        self._num_layers = num_layers
        self._switch_s = switch_s
        self._noted: list[StageSpan] = []
        self.passages: dict[int, Passage] = {}  # by batch id, in order
        self.num_overtakings = 0
        self.switched_s = 0.0  # of all stages together

    def clear(self, now_s: float) -> None:
        """See Pipeline."""
        super().clear(now_s)
        self.passages.clear()

    def enter(self, batch: Batch, times: StepTimes, now_s: float) -> list[Passage]:
        """Enter a batch now; it and all whose times have changed come back."""
        passage = self.passages[batch.batch_id] = Passage(batch, times, now_s)
        if batch.overtakes is not None:
            self._busy(times)
            return self._overtake(passage, now_s)
        self.run(batch.batch_id, times, now_s)
        passage.held_s = [0.0] * self.spp
        passage.start_s = [{} for _ in range(self.spp)]
        passage.end_s = [{} for _ in range(self.spp)]
        for span in self._noted:
            passage.start_s[span.stage][span.kvp_rank] = span.start_s
            passage.end_s[span.stage][span.kvp_rank] = span.end_s
        self._noted.clear()
        return [passage]

    def leave(self, batch_id: int) -> Passage:
        """A batch has left the last stage: its times are final."""
        passage = self.passages.pop(batch_id)
        if self._on_final_span is not None:
            for stage, ends_s in enumerate(passage.end_s):
                for rank, end_s in ends_s.items():
                    start_s, held_s = passage.start_s[stage][rank], passage.held_s[stage]
                    self._on_final_span(StageSpan(batch_id, stage, rank, start_s, end_s, held_s))
        return passage

    def _note(self, span: StageSpan) -> None:
        self._noted.append(span)

    def _busy(self, times: StepTimes) -> None:
        for rank, seconds in enumerate(times.stage_s):
            for stage, stage_s in enumerate(seconds):
                self.busy_s[stage][rank] += stage_s

    # ---- overtaking ----

    def _overtake(self, overtaking: Passage, now_s: float) -> list[Passage]:
        self.num_overtakings += 1
        others = [passage for passage in self.passages.values() if passage is not overtaking]
        ranks = [rank for rank, seconds in enumerate(overtaking.times.stage_s) if seconds]
        ready_s, took_s = now_s, [max(seconds[stage] for seconds in overtaking.times.stage_s if seconds)
                                  for stage in range(self.spp)]  # fmt: skip
        hops_s = overtaking.times.hops_s
        for stage in range(self.spp):
            start_s = self._lay_out(stage, others, ranks, ready_s, took_s[stage], now_s)
            end_s = start_s + took_s[stage]
            overtaking.start_s.append(dict.fromkeys(ranks, start_s))
            overtaking.end_s.append(dict.fromkeys(ranks, end_s))
            overtaking.held_s.append(0.0)
            for rank in ranks:
                self._free_s[stage][rank] = max(self._free_s[stage][rank], end_s)
            ready_s = end_s + (hops_s[stage] if hops_s and stage < self.spp - 1 else 0.0)
        self.first_stage_free_s = max(self._free_s[0])
        return [*others, overtaking]

    def _lay_out(
        self, stage: int, others: list[Passage], ranks: list[int], ready_s: float, took_s: float, now_s: float
    ) -> float:
        """Times of all others on a stage, with a batch among them that is ready then; when that one starts."""
        free_s = [-inf] * self.kvp
        start_s: float | None = None
        for passage in others:
            starts_s, ends_s = passage.start_s[stage], passage.end_s[stage]
            has_begun = min(starts_s.values()) <= now_s
            shared = [rank for rank in ranks if rank in starts_s]
            if not has_begun:
                self._follow(passage, stage, free_s)
                if start_s is None and shared and ready_s < min(starts_s[rank] for rank in shared):
                    start_s = max(ready_s, *(free_s[rank] for rank in ranks))
                    for rank in ranks:
                        free_s[rank] = start_s + took_s
                    self._follow(passage, stage, free_s)
            if start_s is None and shared and ready_s < max(ends_s[rank] for rank in shared):
                start_s = self._hold(passage, stage, shared, ready_s, took_s)
            for rank, end_s in ends_s.items():
                free_s[rank] = max(free_s[rank], end_s)
                self._free_s[stage][rank] = free_s[rank]
        return max(ready_s, *(free_s[rank] for rank in ranks)) if start_s is None else start_s

    def _follow(self, passage: Passage, stage: int, free_s: list[float]) -> None:
        """A batch that has not begun on a stage: it does when it has left the one before and its ranks are free."""
        times, starts_s = passage.times, passage.start_s[stage]
        hop_s = times.hops_s[stage - 1] if times.hops_s and stage else 0.0
        took_s = {rank: times.stage_s[rank][stage] for rank in starts_s}
        for rank in starts_s:
            ready_s = passage.end_s[stage - 1][rank] + hop_s if stage else passage.entered_s
            starts_s[rank] = max(ready_s, free_s[rank])
        for group in times.tied:
            latest_s, longest_s = max(starts_s[rank] for rank in group), max(took_s[rank] for rank in group)
            for rank in group:
                starts_s[rank], took_s[rank] = latest_s, longest_s
        for rank, start_s in starts_s.items():
            passage.end_s[stage][rank] = start_s + took_s[rank] + passage.held_s[stage]

    def _hold(self, passage: Passage, stage: int, shared: list[int], ready_s: float, took_s: float) -> float | None:
        """Hold a batch at its next point, on all its ranks; None if it ends first, or cannot be held."""
        if not passage.batch.may_be_held:
            return None
        start_s, end_s = max(passage.start_s[stage][rank] for rank in shared), max(passage.end_s[stage].values())
        layer_s = max(end_s - start_s - passage.held_s[stage], 1e-9) / self._num_layers[stage]
        point_s = layer_s / ceil(layer_s / _MAX_POINT_S)
        run_s = max(0.0, ready_s - start_s - passage.held_s[stage])
        at_s = max(ready_s, start_s) + (ceil(run_s / point_s) * point_s - run_s)
        if at_s >= end_s:
            return None
        switch_s = self._switch_s(passage.batch.num_tokens)
        passage.held_s[stage] += took_s + switch_s
        self.switched_s += switch_s
        for rank in passage.end_s[stage]:
            passage.end_s[stage][rank] += took_s + switch_s
        return at_s
