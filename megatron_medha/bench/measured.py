"""What is counted of a run, and how far it can be trusted: the window, send lag, failures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import Any

from megatron_medha.bench.load_generator import SentRequest
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses, Summary, percentile

# Of a client that keeps up: p99 of how late it sends, in seconds, or as a share of the median TTFT where that is more.
MAX_LAG_S, MAX_LAG_SHARE = 0.010, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementWindow:
    """Which requests count: those in the middle, when the load is neither building up nor running out."""

    first: float
    last: float
    by_arrival: bool  # first and last are arrival times; else places in the order of sending

    @classmethod
    def of_open_loop(cls, last_arrival_s: float, exclude_share: float) -> MeasurementWindow:
        """Without so much of the time in which requests arrive, at its beginning and again at its end."""
        return cls(first=exclude_share * last_arrival_s, last=(1 - exclude_share) * last_arrival_s, by_arrival=True)

    @classmethod
    def of_closed_loop(cls, num_requests: int, exclude_share: float) -> MeasurementWindow:
        """Without so many of the requests, the first and the last."""
        num_left_out = int(exclude_share * num_requests)
        return cls(first=num_left_out, last=num_requests - 1 - num_left_out, by_arrival=False)

    def includes(self, request: Request) -> bool:
        """Whether this request counts."""
        place = request.arrival_s if self.by_arrival else int(request.request_id.removeprefix("r"))
        return self.first <= place <= self.last

    @classmethod
    def of_sessions(cls) -> MeasurementWindow:
        """All turns: which of them come when the load builds up is part of the sessions."""
        return cls(first=0.0, last=inf, by_arrival=True)

    def __str__(self) -> str:
        if self.last == inf:
            return "all turns"
        if self.by_arrival:
            return f"arrivals from {self.first:.1f} to {self.last:.1f} s"
        return f"requests {self.first + 1:.0f} to {self.last + 1:.0f} in order of sending"


class BenchMeasurement:
    """Adds up requests within the window; the others were load only."""

    def __init__(self, classes: LengthClasses, slo: Slo, window: MeasurementWindow) -> None:
        self._summary = Summary(classes, slo)
        self._window = window
        self._lags_s: list[float] = []
        self._why: Counter[str] = Counter()
        self._num_excluded = 0

    def add(self, sent: SentRequest) -> bool:
        """Take a request in; whether it counts."""
        outcome = sent.outcome
        if outcome.ending is not Ending.FINISHED:
            self._why[outcome.why or outcome.ending.value] += 1
        if not self._window.includes(outcome.request):
            self._num_excluded += 1
            return False
        self._lags_s.append(sent.send_lag_s)
        self._summary.add(outcome)
        sums = self._summary.sums_for(outcome.request.num_prompt_tokens)
        for sooner, later in zip(sent.token_times_s, sent.token_times_s[1:], strict=False):
            sums.gaps.add(later - sooner)
        return True

    def values(self) -> dict[str, Any]:
        """Everything as plain numbers, for summary.json."""
        values = self._summary.as_values()
        values["all"]["num_met"] = sum(one.num_met for one in self._summary.by_class.values())
        values["client"] = {
            "num_excluded": self._num_excluded,
            "counted": str(self._window),
            "send_lag_p99_s": self._lag_p99_s,
            "is_void": self._is_void,
            "failures": dict(self._why),
        }
        return values

    def remarks(self) -> str:
        """What a reader has to know beside the table; a run whose client was late is void and says so."""
        lines = [
            f"counted: {self._window}; {self._num_excluded} before and after were sent and left out; "
            f"sent {self._lag_p99_s * 1e3:.1f} ms late (p99)"
        ]
        if self._is_void:
            lines.append(
                "VOID: this client could not send in time; run it on another machine, or ask for less "
                f"(allowed: {MAX_LAG_S * 1e3:g} ms, or {MAX_LAG_SHARE:.0%} of the median TTFT)"
            )
        lines += [f"{count} failed: {why}" for why, count in self._why.most_common(5)]
        return "\n".join(lines) + "\n"

    @property
    def _is_void(self) -> bool:
        median_s = self._summary.as_values()["all"]["ttft_s"]["p50"]
        return median_s is not None and self._lag_p99_s > max(MAX_LAG_S, MAX_LAG_SHARE * median_s)

    @property
    def _lag_p99_s(self) -> float:
        return percentile(sorted(self._lags_s), 99) if self._lags_s else 0.0
