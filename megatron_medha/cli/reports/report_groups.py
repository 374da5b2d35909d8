"""Runs that differ in their seeds alone as one row of a report, and rows over load as curves. No text, no files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_medha.cli.reports.report_runs import ReportRun, differing_keys, distinguishing_keys, is_compared

SEED = "seed"
_MAX_NAMED = 4  # runs of a group that are named one by one
_LOADS = ("workload.qps", "concurrency", "workload.time_scale")  # options that set a load; the first that varies is x


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """A figure over the seeds of a group."""

    mean: float
    low: float   # the least of any seed
    high: float  # the greatest
    num: int     # seeds that have the figure


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs of the same options, whatever their seeds."""

    runs: tuple[ReportRun, ...]

    @property
    def name(self) -> str:
        """The names of its runs, by which tables and pictures call it."""
        names = [run.name for run in self.runs]
        return ", ".join(names) if len(names) <= _MAX_NAMED else f"{names[0]} to {names[-1]} ({len(names)} runs)"

    @property
    def options(self) -> Mapping[str, Any]:
        """Those of all its runs; `seed` is the first one's."""
        return self.runs[0].options

    @property
    def is_simulated(self) -> bool:
        """Whether its runs are."""
        return self.runs[0].is_simulated

    @property
    def distinct_runs(self) -> list[ReportRun]:
        """Its runs without those that repeat another one to the last figure, as a simulation of the same seed does."""
        found: dict[str, ReportRun] = {}
        for run in self.runs:
            found.setdefault(json.dumps([run.options.get(SEED), run.values], sort_keys=True), run)
        return list(found.values())

    def all_figure(self, name: str) -> SeedSpread | None:
        """A figure of all requests; None if no run has it."""
        return _spread(run.values["all"].get(name) for run in self.distinct_runs)

    def class_figure(self, length_class: str, name: str, percentile: str | None = None) -> SeedSpread | None:
        """A figure of a length class, such as attainment, or a percentile of a latency; None if no run has it."""
        if percentile is not None:
            return _spread(run.latency_s(length_class, name, percentile) for run in self.distinct_runs)
        return _spread(run.values["classes"].get(length_class, {}).get(name) for run in self.distinct_runs)


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """Groups that differ in their load alone, by load."""

    options: Mapping[str, Any]  # in which the curves differ
    is_simulated: bool
    points: tuple[tuple[float, RunGroup], ...]


@dataclass(frozen=True, slots=True)
class LoadCapacity:
    """The load at which attainment falls below its target, as far as the loads tried show it."""

    load: float
    sign: str  # "": between two loads, by a straight line; "<", ">": below the least, above the greatest that was tried


def group_runs(runs: Iterable[ReportRun]) -> list[RunGroup]:
    """Groups in the order of their first runs."""
    found: dict[str, list[ReportRun]] = {}
    for run in runs:
        same = {key: value for key, value in run.options.items() if key != SEED and is_compared(key)}
        found.setdefault(json.dumps([run.is_simulated, same], sort_keys=True), []).append(run)
    return [RunGroup(tuple(group)) for group in found.values()]


def group_keys(groups: Sequence[RunGroup]) -> list[str]:
    """Options that tell the groups apart, each one only if those before it do not settle it."""
    return [key for key in distinguishing_keys([group.runs[0] for group in groups]) if key != SEED]


def load_key(groups: Sequence[RunGroup], asked: str | None = None) -> str | None:
    """The option that curves are drawn over; None if no load varies."""
    keys = differing_keys(run for group in groups for run in group.runs[:1])
    return next((key for key in ([asked] if asked else _LOADS) if key in keys and len(_values(groups, key)) > 1), None)


def load_curves(groups: Sequence[RunGroup], key: str) -> list[LoadCurve]:
    """A curve for all groups that have the same options but this one, where two loads or more were tried."""
    names = [name for name in group_keys(groups) if name != key]
    found: dict[str, list[RunGroup]] = {}
    for group in groups:
        if _is_number(group.options.get(key)):
            same = {name: value for name, value in group.options.items()
                    if name not in (key, SEED) and is_compared(name)}  # fmt: skip
            found.setdefault(json.dumps([group.is_simulated, same], sort_keys=True), []).append(group)
    return [
        LoadCurve(
            options={name: of_curve[0].options[name] for name in names},
            is_simulated=of_curve[0].is_simulated,
            points=tuple(sorted(((float(one.options[key]), one) for one in of_curve), key=lambda point: point[0])),
        )
        for of_curve in found.values()
    ]


