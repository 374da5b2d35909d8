"""The most load under which a system still meets its SLO: which rate to try next, and what is known by now."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

from megatron_medha.core.errors import check_ranges

_Z = 1.96  # normal quantile of a two-sided interval of 95%


def wilson_interval(num_met: int, num: int) -> tuple[float, float]:
    """Where the true share lies, with 95% confidence, after num_met of num (Wilson's score interval)."""
    share, z2 = num_met / num, _Z * _Z
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z / (1 + z2 / num) * sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One rate that was tried."""

    qps: float
    num_met: int
    num_requests: int
    attainment: float  # that is asked for

    @property
    def passes(self) -> bool:
        """Whether enough requests met the SLO."""
        return self.num_met >= self.attainment * self.num_requests

    @property
    def is_clear(self) -> bool:
        """Whether more requests would hardly have changed the verdict."""
        low, high = wilson_interval(self.num_met, self.num_requests)
        return not low < self.attainment < high


@dataclass(slots=True)
class CapacitySearch:
    """Doubles the rate while it passes (or halves it while it fails), then bisects between the two.

    The authors of Medha measure capacity so, to 2.5% or 20 probes.
    """

    start_qps: float
    attainment: float
    tolerance: float = 0.025
    max_probes: int = 20
    probes: list[Probe] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranges("capacity", self, 1e-6, 1e6, "start_qps")
        check_ranges("capacity", self, 1e-3, 1.0, "attainment")
        check_ranges("capacity", self, 1e-4, 1.0, "tolerance")
        check_ranges("capacity", self, 1, 1000, "max_probes")

    @property
    def best_qps(self) -> float | None:
        """The highest rate that passed below all that failed; None if none has."""
        failed_qps = self.failed_qps
        return max(
            (probe.qps for probe in self.probes if probe.passes and (failed_qps is None or probe.qps < failed_qps)),
            default=None,
        )

    @property
    def failed_qps(self) -> float | None:
        """The lowest rate that failed; None if none has."""
        return min((probe.qps for probe in self.probes if not probe.passes), default=None)

    @property
    def is_resolved(self) -> bool:
        """Whether a passing and a failing rate lie within the tolerance of each other."""
        best_qps, failed_qps = self.best_qps, self.failed_qps
        return best_qps is not None and failed_qps is not None and failed_qps <= best_qps * (1 + self.tolerance)

    def next_qps(self) -> float | None:
        """The rate to try next; None when the search has ended."""
        if self.is_resolved or len(self.probes) >= self.max_probes:
            return None
        best_qps, failed_qps = self.best_qps, self.failed_qps
        if best_qps is None:
            return self.start_qps if failed_qps is None else failed_qps / 2
        return best_qps * 2 if failed_qps is None else (best_qps + failed_qps) / 2

    def note(self, qps: float, num_met: int, num_requests: int) -> Probe:
        """Take in what came of a rate."""
        probe = Probe(qps=qps, num_met=num_met, num_requests=num_requests, attainment=self.attainment)
        self.probes.append(probe)
        return probe
