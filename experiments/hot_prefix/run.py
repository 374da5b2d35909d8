"""One system prompt for 64 sessions over four KVP ranks: does it draw all of them to the rank where it lies?

    medha compile && python -m experiments.hot_prefix.run     # simulated: 32 A100, tp 8, kvp 4
    python -m experiments.hot_prefix.run --engine             # four real ranks of a small model, lengths scaled down
    python -m experiments.hot_prefix.run --quick [--engine]

64 sessions in a closed loop begin with the same 16K tokens, add a little and go on for some ten turns with short gaps;
each fits into one KV shard. If a hit always won over a free rank, one rank would have all the work. Gaps are short
because ranks that are idle most of the time have unequal work under any rule: the first idle one gets the next prompt.

While more sessions than ranks are live, work is even within a few percent in any five seconds. What makes the sums
unequal is the end, where one or two sessions are left, each on the rank with its hits.

Bars: the rank with the most work has at most 20% more than the one with the least, and TTFT p99 is not above that
without a prefix cache. Work: seconds that a rank computed, simulated; tokens that it computed, on the engine.
Finished parts are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from experiments.lib.random_llama import session_checkpoint
from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.served_log import ServedLog
from experiments.lib.session_bench import bench_sessions
from experiments.lib.simulations import configured, session_words
from megatron_medha.sim.simulation import Simulation, SimulationHooks
from megatron_medha.stats.timeline import StageSpan

KVP = 4
MOST_APART = 1.2
CACHE = {"cached": "kv.prefix_cache=true", "uncached": "kv.prefix_cache=false"}


def sessions(num_sessions: int, length_scale: float, gap_scale: float) -> list[str]:
    """As options of medha simulate and medha bench."""
    return session_words(
        num_sessions=num_sessions, turns=10, subagent_share=0, system_tokens=16000, first_tokens=2000, turn_tokens=500,
        output_tokens=200, start_s=10, length_scale=length_scale, gap_scale=gap_scale,
    )  # fmt: skip


def simulated(cache: str, num_sessions: int, seed: int) -> dict[str, Any]:
    """Work of each rank, hits and TTFT."""
    words = [
        "model=llama3_8b_1m", "hardware=a100", "parallel.tp=8", "parallel.spp=1", f"parallel.kvp={KVP}",
        "workload=sessions", *sessions(num_sessions, 1.0, 0.05), CACHE[cache], f"seed={seed}",
    ]  # fmt: skip
    config = configured(words)
    work_s = [0.0] * KVP

    def note(span: StageSpan) -> None:
        work_s[span.kvp_rank] += span.end_s - span.start_s

    every = Simulation(config).run(SimulationHooks(on_span=note)).values["all"]
    return {"work": work_s, **{name: every[name] for name in ("hit_rate", "ttft_s", "num_requests")}}


def measured(cache: str, num_sessions: int, seed: int, checkpoint: Path) -> dict[str, Any]:
    """The same on real ranks."""
    ran = bench_sessions(
        checkpoint, [f"parallel.kvp={KVP}", "model.kv_memory_gib=0.25", CACHE[cache]],
        [*sessions(num_sessions, 0.05, 0.5), f"seed={seed}"],
    )  # fmt: skip
    every = ran.summary["all"]
    return {
        "work": tokens_by_rank(ran.log), "hit_rate": ran.summary["sessions"]["hit_rate"], "ttft_s": every["ttft_s"],
        "num_requests": every["num_requests"],
    }  # fmt: skip


def tokens_by_rank(log: ServedLog) -> list[float]:
    """Tokens that each rank has computed."""
    work = [0.0] * KVP
    for step in log.steps:
        for chunk in step.batch.chunks:
            for rank in chunk.kvp_ranks:
                work[rank] += chunk.num_tokens
    return work


def report(place: str, cells: dict[str, Any], seeds: Sequence[int]) -> bool:
    """Print figures beside bars."""
    print(f"\n{place}")
    print("seed  prefix cache   hit rate   work of the ranks over their mean   TTFT p50      p99")
    apart, slower = 0.0, 0.0
    for seed in seeds:
        found = {cache: cells[f"{place}/{cache}/{seed}"] for cache in CACHE}
        for cache, one in found.items():
            mean = sum(one["work"]) / KVP
            shares = "  ".join(f"{rank / mean:.2f}" for rank in one["work"])
            ttft_s = one["ttft_s"]
            rate = one["hit_rate"] or 0.0
            print(f"{seed:4}  {cache:12} {rate:10.1%}   {shares:33} {ttft_s['p50']:9.3f} {ttft_s['p99']:8.3f}")
        work = found["cached"]["work"]
        apart = max(apart, max(work) / min(work) if min(work) else inf)
        slower = max(slower, found["cached"]["ttft_s"]["p99"] / found["uncached"]["ttft_s"]["p99"])
    met = [
        verdict(f"{place}, most work of a rank over the least", f"{apart:.2f} in the worst seed",
                f"at most {MOST_APART}", apart <= MOST_APART),
        verdict(f"{place}, TTFT p99 over that without a prefix cache", f"{slower:.2f} in the worst seed", "at most 1",
                slower <= 1.0),
    ]  # fmt: skip
    return all(met)


def main() -> int:
    """Run what has not run, print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 sessions, one seed")
    parser.add_argument("--engine", action="store_true", help="real ranks instead of simulations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/hot_prefix, or ..._quick")
    arguments = parser.parse_args()
    out = arguments.out or Path("outputs") / ("hot_prefix_quick" if arguments.quick else "hot_prefix")
    num_sessions = 16 if arguments.quick else 64
    seeds = range(1 if arguments.quick else arguments.seeds)
    place = "engine" if arguments.engine else "simulated"
    results = ResultsFile(out / f"{place}.json", {"num_sessions": num_sessions})
    run = partial(measured, checkpoint=session_checkpoint(out / "model")) if arguments.engine else simulated
    for seed in seeds:
        for cache in CACHE:
            results.cell(f"{place}/{cache}/{seed}", partial(run, cache, num_sessions, seed))
    return 0 if report(place, results.cells, seeds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
