"""Which requests of a workload every candidate of a plan is tried on, and whether they are enough to say anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

from megatron_medha.core.request import Request
from megatron_medha.stats.summary import CLASSES, LengthClasses
from megatron_medha.workload.arrivals import ArrivalProcess
from megatron_medha.workload.workload import Workload, WorkloadConfig

MIN_WINDOW_S = 600.0            # where trial_s is not given
MIN_PER_CLASS = 20      # of fewer, each is more than 5% of what is said about them
MIN_SHARE_COVERED = 0.8  # of a class's share of the whole workload; a quiet morning says nothing about the afternoon
MIN_PEAK_COVERED = 0.8   # of the tokens that come in the busiest span of the whole workload; a burst may come late
PEAK_SPANS_S = (60.0, 600.0)
MAX_DRAWN = 50_000        # requests of a mix that has no end of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialWindow:
    """The first requests of a workload, the same for every candidate."""

    workload: WorkloadConfig        # these requests and no others
    seconds: float                  # from the start to the last arrival
    num_by_class: dict[str, int]    # classes without any are left out
    whole_share_by_class: dict[str, float]  # of the workload as a whole, as far as it was looked at
    peak_covered: float             # tokens of its busiest minute, or ten minutes, over those of the whole workload
    num_prompt_tokens: int          # of all these requests
    num_output_tokens: int
    longest_prompt_tokens: int
    max_request_tokens: int
    why_too_few: tuple[str, ...]    # reasons why a verdict would mean nothing

    @property
    def underrepresented(self) -> tuple[str, ...]:
        """Classes of which the whole workload has clearly more than these requests."""
        total = sum(self.num_by_class.values())
        return tuple(
            name
            for name, share in self.whole_share_by_class.items()
            if self.num_by_class.get(name, 0) < MIN_SHARE_COVERED * total * share
        )


def num_needed(attainment: float) -> int:
    """Requests among which one may miss at so large a share; a hundred for 99%, and for all of them."""
    if attainment >= 1.0:
        return 100
    return max(MIN_PER_CLASS, ceil(1.0 / (1.0 - attainment) - 1e-9))


def choose_window(
    config: WorkloadConfig,
    seed: int,
    classes: LengthClasses,
    *,
    attainment: float,
    each_class: bool,
    trial_s: float | None,
) -> TrialWindow:
    """The requests of the first trial_s seconds; None: of as many as it takes, at least MIN_WINDOW_S or a period.

    Of sessions, the turns of the first trial_s seconds; None: all of them, as nobody knows when they will come.

    Raises ConfigError, as Workload does.
    """
    is_closed_loop = config.sessions is not None
    if is_closed_loop and trial_s is not None:
        config = replace(config, duration_s=trial_s)
    if not is_closed_loop and config.path is None and config.duration_s is None and config.num_requests is None:
        config = replace(config, num_requests=MAX_DRAWN)
    workload = Workload(config, seed)
    whole: Counter[str] = Counter()
    whole_peaks = _Peaks()
    for request in workload.requests():
        whole[classes.of(request.num_prompt_tokens)] += 1
        whole_peaks.add(request)
    num_whole = workload.facts.num_requests
    # What is drawn is alike from period to period; a trace may hold anything anywhere.
    is_drawn = config.path is None
    least_s = max(
        MIN_WINDOW_S, config.period_s if config.arrivals in (ArrivalProcess.BURST, ArrivalProcess.DIURNAL) else 0.0
    )
    all_needed = num_needed(attainment)
    needed = all_needed if each_class else MIN_PER_CLASS

    def covers(counts: Counter[str], num_requests: int) -> bool:
        return num_requests >= all_needed and all(
            counts[name] >= max(needed, MIN_SHARE_COVERED * num_requests * count / num_whole)
            for name, count in whole.items()
        )

    counts: Counter[str] = Counter()
    peaks = _Peaks()
    num_requests = longest = most_tokens = num_prompt_tokens = num_output_tokens = 0
    last_s = 0.0
    for request in workload.requests():
        if trial_s is not None and request.arrival_s >= trial_s and num_requests:
            break
        if (
            trial_s is None
            and not is_closed_loop
            and request.arrival_s >= least_s
            and covers(counts, num_requests)
            and (is_drawn or peaks.share_of(whole_peaks) >= MIN_PEAK_COVERED)
        ):
            break
        peaks.add(request)
        num_requests += 1
        counts[classes.of(request.num_prompt_tokens)] += 1
        num_prompt_tokens += request.num_prompt_tokens
        num_output_tokens += request.max_output_tokens
        longest = max(longest, request.num_prompt_tokens)
        most_tokens = max(most_tokens, request.num_prompt_tokens + request.max_output_tokens)
        last_s = request.arrival_s
    reasons = []
    where = f"the {num_requests:,} requests of trial_s={trial_s:g}" if trial_s is not None else (
        f"the {num_requests:,} requests of the workload"
    )
    more = "trial_s=null takes as many as it needs" if trial_s is not None else "take a longer trace or workload"
    if num_requests < all_needed:
        reasons.append(f"{where} are too few for slo.attainment={attainment:g}, which needs {all_needed}; {more}")
    for name in CLASSES:
        if whole[name] and counts[name] < needed:
            reasons.append(
                f"of {where}, {counts[name]} are {name} ({whole[name]} of the {num_whole:,} looked at), and a class "
                f"needs {needed}; {more}, or other bounds of classes.short_below and classes.long_above"
            )
    return TrialWindow(
        workload=config if is_closed_loop else replace(config, duration_s=None, num_requests=num_requests),
        seconds=last_s,
        num_by_class={name: counts[name] for name in CLASSES if counts[name]},
        whole_share_by_class={name: whole[name] / num_whole for name in CLASSES if whole[name]},
        peak_covered=peaks.share_of(whole_peaks),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        longest_prompt_tokens=longest,
        max_request_tokens=most_tokens,
        why_too_few=tuple(reasons),
    )


class _Peaks:
    """The most tokens that come within one span of each of PEAK_SPANS_S."""

    def __init__(self) -> None:
        self._most = [0] * len(PEAK_SPANS_S)
        self._latest = [(0, 0)] * len(PEAK_SPANS_S)  # number of the span, and its tokens

    def add(self, request: Request) -> None:
        """The next request, in order of arrival."""
        for index, span_s in enumerate(PEAK_SPANS_S):
            span, num_tokens = int(request.arrival_s // span_s), request.num_prompt_tokens + request.max_output_tokens
            if span == self._latest[index][0]:
                num_tokens += self._latest[index][1]
            self._latest[index] = span, num_tokens
            self._most[index] = max(self._most[index], num_tokens)

    def share_of(self, whole: _Peaks) -> float:
        """The least share of the whole's, of all spans."""
        return min(most / max(of_whole, 1) for most, of_whole in zip(self._most, whole._most, strict=True))
