"""Batches that may be held: what large chunks that others overtake bring, simulated and on the real server.

    python -m experiments.overtaking.run                             # simulated, a minute or two
    python -m experiments.overtaking.run --minutes 10 --qps 0.5 0.75 1 1.25
    python -m experiments.overtaking.run --engine checkpoints/tiny   # on this machine

Simulated: the paper's mix (one prompt in twenty has 100K to 1M tokens) on 16 A100 and on 64 H100, with and without
scheduler.interruptible. Printed per load: TTFT by class, the time between tokens, and how many of all requests meet the
SLO; then the highest of these loads that at least 90% meet it at. Long prompts that run alone: their TTFT by length.

--engine: a lone long prompt under LARS, with and without, against whole prompts under FCFS; then short prompts that
arrive while it is computed, against the same ones on an idle server (experiments/no_convoy measures it). Bars: the lone
prompt within 3% of whole-prompt FCFS; p99 of the short ones at most twice that of the idle server.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.lib.server_process import serving
from experiments.lib.simulations import configured
from experiments.no_convoy.run import Outcome, measure
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.sim.system import build_system, pipeline_for
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.summary import percentile

MACHINES = {
    "16 A100, 8B, tp 8 spp 2": ["model=llama3_8b", "hardware=a100_x16", "parallel.tp=8", "parallel.spp=2"],
    "64 H100, 70B, tp 8 spp 8": ["model=llama3_70b", "hardware=h100_x64", "parallel.tp=8", "parallel.spp=8"],
}
LOADS = {"16 A100, 8B, tp 8 spp 2": (0.25, 0.5, 0.75), "64 H100, 70B, tp 8 spp 8": (0.1, 0.25, 0.5)}
LONE_TOKENS = (2_000, 8_000, 32_000, 128_000, 500_000)
MIN_ATTAINMENT = 0.9
MAX_SLOWDOWN = 1.03  # of a lone prompt, over whole-prompt FCFS
MAX_WAIT = 2.0       # of short prompts' p99, over that of the idle server


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation's figures, seconds."""

    qps: float
    is_interruptible: bool
    short_p50_s: float
    short_p99_s: float
    long_p50_s: float
    long_p90_s: float
    tbt_p99_s: float
    attainment: float


def simulated(machine: str, args: argparse.Namespace) -> list[Run]:
    """All loads on a machine, with and without."""
    runs = []
    for qps in args.qps or LOADS[machine]:
        for is_interruptible in (False, True):
            config = configured([
                *MACHINES[machine], "workload=medha_mix_05pct", f"workload.qps={qps}", f"seed={args.seed}",
                f"workload.duration_s={60 * args.minutes}", f"max_drain_s={20 * args.minutes}",
                f"scheduler.interruptible={str(is_interruptible).lower()}",
            ])  # fmt: skip
            values = Simulation(config).run(SimulationHooks()).values
            short, long = values["classes"]["short"], values["classes"]["long"]
            runs.append(Run(
                qps, is_interruptible, short["ttft_s"]["p50"], short["ttft_s"]["p99"], long["ttft_s"]["p50"],
                long["ttft_s"]["p90"], short["tbt_s"]["p99"], values["all"]["attainment"],
            ))  # fmt: skip
            print(row(runs[-1]), flush=True)
    return runs


HEAD = (
    f"{'load, 1/s':>10} {'held':>5} {'short p50':>10} {'short p99':>10} {'long p50':>9} {'long p90':>9} {'TBT p99':>9} "
    f"{'meet SLO':>9}"
)


def row(run: Run) -> str:
    """For a terminal."""
    return (
        f"{run.qps:>10g} {'yes' if run.is_interruptible else 'no':>5} {1e3 * run.short_p50_s:>7.0f} ms "
        f"{1e3 * run.short_p99_s:>7.0f} ms {run.long_p50_s:>7.1f} s {run.long_p90_s:>7.1f} s "
        f"{1e3 * run.tbt_p99_s:>6.1f} ms {run.attainment:>9.1%}"
    )


def carried(runs: list[Run], is_interruptible: bool) -> str:
    """The highest load at which enough requests meet the SLO."""
    kept = [run.qps for run in runs if run.is_interruptible is is_interruptible and run.attainment >= MIN_ATTAINMENT]
    return f"{max(kept):g}/s" if kept else "none of these"


