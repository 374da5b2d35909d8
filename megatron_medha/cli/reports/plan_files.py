"""The files of a plan: all figures as JSON and CSV, and a page with its picture where matplotlib is installed."""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.cli.reports.plan_table import (
    asked_text,
    attainment_text,
    best_first,
    cost_text,
    gpus_text,
    interval_text,
    serve_command,
    settings_text,
    usd_per_million_tokens,
)
from megatron_medha.cli.reports.report_page import NO_PICTURES, can_draw, data_url
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.plan_options import PlanOptions
from megatron_medha.sim.planning.candidate import CandidateVerdict, PlanCandidate
from megatron_medha.sim.planning.load_plan import LoadPlan, attainment_intervals
from megatron_medha.stats.summary import CLASSES

_MAX_ROWS = 60  # of candidates on the page; all are in plan.csv


def check_plan_directory(out: Path | None) -> None:
    """Raises ConfigError before the search if its files cannot be written."""
    if out is None:
        return
    try:
        out.expanduser().mkdir(parents=True, exist_ok=True)
        (out.expanduser() / "plan.json").touch()
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); name another directory") from error


def write_plan(options: PlanOptions, plans: Sequence[LoadPlan], words: Sequence[str]) -> list[Path]:
    """Write plan.json, plan.csv, plan.html and the pictures; the paths of the first three. options: of any load."""
    assert options.out is not None
    out = options.out.expanduser()
    typed = JobWords.of("plan", words)
    values = {
        **typed.origin(),
        "model": options.model.shape.name if options.model.shape else None,
        "hardware": options.hardware.name,
        "attainment": options.slo.attainment,
        "each_class": options.each_class,
        "loads": [_load_values(options, plan, words) for plan in plans],
    }
    picture = None
    if can_draw() and any(plan.curve or plan.bounds for plan in plans):
        from megatron_medha.cli.reports.plan_pictures import plan_picture

        picture = plan_picture(options, plans, out)
    texts = {
        "plan.json": json.dumps(values, indent=1) + "\n",
        "plan.csv": _csv(options, plans),
        "plan.html": _page(options, plans, words, picture, values),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    if not can_draw():
        print(NO_PICTURES)
    return [out / name for name in texts]


def _load_values(options: PlanOptions, plan: LoadPlan, words: Sequence[str]) -> dict[str, Any]:
    window, winner = plan.window, plan.winner
    return {
        "qps": plan.qps,
        "requests": {
            "seconds": window.seconds, "by_class": window.num_by_class, "prompt_tokens": window.num_prompt_tokens,
            "output_tokens": window.num_output_tokens, "longest_prompt_tokens": window.longest_prompt_tokens,
        },
        "why_none": plan.why_none or None,
        "longest_prompt_alone": [
            {**_layout_values(bound.trial), "prompt_tokens": bound.longest_prompt_tokens,
             "ttft_s": bound.longest_ttft_s, "why_not": bound.why or None}
            for bound in plan.bounds
        ],
        "best": winner and _verdict_values(options, plan, winner),
        "serve": winner and serve_command(winner.trial, words),
        "best_by_contender": {name: one and _verdict_values(options, plan, one) for name, one in plan.best.items()},
        "gpus_and_attainment": [_verdict_values(options, plan, one) for one in plan.curve],
        "candidates": [_verdict_values(options, plan, one) for one in best_first(plan.verdicts)],
    }  # fmt: skip


def _layout_values(trial: PlanCandidate) -> dict[str, Any]:
    layout = trial.config.setup.layout
    return {"contender": trial.name, "gpus": trial.num_gpus, "tp": layout.tp, "spp": layout.spp, "kvp": layout.kvp,
            "dp": trial.dp}  # fmt: skip


def _verdict_values(options: PlanOptions, plan: LoadPlan, verdict: CandidateVerdict) -> dict[str, Any]:
    usd = usd_per_million_tokens(options, verdict.trial, plan.qps, plan.window) if verdict.passes else None
    ttft_p90_s: Mapping[str, float | None] = verdict.ttft_p90_s or {}
    return {
        **_layout_values(verdict.trial),
        "passes": verdict.passes,
        "attainment": {
            name: {"share": share, "low": low, "high": high}
            for name, (share, low, high) in attainment_intervals(verdict, plan.window).items()
        },
        "ttft_p90_s": dict(ttft_p90_s),
        "tpot_p90_s": verdict.tpot_p90_s,
        "utilisation": verdict.utilisation,
        "usd_per_million_output_tokens": usd and usd[0],
        "usd_per_million_tokens": usd and usd[1],
        "why": verdict.why or None,
    }


def _csv(options: PlanOptions, plans: Sequence[LoadPlan]) -> str:
    """A row for each candidate that was tried, and for each point of the curves that was run to its end."""
    shares = [f"{name}.{one}" for name in ("all", *CLASSES) for one in ("attainment", "low", "high")]
    names = ("contender", "gpus", "tp", "spp", "kvp", "dp", "passes")
    rows = [["qps", *names, *shares, *(f"{name}.ttft_p90_s" for name in CLASSES), "tpot_p90_s",
             "usd_per_million_output_tokens", "usd_per_million_tokens", "why"]]  # fmt: skip
    for plan in plans:
        # A trial that ended early is in there as what it came to when it was run to its end, if it was.
        whole = {_identity(one): one for one in plan.curve}
        for verdict in plan.verdicts:
            values = _verdict_values(options, plan, whole.get(_identity(verdict), verdict))
            row = [plan.qps, *(values[name] for name in names)]
            for name in ("all", *CLASSES):
                found = values["attainment"].get(name, {})
                row += [found.get(one) for one in ("share", "low", "high")]
            row += [values["ttft_p90_s"].get(name) for name in CLASSES]
            row += [values[name] for name in (
                "tpot_p90_s", "usd_per_million_output_tokens", "usd_per_million_tokens"
            )]  # fmt: skip
            rows.append(["" if cell is None else str(cell) for cell in (*row, verdict.why)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _identity(verdict: CandidateVerdict) -> tuple[object, ...]:
    return tuple(_layout_values(verdict.trial).values())


def _page(
    options: PlanOptions, plans: Sequence[LoadPlan], words: Sequence[str], picture: Path | None, values: dict[str, Any]
) -> str:  # fmt: skip
    source = (importlib.resources.files("megatron_medha.cli.reports") / "plan.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["data_url"] = data_url
    several = len(plans) > 1
    caption = (
        "Attainment of the best candidate of each size, by class, with 95% confidence intervals"
        if any(plan.curve for plan in plans) else "First token of the longest prompt, alone on each layout"
    ) + (", at the highest load" if several else "")
    if several:
        caption = f"Left: the fewest GPUs that meet the SLO, over load. Right: {caption[0].lower()}{caption[1:]}"
    return environment.from_string(source).render(
        title=f"{values['model']} on {values['hardware']}",
        asked=asked_text(options),
        command=values["command"],
        commit=values["commit"],
        picture=picture,
        caption=f"{caption}. The dashed line is the SLO.",
        loads=[_load_facts(options, plan, words) for plan in plans],
    )


def _load_facts(options: PlanOptions, plan: LoadPlan, words: Sequence[str]) -> dict[str, Any]:
    window, winner = plan.window, plan.winner
    requests = " and ".join(f"{count:,} {name}" for name, count in window.num_by_class.items())
    facts: dict[str, Any] = {
        "qps": f"{plan.qps:.3g}",
        "requests": f"Every candidate is given the same {window.seconds:,.0f} s of the workload: {requests} requests",
        "why_none": plan.why_none,
        "bounds": [
            (settings_text(bound.trial).partition(" on ")[0], f"{bound.longest_ttft_s:.2f} s", bound.why)
            for bound in plan.bounds[:_MAX_ROWS]
        ],
        "longest": f"{window.longest_prompt_tokens:,}",
        "num_tried": len(plan.verdicts),
        "rows": [
            (one.passes, gpus_text(one.trial.num_gpus), settings_text(one.trial),
             attainment_text(one) if one.attainment is not None else "-", one.why)
            for one in best_first(plan.verdicts)[:_MAX_ROWS]
        ],
    }  # fmt: skip
    if winner is not None:
        facts |= {
            "answer": gpus_text(winner.trial.num_gpus),
            "settings": settings_text(winner.trial),
            "attainment": attainment_text(winner),
            "interval": interval_text(winner, window.num_by_class),
            "cost": cost_text(options, winner.trial, plan.qps, window),
            "serve": serve_command(winner.trial, words),
        }
    return facts
