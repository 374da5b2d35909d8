"""Outcomes added up by length class: percentiles, SLO attainment, goodput, throughput. No text, no files."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, floor, log
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.stats.slo_targets import Slo

PERCENTILES = (50, 90, 99)

# Of each request one sample; TBT has one per token and is kept apart.
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "max_tbt_s", "normalized_s", "scheduling_delay_s", "preempted_s", "slowdown")


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Linear interpolation between ranks, as numpy does by default. At least one value."""
    place = (len(ascending) - 1) * percent / 100.0
    low = floor(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (ascending[high] - ascending[low]) * (place - low)


class GapCounts:
    """Times between tokens, counted in bins of 0.5%: a simulated day has tens of millions.

    Percentiles are geometric bin centres, so within 0.25% of a sample; the largest gap is exact.
    """

    _BINS_PER_E = 200.0

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._gap_s = -1.0  # the gap added last, and how often in a row: in a batch of decodes most are equal
        self._num_equal = 0
        self.max_s = 0.0

    def add(self, gap_s: float) -> None:
        """Count one gap."""
        if gap_s == self._gap_s:
            self._num_equal += 1
        else:
            self._settle()
            self._gap_s, self._num_equal = gap_s, 1

    def percentile(self, percent: float) -> float | None:
        """The gap that so many percent of all do not exceed; None if there are none."""
        self._settle()
        rank = percent / 100.0 * (self._counts.total() - 1)
        num_below = 0
        for place in sorted(self._counts):
            num_below += self._counts[place]
            if num_below > rank:
                return min(exp((place + 0.5) / self._BINS_PER_E), self.max_s) if place > _ZERO_BIN else 0.0
        return None

    def _settle(self) -> None:
        if self._num_equal:
            self._counts[floor(log(self._gap_s) * self._BINS_PER_E) if self._gap_s > 0.0 else _ZERO_BIN] += (
                self._num_equal
            )
            self.max_s = max(self.max_s, self._gap_s)
            self._num_equal = 0


_ZERO_BIN = -(1 << 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClasses:
    """Where short ends and long begins, in prompt tokens."""

    short_below: int = 8192
    long_above: int = 100_000

    def __post_init__(self) -> None:
        if not 1 <= self.short_below <= self.long_above + 1:
            raise ConfigError(
                f"classes.short_below={self.short_below} must be at least 1 and at most "
                f"classes.long_above + 1 = {self.long_above + 1}"
            )

    def of(self, num_prompt_tokens: int) -> str:
        """short, medium or long."""
        if num_prompt_tokens < self.short_below:
            return "short"
        return "long" if num_prompt_tokens > self.long_above else "medium"


CLASSES = ("short", "medium", "long")


@dataclass(slots=True)
class ClassSums:
    """Of one length class. A few numbers per request, however long the run."""

    num_requests: int = 0
    num_by_ending: Counter[str] = field(default_factory=Counter)
    num_met: int = 0
    num_tokens_met: int = 0  # output tokens of requests that met their targets
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_told_tokens: int = 0     # of prompts of which it is known how many were cached
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_tokens_lost: int = 0
    gaps: GapCounts = field(default_factory=GapCounts)
    samples: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in LATENCIES}
    )

    def add(self, outcome: RequestStats, slo: Slo) -> None:
        """Take one request in."""
        self.num_requests += 1
        self.num_by_ending[outcome.ending.value] += 1
        self.num_output_tokens += outcome.num_tokens_out
        self.num_preemptions += outcome.num_preemptions
        self.num_tokens_lost += outcome.num_tokens_lost
        if outcome.first_token_s is not None:
            self.num_prompt_tokens += outcome.request.num_prompt_tokens
            if outcome.num_cached_tokens is not None:
                self.num_cached_tokens += outcome.num_cached_tokens
                self.num_told_tokens += outcome.request.num_prompt_tokens
        if slo.is_met(outcome):
            self.num_met += 1
            self.num_tokens_met += outcome.num_tokens_out
        for name, values in self.samples.items():
            value = getattr(outcome, name)
            if value is not None:
                values.append(value)


