"""Plots of a run, drawn from the files in its directory: TTFT, latency over time, slack, stages. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.simulate_options import Plots
from megatron_medha.sim.run_directory import REQUESTS, SAMPLES, TRACE

COLOURS = {"short": "#1f77b4", "medium": "#2ca02c", "long": "#d62728"}
_GANTT_S = 1.0         # of the trace that are drawn: stages take tens of milliseconds
_MAX_LONG_LINES = 40   # requests with a slack line of their own


def check_plots(plots: Plots) -> None:
    """Raises ConfigError before a run whose plots are asked for and cannot be drawn after it."""
    if plots is Plots.ALWAYS and not _can_plot():
        raise ConfigError(
            "plots=always: matplotlib is not installed; pip install 'megatron_medha[plots]', or plots=never"
        )


def plot(plots: Plots, run: Path) -> None:
    """Draw a run's plots, where they are wanted."""
    if plots is Plots.NEVER:
        return
    if _can_plot():
        plot_run(run)
    else:
        print("no plots: matplotlib is not installed (pip install 'megatron_medha[plots]')")


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(run: Path) -> list[Path]:
    """Draw what the run's files allow; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    requests = list(_lines(run / REQUESTS))
    samples = list(_lines(run / SAMPLES)) if (run / SAMPLES).is_file() else []  # a benchmark has none
    written = []
    for name, draw, values in (
        ("ttft_cdf.png", _ttft_cdf, requests),
        ("latency.png", _latency, requests),
        ("slack.png", _slack, samples),
        ("stages.png", _stages, _spans(run / TRACE)),
    ):
        if not values:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        draw(axes, values)
        written.append(save_figure(figure, run / name))
    return written


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure, and free it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plain_numbers(axis: Any) -> None:
    """0.1 rather than a power of ten on a logarithmic axis that is drawn; between those too, where there is but one."""
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high < 10.0 * low else "")


def _ttft_cdf(axes: Any, requests: list[dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        # A load's first and last requests are sent, but not counted.
        arrived = [one for one in requests if one["length_class"] == name and one.get("is_counted", True)]
        ttft_s = sorted(one["ttft_s"] for one in arrived if one["ttft_s"] is not None)
        if not ttft_s:
            continue
        # Requests without a first token count too: their curve ends below 1.
        shares = [(index + 1) / len(arrived) for index in range(len(ttft_s))]
        axes.step(ttft_s, shares, where="post", color=colour, label=f"{name}: {len(arrived):,} requests")
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set(xlabel="TTFT, seconds", ylabel="share of requests", title="Time to first token", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


def _latency(axes: Any, requests: list[dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        points = [(one["arrival_s"], one["ttft_s"]) for one in requests
                  if one["length_class"] == name and one["ttft_s"] is not None]  # fmt: skip
        if points:
            size = 6 if name == "short" else 18
            axes.scatter(*zip(*points, strict=True), s=size, color=colour, alpha=0.6, linewidths=0, label=name)
    missed = [(one["arrival_s"], one["deadline_s"]) for one in requests if one["ttft_s"] is None]
    if missed:
        axes.scatter(*zip(*missed, strict=True), s=24, marker="x", color="black", label="no first token, at deadline")
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set(xlabel="arrival, seconds", ylabel="TTFT, seconds", title="Time to first token over the run")
    axes.grid(alpha=0.3)
    axes.legend()


def _slack(axes: Any, samples: list[dict[str, Any]]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    least: list[tuple[float, float]] = []
    for sample in samples:
        for request_id, name, slack, _ in sample["waiting"]:
            if name != "short":
                lines.setdefault(request_id, []).append((sample["now_s"], slack))
        short = [slack for _, name, slack, _ in sample["waiting"] if name == "short"]
        if short:
            least.append((sample["now_s"], min(short)))
    shown = list(lines.values())[:_MAX_LONG_LINES]
    which = f", the first {len(shown)} of {len(lines)}" if len(lines) > len(shown) else ""
    for place, points in enumerate(shown):
        label = f"one long or medium request each{which}" if not place else None
        axes.plot(*zip(*points, strict=True), color=COLOURS["long"], alpha=0.5, linewidth=1, label=label)
    if least:
        axes.scatter(*zip(*least, strict=True), s=8, color=COLOURS["short"], label="the least of all short ones")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="simulated seconds", ylabel="slack / time alone", title="Relative slack of requests that wait "
             "for their first token; below 0 the deadline cannot be met")  # fmt: skip
    axes.grid(alpha=0.3)
    if lines or least:
        axes.legend()


def _stages(axes: Any, spans: list[dict[str, Any]]) -> None:
    start_us = spans[0]["ts"]
    spans = [span for span in spans if span["ts"] < start_us + _GANTT_S * 1e6]
    lanes = sorted({(span["pid"], span["tid"]) for span in spans})
    names = sorted({name for span in spans for name in _prefills(span)}, key=lambda name: int(name[1:]))
    colours = {name: f"C{place % 10}" for place, name in enumerate(names)}
    for span in spans:
        y = lanes.index((span["pid"], span["tid"]))
        tokens = _prefills(span)
        x, width = span["ts"] / 1e6, span["dur"] / 1e6
        if not tokens:
            axes.barh(y, width, left=x, height=0.8, color="lightgrey", linewidth=0)
        lower = y - 0.4
        for name, count in tokens.items():  # a batch's prefills share its bar by their tokens
            height = 0.8 * count / sum(tokens.values())
            axes.bar(x, height, width, lower, align="edge", color=colours[name], edgecolor="white", linewidth=0.4)
            lower += height
    for name in names[:12]:
        axes.bar(0, 0, color=colours[name], label=name)
    axes.bar(0, 0, color="lightgrey", label="decodes only")
    axes.set_xlim(start_us / 1e6, start_us / 1e6 + _GANTT_S)
    has_kvp = len({rank for rank, _ in lanes}) > 1
    axes.set_yticks(range(len(lanes)), [f"KVP {rank}, stage {stage}" if has_kvp else f"stage {stage}"
                                        for rank, stage in lanes])  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="simulated seconds", title="Chunks on stages, by request")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _prefills(span: dict[str, Any]) -> dict[str, int]:
    return {chunk["request"]: chunk["tokens"] for chunk in span["args"]["chunks"]}


def _spans(path: Path) -> list[dict[str, Any]]:
    """The busiest stretch is the most telling: the one second with the most requests prefilling."""
    if not path.is_file():
        return []
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    if not spans:
        return []
    requests: dict[int, set[str]] = {}
    for span in spans:
        requests.setdefault(int(span["ts"] / (_GANTT_S * 1e6)), set()).update(_prefills(span))
    second = max(requests, key=lambda one: len(requests[one]))
    return [span for span in spans if span["ts"] >= second * _GANTT_S * 1e6]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)
