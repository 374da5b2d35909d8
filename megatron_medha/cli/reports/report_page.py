"""The report's two pages and their pictures. Needs matplotlib."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_medha.cli.reports.plots import COLOURS, plain_numbers, save_figure
from megatron_medha.cli.reports.report_runs import ReportRun, differing_keys, distinguishing_keys, pareto
from megatron_medha.core.errors import ConfigError
from megatron_medha.stats.summary import CLASSES
from megatron_medha.stats.text_table import number_text, percent_text, seconds_text

_PARETO_COLOUR = "#d62728"
_MAX_LISTED = 24        # runs named beside the Pareto plot; of more, only the front is
_MAX_RUN_PICTURES = 24  # runs whose own plots go onto the page


def write_report(runs: Sequence[ReportRun], out: Path) -> list[Path]:
    """Write report.md, report.html and their pictures; returns the pages."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").touch()
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); name another directory") from error
    classes = [name for name in CLASSES if any(name in run.classes for run in runs)]
    header, rows = _table(runs, classes)
    pictures = [path for path in (_ttft_bars(runs, classes, out), _pareto_plot(runs, classes[0], out)) if path]
    front = pareto(runs, classes[0])
    facts = {
        "num_runs": len(runs),
        "num_simulated": sum(run.is_simulated for run in runs),
        "header": header,
        "rows": rows,
        "front": [run.name for run in front],
        "front_class": classes[0],
        "runs": [
            {"name": run.name, "pictures": sorted(run.path.glob("*.png"))} for run in runs[:_MAX_RUN_PICTURES]
        ],
        "num_without_pictures": max(0, len(runs) - _MAX_RUN_PICTURES),
    }
    markdown, html = out / "report.md", out / "report.html"
    markdown.write_text(_render("report.md.j2", facts | {"pictures": [path.name for path in pictures]}), "utf-8")
    html.write_text(_render("report.html.j2", facts | {"pictures": pictures}), "utf-8")
    return [markdown, html]


def _table(runs: Sequence[ReportRun], classes: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    keys = differing_keys(runs)
    kinds = _has_both_kinds(runs)
    header = ["run", *(["what"] if kinds else []), *(_short(key) for key in keys)]
    for name in classes:
        header += [f"{name} TTFT p50", "p99", f"{name} TPOT p50", f"{name} meet SLO"]
    has_hits = any(run.values["all"].get("hit_rate") for run in runs)
    header += ["all meet SLO", "goodput /s", "tokens/s", *(["prompts cached"] if has_hits else [])]
    rows = []
    for run in runs:
        row = [run.name, *([_kind(run)] if kinds else [])]
        row += [str(run.options[key]) for key in keys]
        for name in classes:
            row += [
                seconds_text(run.latency_s(name, "ttft_s", "p50")),
                seconds_text(run.latency_s(name, "ttft_s", "p99")),
                seconds_text(run.latency_s(name, "tpot_s", "p50")),
                percent_text(run.values["classes"].get(name, {}).get("attainment")),
            ]
        every = run.values["all"]
        row.append(percent_text(every["attainment"]))
        row += [number_text(every["goodput_per_s"]), number_text(every["tokens_per_s"])]
        row += [percent_text(every.get("hit_rate"))] if has_hits else []
        rows.append(row)
    return header, rows


def _short(key: str) -> str:
    name = key.rpartition(".")[2]
    return key if name in ("kind", "name") else name  # of what, their group says


def _ttft_bars(runs: Sequence[ReportRun], classes: Sequence[str], out: Path) -> Path:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.42 * len(runs)), layout="constrained")
    height = 0.8 / len(classes)
    for place, name in enumerate(classes):
        for index, run in enumerate(runs):
            p50, p99 = run.latency_s(name, "ttft_s", "p50"), run.latency_s(name, "ttft_s", "p99")
            if p50 is None or p99 is None:
                continue
            y = index + (place - (len(classes) - 1) / 2) * height
            label = name if index == next(i for i, one in enumerate(runs) if name in one.classes) else None
            axes.plot([p50, p99], [y, y], color=COLOURS[name], linewidth=3, alpha=0.5, solid_capstyle="round")
            axes.plot([p50], [y], "o", color=COLOURS[name], markersize=5, label=label)
            axes.plot([p99], [y], "|", color=COLOURS[name], markersize=9, markeredgewidth=2)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(runs)), [_as_label(_named(run, runs)) for run in runs], fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="seconds", title="TTFT by length class: dot p50, bar p99")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    return save_figure(figure, out / "report_ttft.png")


def _pareto_plot(runs: Sequence[ReportRun], name: str, out: Path) -> Path | None:
    from matplotlib import pyplot

    front = pareto(runs, name)
    if not front:
        return None
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    listed = runs if len(runs) <= _MAX_LISTED else front
    for run in runs:
        ttft_s, tokens_per_s = run.latency_s(name, "ttft_s", "p99"), run.values["all"]["tokens_per_s"]
        if ttft_s is None or not tokens_per_s:
            continue
        label = _as_label(_named(run, runs)) if run in listed else None
        colour = _PARETO_COLOUR if run in front else "grey"
        axes.plot(tokens_per_s, ttft_s, "s" if run.is_simulated else "o", color=colour, label=label)
        place = (tokens_per_s, ttft_s)
        axes.annotate(_as_label(run.name), place, xytext=(5, 3), textcoords="offset points", fontsize="x-small")
    for kind in sorted({run.is_simulated for run in front}):
        of_kind = [run for run in front if run.is_simulated is kind]
        line = [(run.values["all"]["tokens_per_s"], run.latency_s(name, "ttft_s", "p99")) for run in of_kind]
        axes.plot(*zip(*line, strict=True), color=_PARETO_COLOUR, alpha=0.4, linestyle="--" if kind else "-")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="x-small")
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    of_its_kind = " of its kind" if _has_both_kinds(runs) else ""
    axes.set(xlabel="tokens per second, prompts and answers", ylabel=f"p99 TTFT of {name} prompts, seconds",
             title=f"Red: no other run{of_its_kind} is better in both")  # fmt: skip
    return save_figure(figure, out / "report_pareto.png")


def _has_both_kinds(runs: Sequence[ReportRun]) -> bool:
    return len({run.is_simulated for run in runs}) > 1


def _kind(run: ReportRun) -> str:
    return "simulated" if run.is_simulated else "measured"


def _named(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    """The run's name, by which tables and pictures call it, and what differs."""
    facts = [_kind(run)] if _has_both_kinds(runs) else []
    facts += [f"{_short(key)}={run.options[key]}" for key in distinguishing_keys(runs)[:4]]
    return f"{run.name}: {', '.join(facts)}" if facts else run.name


def _as_label(text: str) -> str:
    """As matplotlib shows it as it is: formulas stand between dollars, and legends leave out what begins with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _render(template: str, facts: dict[str, Any]) -> str:
    source = (importlib.resources.files("megatron_medha.cli.reports") / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=template.endswith(".html.j2"), keep_trailing_newline=True)
    environment.filters["data_url"] = _data_url
    return environment.from_string(source).render(facts)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
