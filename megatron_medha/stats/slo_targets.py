"""The targets that a request is held to: whether it met them, and how many deadlines of its tokens it missed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import check_ranges
from megatron_medha.stats.request_stats import Ending, RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What every request is held to. Targets that are None are not set."""

    ttft_multiplier: float = 1.5   # the first-token deadline, in units of T_iso: the Medha authors' ...
    min_ttft_s: float = 0.5        # ... and the least it is
    ttft_s: float | None = None    # one deadline for all lengths instead
    tpot_s: float | None = None
    e2e_s: float | None = None
    tbt_s: float | None = None     # between tokens, with slack carried over: see DeadlineMisses
    max_miss_rate: float = 0.1     # of those deadlines
    attainment: float = 0.9        # share of requests that must meet all of it, for a system to pass

    def __post_init__(self) -> None:
        check_ranges("slo", self, 0.0, 1e6, "ttft_multiplier")
        check_ranges("slo", self, 0.0, 1e9, "min_ttft_s")
        check_ranges("slo", self, 1e-6, 1e9, "ttft_s", "tpot_s", "e2e_s", "tbt_s")
        check_ranges("slo", self, 0.0, 1.0, "max_miss_rate", "attainment")

    def deadline_s(self, isolated_s: float) -> float:
        """Seconds from arrival in which the first token is due."""
        return max(self.ttft_multiplier * isolated_s, self.min_ttft_s) if self.ttft_s is None else self.ttft_s

    def is_met(self, stats: RequestStats) -> bool:
        """Whether a request met every target that is set. One that did not finish met none.

        A request of one token has no TPOT and counts as meeting its target.
        """
        if stats.ending is not Ending.FINISHED or stats.ttft_s is None or stats.e2e_s is None:
            return False
        return (
            stats.ttft_s <= self.deadline_s(stats.isolated_s)
            and (self.tpot_s is None or stats.tpot_s is None or stats.tpot_s <= self.tpot_s)
            and (self.e2e_s is None or stats.e2e_s <= self.e2e_s)
            and (stats.deadline_miss_rate is None or stats.deadline_miss_rate <= self.max_miss_rate)
        )


@dataclass(slots=True)
class DeadlineMisses:
    """Counts a request's token deadlines, with slack carried over from early tokens (etalon, "Metron").

    Its code's rule, not its paper's prose: every deadline that passes while a token is late is a miss, so one stall
    of 2 s at 50 ms is 40 misses. Starts with the first token's deadline.
    """

    tbt_s: float
    num_deadlines: int = 0
    num_missed: int = 0
    _slack_s: float = 0.0

    def first_token(self, ttft_s: float, deadline_s: float) -> None:
        """The first token came."""
        self.num_deadlines += 1
        if ttft_s <= deadline_s:
            self._slack_s = deadline_s - ttft_s
            return
        num_later = int((ttft_s - deadline_s) / self.tbt_s)
        self.num_missed += 1 + num_later
        self.num_deadlines += num_later

    def next_token(self, gap_s: float) -> None:
        """Another token came, so long after the one before it."""
        if gap_s <= self.tbt_s + self._slack_s:
            self._slack_s += self.tbt_s - gap_s
            self.num_deadlines += 1
            return
        num_passed = int((gap_s - self._slack_s) / self.tbt_s)
        self.num_missed += num_passed
        self.num_deadlines += num_passed
        self._slack_s = 0.0

    @property
    def rate(self) -> float:
        """Deadlines missed over deadlines; 0 before the first."""
        return self.num_missed / self.num_deadlines if self.num_deadlines else 0.0
