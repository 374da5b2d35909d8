"""`medha report`: one page that puts runs side by side, simulated or measured, from what their directories hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.core.errors import ConfigError

USAGE = """\
usage: medha report DIR... [out=DIR] [x=KEY]

Finds all runs in the directories (of medha simulate, medha bench, and their sweeps) and compares them. Runs that differ
in their seed alone are one row, with the mean and the interval. Where the load differs (workload.qps, concurrency), it
draws p99 TTFT and SLO attainment over load, a line for each policy, and says at which load the SLO is missed.
Otherwise: TTFT of every run, and the Pareto front of TTFT and throughput.

Writes report.html (includes its pictures), report.md, report.csv (figures of every run), report.tex (the table), and
pictures as SVG and PDF. Pictures need matplotlib: pip install 'megatron_medha[plots]'.

  out=DIR   where the report goes; by default into the first directory
  x=KEY     the option that curves are drawn over, such as scheduler.step_budget_s, instead of the load

examples:
  medha simulate -m scheduler=fcfs,edf,lars workload.qps=0.25,0.5,0.75 seed=0,1,2 out=multirun/policies
  medha report multirun/policies
  medha report outputs/bench/2026-11-20-101500 multirun/policies out=reports/a
"""


def run(words: Sequence[str]) -> int:
    """Write a report."""
    arguments = parse_arguments(words)
    if arguments.wants_help or not words:
        print(USAGE, end="")
        return 0
    outs = [word for word in arguments.overrides if word.startswith("out=")]
    over = [word.removeprefix("x=") for word in arguments.overrides if word.startswith("x=")]
    directories = [Path(word).expanduser() for word in arguments.overrides if not word.startswith(("out=", "x="))]
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such directory")
    if not directories:
        raise ConfigError("no directory to report on; give one or several")
    out = Path(outs[-1].removeprefix("out=")).expanduser() if outs else directories[0]
    from megatron_medha.cli.reports.report_page import NO_PICTURES, can_draw, write_report
    from megatron_medha.cli.reports.report_runs import find_runs

    runs = find_runs(directories)
    if not runs:
        where = " ".join(map(str, directories))
        raise ConfigError(f"{where}: no finished run in there (a directory with summary.json)")
    for path in write_report(runs, out, over[-1] if over else None):
        print(path)
    if not can_draw():
        print(NO_PICTURES)
    return 0
