"""The paper's headline on the simulator: Llama-3 8B on 16 A100, chats with 0, 1 or 5% long prompts, every baseline.

    python -m experiments.headline.run --jobs 2              # 10 simulated minutes of everything; capacities
    python -m experiments.headline.run --hour                # a simulated hour of four systems at the headline's load
    python -m experiments.headline.run --report              # the table and the picture from results.json alone

Poisson arrivals; deadlines, seed and attainment target are those of the Medha authors' harness: first token within
max(1.5 x the prompt's prefill alone, 0.5 s) for 90% of all requests, seed 42. The same deadlines hold for all systems.
A run ends after a third of its time again without arrivals; a prompt without its first token by then counts with the
time it has waited, so that the figures of systems that leave many of them are too low, not too high.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from megatron_medha.system.compiled_core import use_compiled_core

use_compiled_core()  # in the processes of a run too: each imports this file

from experiments.headline.report import report
from experiments.headline.systems import LAYOUT, TITLES, build, cluster
from experiments.lib.paper import Cluster, Results, measure, quiet
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.stats.outcome import Slo
from megatron_medha.stats.summary import LengthClasses, percentile
from megatron_medha.workload.workload import Workload, WorkloadConfig

HERE = Path(__file__).parent
LONG_SHARES = {"0": 0.0, "1": 0.00995, "5": 0.0488}  # as measured in the authors' files of that name
SETTINGS = {"model": "llama3_8b", "hardware": "a100_x16", "seed": 42, "ttft_multiplier": 1.5, "min_ttft_s": 0.5}
CAPACITY_SYSTEMS = (
    "lars", "lars_no_margin", "medha_srpt", "hrrn", "loongserve", "loongserve_blocking", "loongserve_reserved",
    "loongserve_eager", "vllm_long_threshold", "static_cp", "vllm_chunk_2048",
)  # fmt: skip
OURS_AND_LOONGSERVE = ("lars", "lars_no_margin", "loongserve_blocking", "loongserve", "loongserve_reserved")
POLICIES = ("medha_fcfs", "medha_edf", "medha_lrs", "lars_no_triage", "lars_no_sharing", "lars_no_progress")
CHUNKED = ("vllm_chunk_2048", "vllm_chunk_512")
# Beside 5% long at 0.75 requests/s: which systems run what, by share of long prompts and requests/s.
OTHERS = {
    ("1", 0.75): OURS_AND_LOONGSERVE,
    ("0", 0.75): OURS_AND_LOONGSERVE,
    ("5", 0.25): ("lars", "lars_no_margin", "loongserve_blocking", "loongserve", *POLICIES, *CHUNKED),
    ("5", 1.25): ("lars", "lars_no_margin", "loongserve_reserved"),
    ("5", 1.75): ("lars", *CHUNKED),
    ("0", 0.25): ("lars", "loongserve", "loongserve_blocking"),
    ("0", 1.75): ("lars", "loongserve", "loongserve_blocking"),
}
HOUR_SYSTEMS, HOUR_MINUTES = ("lars", "vllm_chunk_2048", "loongserve", "loongserve_blocking"), 60
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


def plan(system: str, minutes: int) -> list[Run]:
    """What the tables need of a system, in the order of what matters most."""
    runs = [Run(system, "5", 0.75, minutes)]
    return runs + [Run(system, percent, qps, minutes) for (percent, qps), names in OTHERS.items() if system in names]


@dataclass(slots=True)
class Capacity:
    """The most requests/s of CAPACITY_QPS at which 90% meet their deadline, and the next, at which they do not."""

    low: int = 0                        # passes, or 0
    high: int = len(CAPACITY_QPS) - 1   # does not

    def qps(self) -> Iterator[float]:
        """The loads to try; after each, `note` what came of it."""
        while self.high - self.low > 1:
            yield CAPACITY_QPS[(self.low + self.high) // 2]

    def note(self, attainment: float) -> None:
        """Of the load tried last."""
        middle = (self.low + self.high) // 2
        if attainment >= ATTAINMENT:
            self.low = middle
        else:
            self.high = middle


@cache
def _cluster() -> tuple[Cluster, IsolatedTimes]:
    """Of this process."""
    on = cluster()
    return on, on.isolated(LAYOUT, 1_000_000)


def simulate(run: Run) -> dict[str, Any]:
    """One simulation; nothing is remembered but times of prompts alone."""
    on, isolated_s = _cluster()
    system = build(run.system, on)
    workload = WorkloadConfig(long_share=LONG_SHARES[run.percent], qps=run.qps, duration_s=60.0 * run.minutes)
    return measure(
        system.decisions, workload, 42, isolated_s, Slo(), runs_on=system.runs_on, front_s=on.engine.request_s,
        drain_s=20.0 * run.minutes, label=run.name,
    ).values(LengthClasses())  # fmt: skip


def simulate_all(systems: list[str], minutes: int, results: Results, num_jobs: int) -> None:
    """Run what is missing: one system after the other in each of so many processes."""
    lock = Lock()
    with (
        ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn"), initializer=quiet) as processes,
        ThreadPoolExecutor(num_jobs) as threads,
        tqdm(unit="run", desc="headline", smoothing=0.0) as bar,
    ):
        bar.total = sum(len(plan(name, minutes)) + 2 * (name in CAPACITY_SYSTEMS) for name in systems)

        def simulated(run: Run) -> dict[str, Any]:
            if run.name not in results.runs:
                values = processes.submit(simulate, run).result()
                with lock:
                    results.put(run.name, values)
            with lock:
                bar.update()
            values = results.runs[run.name]
            return values

        def all_of(name: str) -> None:
            for run in plan(name, minutes):
                simulated(run)
            if name in CAPACITY_SYSTEMS:
                capacity = Capacity()
                for qps in capacity.qps():
                    capacity.note(simulated(Run(name, "5", qps, minutes))["all"]["attainment"])
                with lock:
                    results.note("capacity", name, (CAPACITY_QPS[capacity.low], CAPACITY_QPS[capacity.high]))

        for done in [threads.submit(all_of, name) for name in systems]:
            done.result()
    results.sort()


def simulate_hour(results: Results) -> None:
    """The headline's load for an hour, of the systems of which that is missing."""
    for name in tqdm(HOUR_SYSTEMS, unit="run", desc="an hour of each"):
        run = Run(name, "5", 0.75, HOUR_MINUTES)
        if run.name not in results.runs:
            results.put(run.name, simulate(run))
    results.sort()


