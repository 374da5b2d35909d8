"""`medha report`: one page that puts runs side by side, simulated or measured, from what their directories hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_medha.cli.parts.arguments import parse_arguments
from megatron_medha.core.errors import ConfigError, DependencyError

USAGE = """\
usage: medha report DIR... [out=DIR]

Finds all runs in the directories (of medha simulate, medha bench, and their sweeps) and writes report.md and
report.html: the options in which the runs differ, latencies by length class, SLO attainment, goodput, and the Pareto
front of TTFT and throughput. The HTML page includes its pictures.

  out=DIR   where the report goes; by default into the first directory

examples:
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
    directories = [Path(word).expanduser() for word in arguments.overrides if word not in outs]
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such directory")
    if not directories:
        raise ConfigError("no directory to report on; give one or several")
    out = Path(outs[-1].removeprefix("out=")).expanduser() if outs else directories[0]
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError("a report needs matplotlib; pip install 'megatron_medha[plots]'")
    from megatron_medha.cli.reports.report_page import write_report
    from megatron_medha.cli.reports.report_runs import find_runs

    runs = find_runs(directories)
    if not runs:
        where = " ".join(map(str, directories))
        raise ConfigError(f"{where}: no finished run in there (a directory with summary.json)")
    for path in write_report(runs, out):
        print(path)
    return 0