class Summary:
    """All outcomes of a run."""

    def __init__(self, classes: LengthClasses, slo: Slo) -> None:
        self._classes = classes
        self._slo = slo
        self.by_class = {name: ClassSums() for name in CLASSES}
        self._first_arrival_s: float | None = None
        self._last_token_s = 0.0

    def sums_for(self, num_prompt_tokens: int) -> ClassSums:
        """Where requests with so long a prompt are added up."""
        return self.by_class[self._classes.of(num_prompt_tokens)]

    def add(self, outcome: RequestStats) -> None:
        """Take one request in."""
        arrival_s = outcome.request.arrival_s
        if self._first_arrival_s is None or arrival_s < self._first_arrival_s:
            self._first_arrival_s = arrival_s
        if outcome.last_token_s is not None:
            self._last_token_s = max(self._last_token_s, outcome.last_token_s)
        self.sums_for(outcome.request.num_prompt_tokens).add(outcome, self._slo)

    @property
    def duration_s(self) -> float:
        """First arrival to last token."""
        return max(0.0, self._last_token_s - (self._first_arrival_s or 0.0))

    def attainment(self, names: Iterable[str] = CLASSES) -> float | None:
        """Share of all requests of these classes that met their targets; None if there were none."""
        sums = [self.by_class[name] for name in names]
        num_requests = sum(one.num_requests for one in sums)
        return sum(one.num_met for one in sums) / num_requests if num_requests else None

    def as_values(self) -> dict[str, Any]:
        """Everything as plain numbers; None where nothing was measured."""
        present = [name for name in CLASSES if self.by_class[name].num_requests]
        return {
            "duration_s": self.duration_s,
            "classes": {name: self._class_values([name]) for name in present},
            "all": self._class_values(CLASSES),
        }

    def _class_values(self, names: Sequence[str]) -> dict[str, Any]:
        sums = [self.by_class[name] for name in names]
        endings = sum((one.num_by_ending for one in sums), Counter[str]())
        duration_s = self.duration_s
        values: dict[str, Any] = {
            "num_requests": sum(one.num_requests for one in sums),
            **{f"num_{ending.value}": endings[ending.value] for ending in Ending},
            "num_first_tokens": sum(len(one.samples["ttft_s"]) for one in sums),
            "attainment": self.attainment(names),
            "num_preemptions": sum(one.num_preemptions for one in sums),
            "num_tokens_lost": sum(one.num_tokens_lost for one in sums),
            "num_prompt_tokens": sum(one.num_prompt_tokens for one in sums),
            "num_cached_tokens": sum(one.num_cached_tokens for one in sums),
            "num_output_tokens": sum(one.num_output_tokens for one in sums),
        }
        num_told_tokens = sum(one.num_told_tokens for one in sums)
        # Of all prompt tokens, those whose KV was there already.
        values["hit_rate"] = values["num_cached_tokens"] / num_told_tokens if num_told_tokens else None
        for key, number in (
            ("goodput_per_s", sum(one.num_met for one in sums)),
            ("token_goodput_per_s", sum(one.num_tokens_met for one in sums)),
            ("requests_per_s", endings[Ending.FINISHED.value]),
            ("output_tokens_per_s", values["num_output_tokens"]),
            ("tokens_per_s", values["num_output_tokens"] + values["num_prompt_tokens"]),
        ):
            values[key] = number / duration_s if duration_s > 0.0 else None
        for name in LATENCIES:
            samples = sorted(value for one in sums for value in one.samples[name])
            values[name] = {f"p{p}": percentile(samples, p) if samples else None for p in PERCENTILES}
        if len(sums) == 1:  # pooled over classes, percentiles over tokens say nothing that the classes do not
            gaps = sums[0].gaps
            values["tbt_s"] = {f"p{p}": gaps.percentile(p) for p in PERCENTILES} | {"max": gaps.max_s}
        return values