def print_alone(minutes: int) -> None:
    """TTFT had every prompt of the headline's load the machine to itself: what no order of them can undercut."""
    _, isolated_s = _cluster()
    workload = Workload(WorkloadConfig(long_share=LONG_SHARES["5"], qps=0.75, duration_s=60.0 * minutes), 42)
    alone_s = sorted(isolated_s(request.num_prompt_tokens) for request in workload.requests())
    figures = ", ".join(f"p{percent} {percentile(alone_s, percent):.3g} s" for percent in (50, 90, 99))
    print(f"\nevery prompt alone on the machine, {minutes} minutes: TTFT {figures}; {sum(alone_s):,.0f} s in all")


def main() -> int:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10, help="simulated minutes of arrivals (default 10)")
    parser.add_argument("--only", help="systems, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--hour", action="store_true", help="5%% long at 0.75 requests/s for an hour, nothing else")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS)
    wanted = list(TITLES) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in wanted if name not in TITLES]:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(TITLES)}")
    if arguments.hour:
        simulate_hour(results)
    elif not arguments.report:
        simulate_all(wanted, arguments.minutes, results, arguments.jobs)
    for minutes in (arguments.minutes, HOUR_MINUTES):
        print_alone(minutes)
    return report(results.runs, results.notes("capacity"), arguments.minutes, HERE)


if __name__ == "__main__":
    sys.exit(main())
