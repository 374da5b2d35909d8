"""The stages of one replica as resources: which part of a batch runs when on which stage of which KVP rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class StepTimes(NamedTuple):
    """What a batch takes.

    rank_s: seconds over all stages, by KVP rank; 0.0 where a rank has no part in the batch.
    tied: groups of ranks that share a request. They exchange partial attention in every layer, so they run in
    lockstep, at the pace of the slowest; ranks that share nothing run independently.
    link_s: from one stage to the next.
    """

    rank_s: tuple[float, ...]
    tied: tuple[tuple[int, ...], ...] = ()
    link_s: float = 0.0


class Span(NamedTuple):
    """A batch on one stage of one KVP rank."""

    batch_id: int
    stage: int
    kvp_rank: int
    start_s: float
    end_s: float


class Pipeline:
    """spp stages of kvp ranks. A batch enters a stage when it has left the one before and the stage is free."""

    def __init__(self, spp: int = 1, kvp: int = 1, on_span: Callable[[Span], None] | None = None) -> None:
        self.spp = spp
        self.kvp = kvp
        self._on_span = on_span
        self._free_s = [[0.0] * kvp for _ in range(spp)]
        self.busy_s = [[0.0] * kvp for _ in range(spp)]

    @property
    def first_stage_free_s(self) -> float:
        """When stage 0 is free on every rank."""
        return max(self._free_s[0])

    def clear(self, now_s: float) -> None:
        """Whatever ran is gone."""
        self._free_s = [[now_s] * self.kvp for _ in range(self.spp)]

    def run(self, batch_id: int, times: StepTimes, now_s: float) -> tuple[float, float]:
        """Enter a batch now; returns when its last part leaves stage 0, and when its last part leaves the pipeline."""
        if self.kvp == 1:
            return self._run_one_rank(batch_id, times, now_s)
        share = 1.0 / self.spp
        ready_s = [now_s] * self.kvp
        first_s = now_s
        for stage, (free_s, busy_s) in enumerate(zip(self._free_s, self.busy_s, strict=True)):
            start_s = [max(ready, free) for ready, free in zip(ready_s, free_s, strict=True)]
            took_s = [seconds * share for seconds in times.rank_s]
            for group in times.tied:
                latest_s, longest_s = max(start_s[rank] for rank in group), max(took_s[rank] for rank in group)
                for rank in group:
                    start_s[rank], took_s[rank] = latest_s, longest_s
            for rank, own_s in enumerate(times.rank_s):
                if own_s:
                    ready_s[rank] = free_s[rank] = start_s[rank] + took_s[rank]
                    busy_s[rank] += own_s * share  # waiting for a tied rank is not work
                    if self._on_span is not None:
                        self._on_span(Span(batch_id, stage, rank, start_s[rank], ready_s[rank]))
            if not stage:
                first_s = max(ready_s)
            if stage < self.spp - 1:
                ready_s = [ready + times.link_s for ready in ready_s]
        return first_s, max(ready for ready, own_s in zip(ready_s, times.rank_s, strict=True) if own_s)

    def _run_one_rank(self, batch_id: int, times: StepTimes, now_s: float) -> tuple[float, float]:
        # As above without other ranks: this runs for every step of most simulations.
        stage_s = times.rank_s[0] / self.spp
        ready_s, first_s = now_s - times.link_s, 0.0
        for stage in range(self.spp):
            free_s = self._free_s[stage]
            start_s = ready_s + times.link_s
            if start_s < free_s[0]:
                start_s = free_s[0]
            free_s[0] = ready_s = start_s + stage_s
            self.busy_s[stage][0] += stage_s
            if self._on_span is not None:
                self._on_span(Span(batch_id, stage, 0, start_s, ready_s))
            if not stage:
                first_s = ready_s
        return first_s, ready_s
