"""The pictures of a report, as SVG for its page and PDF for print. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_medha.cli.reports.plots import COLOURS, plain_numbers
from megatron_medha.cli.reports.report_groups import (
    LoadCurve,
    RunGroup,
    SeedSpread,
    capacity,
    curve_label,
    group_label,
    pareto,
    pareto_point,
    short_key,
)

# Okabe and Ito's colours, which the colour-blind tell apart; printed in black, markers and dashes do.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINE_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_SLO_COLOUR = "#555555"
_PARETO_COLOUR = "#d62728"
_ASIDE = 0.015    # of all loads, between two curves
_MAX_TICKS = 6    # loads that have ticks of their own
_MAX_LISTED = 24  # rows named beside the Pareto plot; of more, only the front is


@contextmanager
def drawing() -> Iterator[Any]:
    """Pyplot, without a display, and with files that are the same for the same figures."""
    import matplotlib
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    with matplotlib.rc_context({
        "svg.hashsalt": "medha", "pdf.fonttype": 42, "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8,
        "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 5,
    }):  # fmt: skip
        yield pyplot


def save_picture(figure: Any, stem: Path) -> Path:
    """Write a figure as SVG and as PDF, and free it; the path of the SVG."""
    from matplotlib import pyplot

    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def load_plot(curves: Sequence[LoadCurve], classes: Sequence[str], key: str, slo: dict[str, Any], out: Path) -> Path:
    """P99 TTFT of every length class and SLO attainment over load, a line for each way to decide."""
    labels = [curve_label(curve, curves) for curve in curves]
    with drawing() as pyplot:
        width = 3.1 * (len(classes) + 1)
        figure, axes = pyplot.subplots(1, len(classes) + 1, figsize=(width, 3.1), layout="constrained")
        for place, name in enumerate(classes):
            _draw_curves(axes[place], curves, labels, partial(_p99_ttft, name))
            _log_numbers(axes[place])
            axes[place].set(title=f"p99 TTFT of {name} prompts (s)")
            deadline_s = slo["ttft_s"] or (slo["min_ttft_s"] if name == "short" else None)
            if deadline_s is not None:
                axes[place].axhline(deadline_s, color=_SLO_COLOUR, linestyle="--", linewidth=1)
                note_line(axes[place], deadline_s, f"deadline\n{deadline_s:g} s")
        _draw_attainment(axes[-1], curves, labels, slo["attainment"])
        loads = sorted({load for curve in curves for load, _ in curve.points})
        for one in axes:
            one.set(xlabel=_load_words(key))
            if len(loads) <= _MAX_TICKS:
                one.set_xticks(loads, [f"{load:g}" for load in loads])
            one.grid(alpha=0.25)
        handles, names = axes[-1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 5), frameon=False)
        return save_picture(figure, out / "report_load")


def _p99_ttft(length_class: str, group: RunGroup) -> SeedSpread | None:
    return group.class_figure(length_class, "ttft_s", "p99")


def _draw_attainment(axes: Any, curves: Sequence[LoadCurve], labels: Sequence[str], target: float) -> None:
    _draw_curves(axes, curves, labels, lambda group: group.all_figure("attainment"), scale=100.0)
    axes.set(title="requests that meet the SLO (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2.0), 101.5 if high > 90.0 else high)
    axes.axhline(100.0 * target, color=_SLO_COLOUR, linestyle="--", linewidth=1)
    note_line(axes, 100.0 * target, f"SLO\n{target:.0%}")
    for place, curve in enumerate(curves):
        found = capacity(curve, target)
        if found is not None and not found.sign:
            colour = LINE_COLOURS[place % len(LINE_COLOURS)]
            axes.plot([found.load], [100.0 * target], marker="x", color=colour, markersize=8, markeredgewidth=2)
            axes.annotate(f"{found.load:.3g}", (found.load, 100.0 * target), xytext=(4, 5),
                          textcoords="offset points", color=colour, fontsize=8)  # fmt: skip


def _draw_curves(
    axes: Any, curves: Sequence[LoadCurve], labels: Sequence[str], figure_of: Callable[[RunGroup], SeedSpread | None],
    scale: float = 1.0,
) -> None:  # fmt: skip
    span = max(load for curve in curves for load, _ in curve.points) - min(
        load for curve in curves for load, _ in curve.points
    )
    for place, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        found = [(load, spread) for load, group in curve.points if (spread := figure_of(group)) is not None]
        if not found:
            continue
        # Beside each other, so that every interval can be seen.
        loads = [load + _ASIDE * span * (place - 0.5 * (len(curves) - 1)) for load, _ in found]
        means = [scale * spread.mean for _, spread in found]
        bars = [[scale * (spread.mean - spread.low) for _, spread in found],
                [scale * (spread.high - spread.mean) for _, spread in found]]  # fmt: skip
        has_seeds = any(spread.num > 1 for _, spread in found)
        axes.errorbar(
            loads, means, yerr=bars if has_seeds else None, label=_as_label(label), capsize=3, linewidth=1.6,
            color=LINE_COLOURS[place % len(LINE_COLOURS)], marker=LINE_MARKERS[place % len(LINE_MARKERS)],
            linestyle=LINE_DASHES[place % len(LINE_DASHES)],
        )  # fmt: skip


def note_line(axes: Any, height: float, text: str) -> None:
    """Beside the end of a horizontal line, where no curve is."""
    axes.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                  va="center", color=_SLO_COLOUR, fontsize=8)  # fmt: skip


def _log_numbers(axes: Any) -> None:
    """A logarithmic axis with numbers at 1, 2 and 5 where it spans less than two decades."""
    axes.set_yscale("log")
    axes.autoscale_view()
    low, high = axes.get_ylim()
    if high < 100.0 * low:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        plain_numbers(axes.yaxis)


def ttft_bars(groups: Sequence[RunGroup], classes: Sequence[str], out: Path) -> Path:
    """P50 and p99 TTFT of every row, by length class."""
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(7.5, 0.9 + 0.3 * len(groups)), layout="constrained")
        height = 0.8 / len(classes)
        labelled: set[str] = set()
        for place, name in enumerate(classes):
            for index, group in enumerate(groups):
                p50, p99 = group.class_figure(name, "ttft_s", "p50"), group.class_figure(name, "ttft_s", "p99")
                if p50 is None or p99 is None:
                    continue
                y = index + (place - (len(classes) - 1) / 2) * height
                label = None if name in labelled else name
                labelled.add(name)
                colour = COLOURS[name]
                axes.plot([p50.mean, p99.mean], [y, y], color=colour, linewidth=2.5, alpha=0.5)
                axes.plot([p50.mean], [y], "o", color=colour, markersize=4, label=label)
                axes.plot([p99.mean], [y], "|", color=colour, markersize=8, markeredgewidth=2)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_yticks(range(len(groups)), [_as_label(group_label(group, groups)) for group in groups])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        axes.set(xlabel="TTFT (s): dot p50, bar p99")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        return save_picture(figure, out / "report_ttft")


def pareto_plot(groups: Sequence[RunGroup], name: str, out: Path) -> Path | None:
    """P99 TTFT of a length class over throughput; None where no row has both."""
    front = pareto(groups, name)
    if not front:
        return None
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(7.5, 3.8), layout="constrained")
        listed = groups if len(groups) <= _MAX_LISTED else front
        for group in groups:
            place = pareto_point(group, name)
            if place is None:
                continue
            colour = _PARETO_COLOUR if group in front else "grey"
            label = _as_label(group_label(group, groups)) if group in listed else None
            axes.plot(*place, "s" if group.is_simulated else "o", color=colour, label=label)
            axes.annotate(_as_label(group.name), place, xytext=(5, 3), textcoords="offset points", fontsize="x-small")
        for kind in sorted({group.is_simulated for group in front}):
            line = [pareto_point(group, name) for group in front if group.is_simulated is kind]
            axes.plot(*zip(*line, strict=True), color=_PARETO_COLOUR, alpha=0.4, linestyle="--" if kind else "-")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.grid(alpha=0.25)
        axes.set(xlabel="tokens/s, prompts and outputs", ylabel=f"p99 TTFT of {name} prompts (s)")
        return save_picture(figure, out / "report_pareto")


def _load_words(key: str) -> str:
    words = {"workload.qps": "offered load (requests/s)", "concurrency": "requests in flight"}
    return words.get(key, short_key(key))


def _as_label(text: str) -> str:
    """As matplotlib shows it as it is: formulas stand between dollars, and legends leave out what begins with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
