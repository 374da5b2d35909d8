"""The table of a report, and the same figures as CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_medha.cli.reports.report_groups import (
    LoadCurve,
    RunGroup,
    SeedSpread,
    capacity,
    curve_label,
    group_keys,
    kind_word,
    short_key,
)
from megatron_medha.cli.reports.report_runs import ReportRun, differing_keys
from megatron_medha.stats.text_table import number_text, percent_text, seconds_text

_PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class ReportCell:
    """One figure as text."""

    text: str
    interval: str = ""  # from the least to the greatest seed, where there are several


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Rows of groups under two lines of headings."""

    spans: tuple[tuple[str, int], ...]  # what the columns are of, and how many
    header: tuple[str, ...]
    rows: tuple[tuple[ReportCell, ...], ...]

    @property
    def firsts(self) -> list[int]:
        """The first column of each span."""
        starts = [0]
        for _, num in self.spans:
            starts.append(starts[-1] + num)
        return starts[1:-1]

    @property
    def flat_header(self) -> list[str]:
        """One line of headings."""
        spans = [name for name, num in self.spans for _ in range(num)]
        return [f"{span} {name}".strip() for span, name in zip(spans, self.header, strict=True)]


def report_table(groups: Sequence[RunGroup], classes: Sequence[str]) -> ReportTable:
    """A row for each group: what differs, figures of all requests, figures of every length class."""
    keys = group_keys(groups)
    has_both_kinds = len({group.is_simulated for group in groups}) > 1
    has_seeds = any(len(group.distinct_runs) > 1 for group in groups)
    has_hits = any(spread.mean for group in groups if (spread := group.all_figure("hit_rate")))
    first = ["run", *(["what"] if has_both_kinds else []), *map(short_key, keys), *(["seeds"] if has_seeds else [])]
    of_all = ["meet SLO", "goodput /s", "tokens/s", *(["cached"] if has_hits else [])]
    of_class = ["meet SLO", "TTFT p50", "TTFT p99", "TPOT p50"]
    rows = []
    for group in groups:
        cells = [ReportCell(group.name), *([ReportCell(kind_word(group.is_simulated))] if has_both_kinds else [])]
        cells += [ReportCell(str(group.options[key])) for key in keys]
        cells += [ReportCell(str(len(group.distinct_runs)))] if has_seeds else []
        cells += [
            _cell(group.all_figure("attainment"), percent_text),
            _cell(group.all_figure("goodput_per_s"), number_text),
            _cell(group.all_figure("tokens_per_s"), number_text),
            *([_cell(group.all_figure("hit_rate"), percent_text)] if has_hits else []),
        ]
        for name in classes:
            cells += [
                _cell(group.class_figure(name, "attainment"), percent_text),
                _cell(group.class_figure(name, "ttft_s", "p50"), seconds_text),
                _cell(group.class_figure(name, "ttft_s", "p99"), seconds_text),
                _cell(group.class_figure(name, "tpot_s", "p50"), seconds_text),
            ]
        rows.append(tuple(cells))
    return ReportTable(
        spans=(("", len(first)), ("all", len(of_all)), *((name, len(of_class)) for name in classes)),
        header=(*first, *of_all, *of_class * len(classes)),
        rows=tuple(rows),
    )


def capacity_table(curves: Sequence[LoadCurve], key: str, target: float) -> ReportTable:
    """The load at which the attainment of each curve falls below the target."""
    rows = []
    for curve in curves:
        found = capacity(curve, target)
        text = "-" if found is None else f"{found.sign}{' ' if found.sign else ''}{found.load:.3g}"
        rows.append((ReportCell(curve_label(curve, curves)), ReportCell(text)))
    header = ("", f"{short_key(key)} at which {target:.0%} meet the SLO")
    return ReportTable(spans=(("", 2),), header=header, rows=tuple(rows))


def runs_csv(runs: Sequence[ReportRun], classes: Sequence[str]) -> str:
    """A row for each run, all figures as they were measured: seconds, requests and tokens per second, shares."""
    keys = differing_keys(runs)
    rows = [["run", "kind", *keys, "attainment", "goodput_per_s", "tokens_per_s", *(
        f"{name}.{figure}"
        for name in classes
        for figure in ("attainment", *(f"{one}.{percent}" for one in ("ttft_s", "tpot_s") for percent in _PERCENTILES))
    )]]  # fmt: skip
    for run in runs:
        row = [run.name, kind_word(run.is_simulated), *(str(run.options[key]) for key in keys)]
        row += [_raw(run.values["all"].get(name)) for name in ("attainment", "goodput_per_s", "tokens_per_s")]
        for name in classes:
            row.append(_raw(run.values["classes"].get(name, {}).get("attainment")))
            row += [_raw(run.latency_s(name, one, percent)) for one in ("ttft_s", "tpot_s") for percent in _PERCENTILES]
        rows.append(row)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def latex_table(table: ReportTable, caption: str) -> str:
    """The table for a paper; needs the package booktabs."""
    columns = "".join("l" if not place else "r" for place in range(len(table.header)))
    spans, rules, first = [], [], 1
    for name, num in table.spans:
        spans.append(rf"\multicolumn{{{num}}}{{c}}{{{_tex(name)}}}" if name else " & ".join([""] * num))
        rules += [rf"\cmidrule(lr){{{first}-{first + num - 1}}}"] if name else []
        first += num
    lines = [
        "% \\usepackage{booktabs}", r"\begin{table}", r"\centering\small", rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        *([" & ".join(spans) + r" \\", " ".join(rules)] if rules else []),
        " & ".join(map(_tex, table.header)) + r" \\", r"\midrule",
        *(" & ".join(_tex_cell(cell) for cell in row) + r" \\" for row in table.rows),
        r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(spread: SeedSpread | None, text_of: Callable[[float | None], str]) -> ReportCell:
    if spread is None or spread.num == 1:
        return ReportCell(text_of(spread.mean if spread else None))
    low, high = text_of(spread.low), text_of(spread.high)
    if low == high:
        return ReportCell(text_of(spread.mean))
    unit = high[len(high.rstrip(" ms%")):]
    return ReportCell(text_of(spread.mean), f"{low.removesuffix(unit) if unit else low} to {high}")


def _raw(value: float | None) -> str:
    return "" if value is None else repr(value)


_TEX = {**{char: f"\\{char}" for char in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in " ".join(text.split()))


def _tex_cell(cell: ReportCell) -> str:
    return _tex(cell.text) + (rf" {{\scriptsize ({_tex(cell.interval)})}}" if cell.interval else "")
