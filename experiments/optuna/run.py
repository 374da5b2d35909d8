"""A step budget better than the default for a named workload, found by Optuna through `medha simulate -m`.

    python -m experiments.optuna.run                # the default on both layouts, 24 trials, table and picture
    python -m experiments.optuna.run --report DIR   # table and picture of a sweep directory, e.g. one still running

Whatever has run already in the output directory is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.lib.drawing import panels
from megatron_medha.cli.medha import main as medha
from megatron_medha.cli.reports.report_runs import ReportRun, find_runs

HERE = Path(__file__).parent
CONF = HERE / "conf"
# Chats beside one long prompt in twenty on 16 A100, for readers who want a first token within half a second and then
# 33 tokens a second: a step of the default budget (50 ms) is too long for that.
WORDS = (
    "model=llama3_8b", "hardware=a100_x16", "workload=medha_mix_05pct", "workload.duration_s=150", "seed=42",
    "max_drain_s=60", "slo.ttft_s=0.5", "slo.tpot_s=0.03", "plots=never", "record.trace_duration_s=0",
)  # fmt: skip
LAYOUTS = ("tp8_spp2", "tp4_spp4")


@dataclass(frozen=True, slots=True)
class Trial:
    """What was tried, and what came of it."""

    name: str
    layout: str
    step_budget_s: float
    slack_margin_steps: float
    goodput_per_s: float  # requests that meet their targets; the objective
    attainment: float
    tpot_p50_s: float


def trial(run: ReportRun) -> Trial:
    """From a run directory."""
    options, everything = run.options, run.values["all"]
    return Trial(
        name=run.path.name,
        layout=f"tp{options['parallel.tp']}_spp{options['parallel.spp']}",
        step_budget_s=float(options["scheduler.step_budget_s"]),
        slack_margin_steps=float(options["scheduler.slack_margin_steps"]),
        goodput_per_s=everything["goodput_per_s"],
        attainment=everything["attainment"],
        tpot_p50_s=everything["tpot_s"]["p50"],
    )


def simulate_all(out: Path) -> None:
    """The default on every layout, then the sweep."""
    for layout in LAYOUTS:
        default = out / f"default-{layout}"
        if not (default / "summary.json").exists():
            medha(["simulate", "--config-dir", str(CONF), *WORDS, f"parallel={layout}", f"out={default}"])
    medha(["simulate", "-m", "--config-dir", str(CONF), "hydra/sweeper=optuna_step_budget", *WORDS,
           f"out={out / 'sweep'}"])  # fmt: skip


def main() -> int:
    """Run what is missing, draw; 1 if no trial is better than the default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("multirun/optuna"), help="default multirun/optuna")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run nothing; DIR holds a sweep's directories")
    arguments = parser.parse_args()
    if arguments.report is None:
        simulate_all(arguments.out)
    found = [trial(run) for run in find_runs([arguments.report or arguments.out])]
    defaults = [one for one in found if one.name.startswith("default")]
    tried = [one for one in found if one.name.isdecimal()]
    if not tried:
        parser.error(f"{arguments.report or arguments.out}: no finished trial in there")
    best = max(tried, key=lambda one: one.goodput_per_s)
    print("| | layout | step budget | margin, steps | goodput, requests/s | meet both targets | TPOT p50 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in [*defaults, best]:
        what = f"trial {one.name}" if one is best else "default"
        print(f"| {what} | {one.layout} | {1000 * one.step_budget_s:.1f} ms | {one.slack_margin_steps:g} "
              f"| {one.goodput_per_s:.3f} | {one.attainment:.0%} | {1000 * one.tpot_p50_s:.1f} ms |")
    draw(tried, defaults, (arguments.report or HERE) / "optuna.png")
    if arguments.report is not None:
        return 0
    kept = {"words": WORDS, "defaults": [asdict(one) for one in defaults], "trials": [asdict(one) for one in tried]}
    (arguments.out / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if best.goodput_per_s > max(one.goodput_per_s for one in defaults) else 1


def draw(tried: list[Trial], defaults: list[Trial], path: Path) -> None:
    """Best so far by trial, and the objective by step budget."""
    made, (progress, budget) = panels(columns=2, width=5.5, height=3.8)
    goodput = [one.goodput_per_s for one in tried]
    progress.plot(range(len(tried)), goodput, "o", color="0.6", label="trial")
    progress.step(range(len(tried)), [max(goodput[: end + 1]) for end in range(len(goodput))], where="post",
                  label="best so far")  # fmt: skip
    progress.set_xlabel("trial")
    progress.set_ylabel("requests/s that meet both targets")
    for layout, color in zip(LAYOUTS, ("#1f77b4", "#ff7f0e"), strict=True):
        for chosen, marker, name in ((tried, "o", layout), (defaults, "*", f"{layout}, default")):
            points = [one for one in chosen if one.layout == layout]
            budget.plot([1000 * one.step_budget_s for one in points], [one.goodput_per_s for one in points], marker,
                        color=color, label=name, markersize=14 if marker == "*" else 6)  # fmt: skip
    budget.set_xscale("log")
    budget.set_xlabel("scheduler.step_budget_s, ms")
    for axes in (progress, budget):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
