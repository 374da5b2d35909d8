"""The paper's headline on the simulator: Llama-3 8B on 16 A100, chats with 0, 1 or 5% long prompts, every baseline.

    python -m experiments.headline.run                       # 10 simulated minutes of everything; capacities; hours
    python -m experiments.headline.run --only lars,loongserve
    python -m experiments.headline.run --report              # the table and the picture from results.json alone

Poisson arrivals; deadlines, seed and attainment target are those of the Medha authors' harness: first token within
max(1.5 x the prompt's prefill alone, 0.5 s) for 90% of all requests, seed 42. The same deadlines hold for all systems.
A run ends after a third of its time again without arrivals; a prompt without its first token by then counts with the
time it has waited, so that the figures of systems that leave many of them are too low, not too high.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.headline.report import report
from experiments.headline.systems import LAYOUT, TITLES, build, cluster
from experiments.lib.paper import Results, measure
from megatron_medha.engine.outcome import Slo
from megatron_medha.engine.summary import LengthClasses
from megatron_medha.engine.workload import WorkloadConfig

HERE = Path(__file__).parent
LONG_SHARES = {"0": 0.0, "1": 0.00995, "5": 0.0488}  # as measured in the authors' files of that name
SETTINGS = {"model": "llama3_8b", "hardware": "a100_x16", "seed": 42, "ttft_multiplier": 1.5, "min_ttft_s": 0.5}
KEY_SYSTEMS = (
    "lars", "lars_no_margin", "medha_srpt", "hrrn", "loongserve", "loongserve_blocking", "loongserve_reserved",
    "loongserve_eager", "vllm_long_threshold", "static_cp", "vllm_chunk_2048",
)  # fmt: skip
HOUR_SYSTEMS = ("lars", "loongserve_blocking", "loongserve", "vllm_chunk_2048")
CAPACITY_QPS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    system: str
    percent: str
    qps: float
    minutes: int

    @property
    def name(self) -> str:
        """Its key in results.json."""
        return f"{self.system} {self.percent}% {self.qps:g}/s {self.minutes}min"


def plan(minutes: int) -> list[Run]:
    """What the tables need, in the order of what matters most."""
    runs = [Run(system, "5", 0.75, minutes) for system in (*KEY_SYSTEMS, *TITLES)]
    return list(dict.fromkeys(runs))


def later(minutes: int) -> list[Run]:
    """What comes after the capacities; hours last, for they take the longest."""
    runs = [Run(system, percent, 0.75, minutes) for percent in ("1", "0") for system in KEY_SYSTEMS]
    runs += [Run(system, "5", qps, minutes) for qps in (0.25, 1.25) for system in KEY_SYSTEMS]
    return runs + [Run(system, "5", 0.75, 60) for system in HOUR_SYSTEMS]


def capacity(run: Callable[[Run], dict[str, Any]], system: str, minutes: int) -> tuple[float, float]:
    """The most requests/s of CAPACITY_QPS at which 90% meet their deadline, and the next, at which they do not."""
    low, high = 0, len(CAPACITY_QPS) - 1  # passes, or 0; does not
    while high - low > 1:
        middle = (low + high) // 2
        if run(Run(system, "5", CAPACITY_QPS[middle], minutes))["all"]["attainment"] >= ATTAINMENT:
            low = middle
        else:
            high = middle
    return CAPACITY_QPS[low], CAPACITY_QPS[high]


def main() -> int:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10, help="simulated minutes of arrivals (default 10)")
    parser.add_argument("--only", help="systems, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS)
    wanted = list(TITLES) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in wanted if name not in TITLES]:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(TITLES)}")
    if not arguments.report:
        on = cluster()
        isolated_s = on.isolated(LAYOUT, 1_000_000)

        def simulated(run: Run) -> dict[str, Any]:
            if run.name not in results.runs:
                system = build(run.system, on)
                workload = WorkloadConfig(
                    long_share=LONG_SHARES[run.percent], qps=run.qps, duration_s=60.0 * run.minutes
                )
                measured = measure(
                    system.decisions, workload, 42, isolated_s, Slo(), runs_on=system.runs_on,
                    front_s=on.engine.request_s, drain_s=20.0 * run.minutes, label=run.name,
                )  # fmt: skip
                results.put(run.name, measured.values(LengthClasses()))
            values: dict[str, Any] = results.runs[run.name]
            return values

        for run in plan(arguments.minutes):
            if run.system in wanted:
                simulated(run)
        for name in KEY_SYSTEMS:
            if name in wanted:
                results.note("capacity", name, capacity(simulated, name, arguments.minutes))
        for run in later(arguments.minutes):
            if run.system in wanted:
                simulated(run)
    return report(results.runs, results.notes("capacity"), arguments.minutes, HERE)


if __name__ == "__main__":
    sys.exit(main())