def lone_s(config: SimulationConfig, is_interruptible: bool, num_tokens: int) -> float:
    """TTFT of a prompt alone."""
    setup = config.setup
    setup = replace(setup, config=replace(setup.config, interruptible=is_interruptible), learns=False)
    cost = setup.cluster_cost
    truth = Truth(cost, setup.shard_tokens, TruthConfig(), seed=0)
    return IsolatedTimes(
        lambda: build_system(setup), truth, lambda: pipeline_for(setup), num_tokens, cost.engine.request_s
    )(num_tokens)


def report_simulated(args: argparse.Namespace) -> None:
    """Both machines."""
    for machine, options in MACHINES.items():
        print(f"\n{machine}: {args.minutes:g} simulated minutes, seed {args.seed}\n{HEAD}")
        runs = simulated(machine, args)
        loads = f"{carried(runs, False)} without, {carried(runs, True)} with"
        print(f"highest load at which {MIN_ATTAINMENT:.0%} meet the SLO: {loads}")
        config = configured([*options, "workload=medha_mix_05pct", "workload.duration_s=10"])
        print("alone, without and with: " + "; ".join(
            f"{tokens:,} tokens {lone_s(config, False, tokens):.3f} s, {lone_s(config, True, tokens):.3f} s"
            for tokens in LONE_TOKENS
        ))  # fmt: skip


SETTINGS = {
    "lars, interruptible": ["scheduler=lars", "scheduler.interruptible=true"],
    "lars": ["scheduler=lars", "scheduler.interruptible=false"],
    "fcfs, whole prompts": ["scheduler=whole_prompt", "scheduler.interruptible=false"],
}


def report_engine(args: argparse.Namespace) -> bool:
    """Figures beside bars; whether they are kept."""
    outcomes: dict[str, Outcome] = {}
    print(f"{'setting':<22}{'idle p50':>10}{'idle p99':>10}{'short p50':>11}{'short p99':>11}{'long alone':>12}"
          f"{'long beside':>13}")  # fmt: skip
    for setting, options in SETTINGS.items():
        with tempfile.TemporaryDirectory() as directory:
            log = args.logs / f"decisions_{setting.split(',')[0]}_{len(outcomes)}.jsonl" if args.logs else (
                Path(directory) / "decisions.jsonl"
            )
            words = [f"checkpoint={args.engine}", f"tracking.decision_log={log}", *options, *args.override]
            with serving(*words) as port:
                outcomes[setting] = one = asyncio.run(measure(setting, port, args))
        print(f"{setting:<22}{statistics.median(one.idle_s):>10.3f}{p99(one.idle_s):>10.3f}"
              f"{statistics.median(one.beside_s):>11.3f}{one.short_p99_s:>11.3f}{one.long_alone_s:>12.2f}"
              f"{one.long_beside_s:>13.2f}", flush=True)  # fmt: skip
    ours, whole = outcomes["lars, interruptible"], outcomes["fcfs, whole prompts"]
    slowdown, wait = ours.long_alone_s / whole.long_alone_s, ours.short_p99_s / p99(ours.idle_s)
    kept = [verdict(slowdown, MAX_SLOWDOWN), verdict(wait, MAX_WAIT)]
    print(f"\nlone prompt over whole-prompt FCFS   {slowdown:.3f}   bar {MAX_SLOWDOWN}   {kept[0]}")
    print(f"short p99 beside it over idle p99    {wait:.2f}    bar {MAX_WAIT}    {kept[1]}")
    return slowdown <= MAX_SLOWDOWN and wait <= MAX_WAIT


def p99(values: list[float]) -> float:
    """The 99th percentile, interpolated."""
    return percentile(sorted(values), 99)


def verdict(value: float, bar: float) -> str:
    """For a terminal."""
    return "kept" if value <= bar else "MISSED"


def main() -> None:
    """Run one of the two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="simulated, in which requests arrive")
    parser.add_argument("--qps", type=float, nargs="+", help="loads of both machines; by default some of each's own")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--engine", metavar="CHECKPOINT", help="on this machine instead of simulated")
    parser.add_argument("--long", type=int, default=32768, help="--engine: tokens of the long prompt")
    parser.add_argument("--shorts", type=int, default=50, help="--engine: how many short prompts arrive beside it")
    parser.add_argument("--short-min", type=int, default=64)
    parser.add_argument("--short-max", type=int, default=256)
    parser.add_argument("--short-output", type=int, default=8)
    parser.add_argument("--override", action="append", default=[], help="more overrides for every server")
    parser.add_argument("--logs", type=Path, help="--engine: a folder to keep the decision logs in")
    args = parser.parse_args()
    if args.engine is not None:
        sys.exit(0 if report_engine(args) else 1)
    report_simulated(args)


if __name__ == "__main__":
    main()
