"""The files of a report: its two pages, figures as CSV and LaTeX, and pictures where matplotlib is installed."""

from __future__ import annotations

import base64
import importlib.resources
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from megatron_medha.cli.reports.report_groups import (
    LoadCurve,
    RunGroup,
    group_keys,
    group_runs,
    load_curves,
    load_key,
    pareto,
    short_key,
)
from megatron_medha.cli.reports.report_runs import ReportRun
from megatron_medha.cli.reports.report_table import capacity_table, latex_table, report_table, runs_csv
from megatron_medha.core.errors import ConfigError
from megatron_medha.stats.summary import CLASSES

NO_PICTURES = "no pictures: matplotlib is not installed (pip install 'megatron_medha[plots]')"
_MAX_RUN_PICTURES = 24  # runs whose own plots go onto the page
_SLO = {"ttft_s": None, "min_ttft_s": 0.5, "attainment": 0.9}  # of runs that have no options of an SLO


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Path    # of the SVG
    caption: str


def write_report(runs: Sequence[ReportRun], out: Path, over: str | None = None) -> list[Path]:
    """Write the report; returns its pages. over: the option that curves are drawn over; None: the load, if it varies.

    Raises ConfigError if nothing varies in `over`, or `out` cannot be written.
    """
    classes = [name for name in CLASSES if any(name in run.classes for run in runs)]
    groups = group_runs(runs)
    key = load_key(groups, over)
    if over is not None and key is None:
        varied = ", ".join(group_keys(groups)) or "none"
        raise ConfigError(f"x={over}: not an option with several numbers in these runs; those that differ: {varied}")
    curves = load_curves(groups, key) if key is not None else []
    slo = _SLO | {name: value for name in _SLO if (value := runs[0].options.get(f"slo.{name}")) is not None}
    front = pareto(groups, classes[0]) if key is None else []
    table = report_table(groups, classes)
    capacities = capacity_table(curves, key, slo["attainment"]) if key is not None else None
    drawn = [{"name": run.name, "pictures": found} for run in runs if (found := sorted(run.path.glob("*.png")))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = _pictures(groups, curves, classes, key, slo, out)
        facts: dict[str, Any] = {
            "num_runs": len(runs),
            "num_simulated": sum(run.is_simulated for run in runs),
            "what": _what_ran(runs),
            "table": table,
            "caption": _table_caption(groups, front, classes[0]),
            "capacities": capacities,
            "has_load": key is not None,
            "front": [group.name for group in front],
            "pictures": pictures,
            "origins": _origins(runs),
            "runs": drawn[:_MAX_RUN_PICTURES],
            "num_without_pictures": max(0, len(drawn) - _MAX_RUN_PICTURES),
        }
        texts = {
            "report.md": _render("report.md.j2", facts),
            "report.html": _render("report.html.j2", facts),
            "report.csv": runs_csv(runs, classes),
            "report.tex": latex_table(table, f"{facts['what']} {facts['caption']}"),
        }
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); name another directory") from error
    return [out / name for name in texts]


def can_draw() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def _pictures(
    groups: Sequence[RunGroup], curves: Sequence[LoadCurve], classes: Sequence[str], key: str | None,
    slo: dict[str, Any], out: Path,
) -> list[_Picture]:  # fmt: skip
    if not can_draw():
        return []
    from megatron_medha.cli.reports.report_pictures import load_plot, pareto_plot, ttft_bars

    # Runs under different loads do not compete: at little load any of them has a short TTFT.
    if key is not None:
        return [_Picture(load_plot(curves, classes, key, slo, out), _load_caption(groups, classes, key, slo))]
    pictures = [_Picture(ttft_bars(groups, classes, out), "TTFT by length class: the dot is p50, the bar p99.")]
    if (path := pareto_plot(groups, classes[0], out)) is not None:
        kinds = " of its kind" if len({group.is_simulated for group in groups}) > 1 else ""
        pictures.append(_Picture(path, f"p99 TTFT of {classes[0]} prompts over throughput. No other run{kinds} is "
                                       "better in both than the red ones."))  # fmt: skip
    return pictures


