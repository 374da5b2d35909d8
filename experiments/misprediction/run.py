"""What does it cost to be wrong about how long a step takes, and what does learning win back?

    python -m experiments.misprediction.run

Llama-3 8B on 16 A100, simulated; 5 minutes of chats with 5% long prompts at 0.75 requests/s. The scheduler believes the
cost model; the world takes FACTOR times as long (all of it, or its attention alone), or scatters. `fixed` keeps that
belief, `learns` is the server's own: it corrects the model by every step. Deadlines are 1.5 times what a prompt takes
alone in that world.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.headline.systems import LAYOUT, cluster
from experiments.lib.paper import BLOCK_SIZE, Results, figure, measure, scheduler
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.system import build_system
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.outcome import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig

HERE = Path(__file__).parent
QPS, MINUTES = 0.75, 5
FACTORS = (0.5, 0.8, 1.0, 1.25, 2.0)


@dataclass(frozen=True, slots=True)
class Wrong:
    """How the world differs from the belief."""

    title: str
    truth: TruthConfig


WORLDS = (
    *(Wrong(f"all x {factor}", TruthConfig(linear_bias=factor, attention_bias=factor)) for factor in FACTORS),
    *(Wrong(f"attention x {factor}", TruthConfig(attention_bias=factor)) for factor in (0.5, 2.0)),
    *(Wrong(f"scatters by {noise:.0%}", TruthConfig(noise=noise)) for noise in (0.1, 0.3)),
)


def main() -> int:
    """Run what is missing, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"qps": QPS, "minutes": MINUTES, "seed": 42})
    print("| the world | belief | short p50 | p99 | long p50 | p90 | SLO short | all | TPOT p50 | p99 |")
    print("|" + " --- |" * 10)
    for world in WORLDS:
        for learns in (False, True):
            name = f"{world.title}, {'learns' if learns else 'fixed'}"
            if name not in results.runs:
                results.put(name, _run(world.truth, learns, name))
            values = results.runs[name]
            cells = [f"{values['short'][f'ttft_p{percent}_s']:.3g}" for percent in (50, 99)]
            cells += [f"{values['long'][f'ttft_p{percent}_s']:.3g}" for percent in (50, 90)]
            cells += [f"{values[group]['attainment']:.0%}" for group in ("short", "all")]
            cells += [f"{1000 * values['all'][f'tpot_p{percent}_s']:.0f} ms" for percent in (50, 99)]
            print(f"| {world.title} | {'learns' if learns else 'fixed'} | " + " | ".join(cells) + " |", flush=True)
    _draw(results)
    return 0


def _run(config: TruthConfig, learns: bool, label: str) -> dict[str, object]:
    on = cluster()
    num_blocks = on.kv_tokens(LAYOUT.tp * LAYOUT.spp) // BLOCK_SIZE
    setup = SchedulerSetup(
        config=scheduler("lars"), shape=on.shape, hardware=on.hardware, engine=on.engine, layout=LAYOUT,
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_tokens_per_shard=None, learns=learns,
    )  # fmt: skip

    def truth(of: TruthConfig) -> Truth:
        return Truth(on.cost(LAYOUT), num_blocks * BLOCK_SIZE, of, seed=42)

    # Alone in that world, without its noise: one reference for both beliefs.
    isolated_s = IsolatedTimes(
        lambda: build_system(replace(setup, learns=False)), truth(replace(config, noise=0.0)),
        lambda: Pipeline(LAYOUT.spp, LAYOUT.kvp), 1_000_000, on.engine.request_s,
    )  # fmt: skip
    return measure(
        build_system(setup), WorkloadConfig(qps=QPS, duration_s=60.0 * MINUTES), 42, isolated_s, Slo(),
        runs_on=(LAYOUT, truth(config)), front_s=on.engine.request_s, drain_s=20.0 * MINUTES, label=label,
    ).values(LengthClasses())  # fmt: skip


def _draw(results: Results) -> None:
    drawing, (left, right) = figure(5.0, 3.4, columns=2)
    for belief, color in (("fixed", "#d62728"), ("learns", "#1f77b4")):
        runs = [results.runs[f"all x {factor}, {belief}"] for factor in FACTORS]
        left.plot(FACTORS, [100 * run["short"]["attainment"] for run in runs], marker="o", color=color, label=belief)
        right.plot(FACTORS, [1000 * run["all"]["tpot_p99_s"] for run in runs], marker="o", color=color, label=belief)
    right.axhline(50.0, color="0.6", linewidth=0.8)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
        axis.set_xlabel("true time of a step over the one believed at first")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        axis.set_ylim(bottom=0.0)
    left.set_ylabel("short prompts within their deadline, %")
    right.set_ylabel("p99 time per token, ms (line: the budget)")
    drawing.savefig(HERE / "misprediction.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
