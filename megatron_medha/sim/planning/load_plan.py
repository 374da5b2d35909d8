"""What a plan for one load came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_medha.sim.planning.candidate import CandidateVerdict, IsolatedBound
from megatron_medha.sim.planning.trial_window import TrialWindow
from megatron_medha.stats.capacity_search import wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """All candidates that were tried under one load, and the cheapest of every contender."""

    qps: float
    window: TrialWindow
    bounds: Sequence[IsolatedBound] = ()       # of every layout, where they are known
    verdicts: Sequence[CandidateVerdict] = ()
    best: Mapping[str, CandidateVerdict | None]  # by contender; None: it cannot do it
    curve: Sequence[CandidateVerdict] = ()     # of every contender the best of each size, simulated to the end
    why_none: str = ""                         # why nothing can meet the SLO, or why nobody can say

    @property
    def winner(self) -> CandidateVerdict | None:
        """The one with the fewest GPUs, of those the one with the highest attainment."""
        found = [verdict for verdict in self.best.values() if verdict is not None]
        return min(found, key=lambda one: (one.trial.num_gpus, -(one.attainment or 0.0)), default=None)


def attainment_intervals(verdict: CandidateVerdict, window: TrialWindow) -> dict[str, tuple[float, float, float]]:
    """Share of requests that meet the SLO, of all and by class, with its 95% confidence interval."""
    if verdict.attainment is None or verdict.attainment_by_class is None:
        return {}
    shares = {"all": verdict.attainment, **verdict.attainment_by_class}
    counts = {"all": sum(window.num_by_class.values()), **window.num_by_class}
    return {
        name: (share, *wilson_interval(round(share * counts[name]), counts[name]))
        for name, share in shares.items() if counts.get(name)
    }  # fmt: skip


def best_of_sizes(verdicts: Iterable[CandidateVerdict], best: Mapping[str, CandidateVerdict | None]) -> list[
    CandidateVerdict
]:  # fmt: skip
    """Of every contender and number of GPUs up to what it needs, the candidate that was closest to passing."""
    closest: dict[tuple[str, int], CandidateVerdict] = {}
    for verdict in verdicts:
        key = verdict.trial.name, verdict.trial.num_gpus
        if verdict.attainment is None and verdict.failed_after_s is None:
            continue  # it cannot be
        passed = best.get(verdict.trial.name)
        if passed is not None and verdict.trial.num_gpus >= passed.trial.num_gpus and verdict is not passed:
            continue
        if key not in closest or _closeness(verdict) > _closeness(closest[key]):
            closest[key] = verdict
    return [closest[key] for key in sorted(closest)]


def _closeness(verdict: CandidateVerdict) -> tuple[float, float]:
    return verdict.attainment or 0.0, verdict.failed_after_s or 0.0