def _load_caption(groups: Sequence[RunGroup], classes: Sequence[str], key: str, slo: dict[str, Any]) -> str:
    over = "offered load" if key == "workload.qps" else short_key(key)
    text = (
        f"p99 TTFT of {' and of '.join(classes)} prompts, and the share of all requests that meet the SLO, over "
        f"{over}. The dashed line is the SLO ({slo['attainment']:.0%} of requests); crosses mark where it is first "
        "missed, by a straight line between the loads tried."
    )
    return f"{text} {_seeds_words(groups)}".strip()


def _table_caption(groups: Sequence[RunGroup], front: Sequence[RunGroup], name: str) -> str:
    text = (
        'TTFT counts from the arrival of a request; "meet SLO" is the share of requests that met every target of their '
        f"run. {_seeds_words(groups)}"
    ).strip()
    if not front:
        return text
    kinds = " of its kind" if len({group.is_simulated for group in groups}) > 1 else ""
    return (
        f"{text} No other run{kinds} has both a lower p99 TTFT of {name} prompts and more tokens per second than: "
        f"{'; '.join(group.name for group in front)}."
    )


def _seeds_words(groups: Sequence[RunGroup]) -> str:
    nums = {len(group.distinct_runs) for group in groups}
    if nums == {1}:
        return ""
    several = str(max(nums)) if len(nums) == 1 else f"up to {max(nums)}"
    return f"Figures are means of {several} seeds, intervals go from the least seed to the greatest."


def _what_ran(runs: Sequence[ReportRun]) -> str:
    """What all runs have in common, as far as a caption says it."""
    def same(key: str) -> Any:
        values = {json.dumps(run.options.get(key)) for run in runs}
        return json.loads(values.pop()) if len(values) == 1 else None

    kind = "Simulated" if all(run.is_simulated for run in runs) else "Measured"
    kind = kind if len({run.is_simulated for run in runs}) == 1 else "Measured and simulated"
    facts = [str(name)] if (name := same("model.shape.name")) else []
    degrees = [same(f"parallel.{one}") for one in ("tp", "spp", "kvp")]
    if (hardware := same("hardware.name")) and None not in degrees:
        num_gpus = degrees[0] * degrees[1] * degrees[2]
        facts.append(f"{num_gpus} {hardware} (tp={degrees[0]} spp={degrees[1]} kvp={degrees[2]})")
    if (share := same("workload.long_share")) is not None and same("workload.path") is None:
        facts.append(f"{share:.1%} of requests long")
    if path := same("workload.path"):
        facts.append(f"trace {Path(path).name}")
    if seconds := same("workload.duration_s"):
        facts.append(f"{seconds:g} s of arrivals a run")
    return f"{kind}: {', '.join(facts)}." if facts else f"{kind}."


def _origins(runs: Sequence[ReportRun]) -> list[str]:
    """Commits and machines of the runs, each once."""
    found: dict[str, None] = {}
    for run in runs:
        try:
            facts = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
            words = [f"commit {facts['commit']}" if facts.get("commit") else "",
                     f"version {facts['versions']['megatron_medha']}",
                     f"Python {facts['versions']['python']}",
                     *([f"{facts['machine']['cpu']}, {facts['machine']['num_cores']} cores"] if "machine" in facts
                       else [])]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[", ".join(word for word in words if word)] = None
    return list(found)


def _render(template: str, facts: dict[str, Any]) -> str:
    source = (importlib.resources.files("megatron_medha.cli.reports") / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=template.endswith(".html.j2"), keep_trailing_newline=True)
    environment.filters["data_url"] = data_url
    environment.filters["in_cell"] = _in_cell
    return environment.from_string(source).render(facts)


def _in_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def data_url(path: Path) -> str:
    """A picture as an address that holds it."""
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
