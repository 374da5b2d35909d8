"""The stages of one replica as resources: which part of a batch runs when on which stage of which KVP rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megatron_medha.stats.timeline import StageSpan


class StepTimes(NamedTuple):
    """What a batch takes.

    stage_s: seconds on every stage, by KVP rank; () where a rank has no part in the batch.
    hops_s: from each stage to the next; they delay the batch and occupy nothing. (): none.
    tied: groups of ranks that share a request. They exchange partial attention in every layer, so they run in
    lockstep, at the pace of the slowest; ranks that share nothing run independently.
    """

    stage_s: tuple[tuple[float, ...], ...]
    hops_s: tuple[float, ...] = ()
    tied: tuple[tuple[int, ...], ...] = ()

    @property
    def duration_s(self) -> float:
        """Of the step when it has the pipeline to itself, by its slowest rank."""
        ranks = self.stage_s
        slowest_s = sum(ranks[0], 0.0) if len(ranks) == 1 else max([sum(seconds, 0.0) for seconds in ranks])
        return slowest_s + sum(self.hops_s, 0.0)


class Pipeline:
    """spp stages of kvp ranks. A batch enters a stage when it has left the one before and the stage is free."""

    def __init__(self, spp: int = 1, kvp: int = 1, on_span: Callable[[StageSpan], None] | None = None) -> None:
        self.spp = spp
        self.kvp = kvp
        self._on_span = on_span
        self._free_s = [[0.0] * kvp for _ in range(spp)]
        self.first_stage_free_s = 0.0  # when stage 0 is free on every rank
        self.busy_s = [[0.0] * kvp for _ in range(spp)]

    def clear(self, now_s: float) -> None:
        """Whatever ran is gone."""
        self._free_s = [[now_s] * self.kvp for _ in range(self.spp)]
        self.first_stage_free_s = now_s

    def occupy(self, batch_id: int, ranks: tuple[int, ...], start_s: float, seconds: float) -> float:
        """Give a batch ranks of the first stage to itself, which must be free; returns when it leaves them."""
        end_s = start_s + seconds
        for rank in ranks:
            assert self._free_s[0][rank] <= start_s, f"batch {batch_id} on busy rank {rank}"
            self._free_s[0][rank] = end_s
            self.busy_s[0][rank] += seconds
            if self._on_span is not None:
                self._on_span(StageSpan(batch_id, 0, rank, start_s, end_s))
        return end_s

    def run(self, batch_id: int, times: StepTimes, now_s: float) -> float:
        """Enter a batch now; returns when its last part leaves the pipeline."""
        if self.kvp == 1:
            return self._run_one_rank(batch_id, times, now_s)
        ranks = [rank for rank, seconds in enumerate(times.stage_s) if seconds]
        ready_s = [now_s] * self.kvp
        for stage, (free_s, busy_s) in enumerate(zip(self._free_s, self.busy_s, strict=True)):
            start_s = [max(ready, free) for ready, free in zip(ready_s, free_s, strict=True)]
            took_s = [seconds[stage] if seconds else 0.0 for seconds in times.stage_s]
            for group in times.tied:
                latest_s, longest_s = max(start_s[rank] for rank in group), max(took_s[rank] for rank in group)
                for rank in group:
                    start_s[rank], took_s[rank] = latest_s, longest_s
            hop_s = times.hops_s[stage] if times.hops_s and stage < self.spp - 1 else 0.0
            for rank in ranks:
                free_s[rank] = end_s = start_s[rank] + took_s[rank]
                ready_s[rank] = end_s + hop_s
                busy_s[rank] += times.stage_s[rank][stage]  # waiting for a tied rank is not work
                if self._on_span is not None:
                    self._on_span(StageSpan(batch_id, stage, rank, start_s[rank], end_s))
        self.first_stage_free_s = max(self._free_s[0])
        return max([ready_s[rank] for rank in ranks])

    def _run_one_rank(self, batch_id: int, times: StepTimes, now_s: float) -> float:
        # As above without other ranks: this runs for every step of most simulations.
        end_s = now_s
        for stage, seconds in enumerate(times.stage_s[0]):
            free_s = self._free_s[stage]
            if stage and times.hops_s:
                end_s += times.hops_s[stage - 1]
            start_s = end_s if end_s > free_s[0] else free_s[0]
            free_s[0] = end_s = start_s + seconds
            self.busy_s[stage][0] += seconds
            if self._on_span is not None:
                self._on_span(StageSpan(batch_id, stage, 0, start_s, end_s))
        self.first_stage_free_s = self._free_s[0][0]
        return end_s