def capacity(curve: LoadCurve, target: float) -> LoadCapacity | None:
    """Where the share of requests that meet the SLO crosses the target for the first time; None if no run says."""
    points = [(load, spread.mean) for load, group in curve.points if (spread := group.all_figure("attainment"))]
    if not points:
        return None
    for place, (load, share) in enumerate(points):
        if share < target:
            if not place:
                return LoadCapacity(load, "<")
            before, share_before = points[place - 1]
            return LoadCapacity(before + (load - before) * (share_before - target) / (share_before - share), "")
    return LoadCapacity(points[-1][0], ">")


def pareto(groups: Sequence[RunGroup], length_class: str) -> list[RunGroup]:
    """Groups that no other one beats in both p99 TTFT of that class and tokens per second, by throughput.

    Measured and simulated ones do not compete: the machines are not the same.
    """
    return [
        group
        for is_simulated in (False, True)
        for group in _pareto_front([group for group in groups if group.is_simulated is is_simulated], length_class)
    ]


def pareto_point(group: RunGroup, length_class: str) -> tuple[float, float] | None:
    """Tokens per second and p99 TTFT; None if a group has not both."""
    tokens_per_s, ttft_s = group.all_figure("tokens_per_s"), group.class_figure(length_class, "ttft_s", "p99")
    return (tokens_per_s.mean, ttft_s.mean) if tokens_per_s and tokens_per_s.mean and ttft_s else None


def _pareto_front(groups: Sequence[RunGroup], length_class: str) -> list[RunGroup]:
    points = [(*point, group) for group in groups if (point := pareto_point(group, length_class)) is not None]
    front: list[RunGroup] = []
    least_s, throughput = float("inf"), 0.0
    for tokens_per_s, ttft_s, group in sorted(points, key=lambda point: (-point[0], point[1])):
        if ttft_s < least_s or (tokens_per_s, ttft_s) == (throughput, least_s):  # equal ones are as good as each other
            front.append(group)
            least_s, throughput = ttft_s, tokens_per_s
    return front[::-1]


def curve_label(curve: LoadCurve, curves: Sequence[LoadCurve]) -> str:
    """What differs between the curves; the value alone where it is one option."""
    facts = _kind_words(curve.is_simulated, {one.is_simulated for one in curves})
    keys = list(curve.options)
    facts += [str(curve.options[key]) if len(keys) == 1 else f"{short_key(key)}={curve.options[key]}"
              for key in keys[:4]]  # fmt: skip
    return ", ".join(facts) or "all runs"


def group_label(group: RunGroup, groups: Sequence[RunGroup]) -> str:
    """The group's name, by which tables and pictures call it, and what differs."""
    facts = _kind_words(group.is_simulated, {one.is_simulated for one in groups})
    facts += [f"{short_key(key)}={group.options[key]}" for key in group_keys(groups)[:4]]
    return f"{group.name}: {', '.join(facts)}" if facts else group.name


def short_key(key: str) -> str:
    """The last part of a key, where that says enough."""
    name = key.rpartition(".")[2]
    return key if name in ("kind", "name") else name  # of what, their group says


def _kind_words(is_simulated: bool, kinds: set[bool]) -> list[str]:
    return [kind_word(is_simulated)] if len(kinds) > 1 else []


def kind_word(is_simulated: bool) -> str:
    """Where its figures come from."""
    return "simulated" if is_simulated else "measured"


def _values(groups: Sequence[RunGroup], key: str) -> set[float]:
    return {float(group.options[key]) for group in groups if _is_number(group.options.get(key))}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spread(values: Iterable[float | None]) -> SeedSpread | None:
    found = [value for value in values if value is not None]
    return SeedSpread(sum(found) / len(found), min(found), max(found), len(found)) if found else None
