"""How near does eviction by value come to one that knows the future? 64 agent sessions, KV for 16 of them.

    medha compile && python -m experiments.hit_rate.run       # simulated: 16 and 64 GPUs, 5 seeds, three evictions
    python -m experiments.hit_rate.run --engine               # the real engine, lengths and gaps scaled down
    python -m experiments.hit_rate.run --quick [--engine]     # a smaller load and one seed, to see that it runs

Drawn sessions (megatron_medha/workload/session_mix.py) are played in a closed loop under each kv.eviction. KV is 16
times the mean prompt of a turn. Of the run by value, the order in which requests began and ended is kept, and the same
order is gone through with a clairvoyant eviction of the same memory, and with endless memory
(experiments/hit_rate/clairvoyant.py). Other evictions have a closed loop, and so an order, of their own.

Bars: in each seed, by value at least 95% of the clairvoyant hit rate, and not below LRU's or TTL's.
Finished cells are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from tqdm import tqdm

from experiments.hit_rate.access_trace import AccessTrace
from experiments.hit_rate.engine import EngineLoad, run_engine, save_checkpoint
from experiments.hit_rate.figures import hit_figures
from experiments.lib.results_file import ResultsFile, verdict
from megatron_medha.core.kv.shards import default_shard_tokens
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.workload.workload import Workload

EVICTIONS = ("value", "lru", "ttl")
LAYOUTS = {16: ["parallel.tp=8", "parallel.spp=2"], 64: ["parallel.tp=8", "parallel.spp=2", "parallel.kvp=4"]}
FIT_SHARE = 0.25  # of the sessions, that KV has room for
BAR = 0.95


@dataclass(frozen=True, slots=True)
class SimulatedCell:
    """One simulation."""

    num_gpus: int
    eviction: str
    seed: int
    num_sessions: int
    length_scale: float

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.num_gpus} GPUs/{self.eviction}/{self.seed}"

    def config(self) -> SimulationConfig:
        """With KV for a share of the sessions."""
        words = [
            "model=llama3_8b_1m", "hardware=a100", *LAYOUTS[self.num_gpus], "workload=sessions",
            f"workload.sessions.num_sessions={self.num_sessions}", f"kv.eviction={self.eviction}",
            f"workload.sessions.length_scale={self.length_scale}", f"seed={self.seed}",
        ]  # fmt: skip
        config = simulation_config(freeze(compose("simulate", SimulateOptions, words), SimulateOptions))
        setup, facts = config.setup, Workload(config.workload, config.seed).facts
        num_tokens = FIT_SHARE * self.num_sessions * facts.num_prompt_tokens / facts.num_requests
        kvp = setup.layout.kvp
        unit = setup.kv.tokens_per_granule(setup.block_size)
        num_granules = ceil(max(num_tokens, 1.1 * facts.max_request_tokens) / (kvp * unit))
        num_blocks = num_granules * unit // setup.block_size
        shard_tokens = None if kvp == 1 else default_shard_tokens(num_blocks, setup.block_size, None, kvp, setup.kv)
        return replace(config, setup=replace(setup, num_blocks=num_blocks, max_tokens_per_shard=shard_tokens))


def run_simulated(cell: SimulatedCell) -> dict[str, Any]:
    """Its figures."""
    config = cell.config()
    trace = AccessTrace()
    ended: list[RequestStats] = []
    result = Simulation(config).run(SimulationHooks(on_outcome=ended.append, observers=(trace,)))
    setup = config.setup
    granule_tokens = config.granule_tokens
    assert granule_tokens is not None
    capacity = setup.num_blocks * setup.layout.kvp * setup.block_size // granule_tokens
    every = result.values["all"]
    return {
        **hit_figures(trace, granule_tokens, capacity, setup, cell.eviction),
        "num_turns": every["num_requests"],
        "num_finished": every["num_finished"],
        "kv_tokens": capacity * granule_tokens,
        "turn_p50_tokens": median(one.request.num_prompt_tokens for one in ended),
        "service_p50_s": median(one.e2e_s for one in ended if one.e2e_s is not None),
        "service_mean_s": fmean(one.e2e_s for one in ended if one.e2e_s is not None),
        "ttft_s": every["ttft_s"],
        "num_preemptions": every["num_preemptions"],
        "end_s": result.end_s,
    }


def report(place: str, cells: dict[str, Any], seeds: range) -> bool:
    """Print figures of one machine beside bars."""
    rows = {seed: {name: cells[f"{place}/{name}/{seed}"] for name in EVICTIONS} for seed in seeds}
    first = rows[seeds[0]]["value"]
    print(
        f"\n{place}: KV for {first['kv_tokens']:,} tokens, {first['num_turns']:,} turns with prompts of "
        f"{first['turn_p50_tokens']:,.0f} tokens (p50), which take {first['service_p50_s']:.2f} s (p50; mean "
        f"{first['service_mean_s']:.2f})"
    )
    print("saved: the share of all prompts' prefill seconds, alone, that hits save")
    print("seed  clairvoyant (saved)  infinite   value    lru    ttl   saved by value, lru, ttl   TTFT p50   p99")
    for seed, row in rows.items():
        rates = "  ".join(f"{row[name]['hit_rate']:6.2%}" for name in EVICTIONS)
        saved = "  ".join(f"{row[name]['saved']:6.2%}" for name in EVICTIONS)
        times = ["  ".join(f"{row[name]['ttft_s'][p]:6.2f}" for name in EVICTIONS) for p in ("p50", "p99")]
        value = row["value"]
        known = f"{value['clairvoyant']:11.2%} ({value['clairvoyant_saved']:6.2%})"
        print(f"{seed:4}  {known}  {value['infinite']:8.2%}  {rates}   {saved}   {'   '.join(times)}")
    least = min(row["value"]["hit_rate"] / row["value"]["clairvoyant"] for row in rows.values())
    ahead = min(row["value"]["hit_rate"] - row[name]["hit_rate"] for row in rows.values() for name in ("lru", "ttl"))
    met = [
        verdict(f"{place}, by value against clairvoyant", f"{least:.1%} in the worst seed", f"at least {BAR:.0%}",
                least >= BAR),
        verdict(f"{place}, by value against LRU and TTL", f"{100 * ahead:+.2f} points in the worst seed", "not below",
                ahead >= 0.0),
    ]  # fmt: skip
    return all(met)


def main() -> int:
    """Run what has not run, print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 sessions a tenth as long, one seed")
    parser.add_argument("--engine", action="store_true", help="the real engine instead of simulations")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gpus", type=int, nargs="*", choices=sorted(LAYOUTS), default=sorted(LAYOUTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/hit_rate, or outputs/hit_rate_quick")
    arguments = parser.parse_args()
    quick = arguments.quick
    out = arguments.out or Path("outputs") / ("hit_rate_quick" if quick else "hit_rate")
    seeds = range(1 if quick else arguments.seeds)
    num_sessions, length_scale = (12, 0.1) if quick else (64, 1.0)
    if arguments.engine:
        load = EngineLoad(num_sessions=8, turns=5.0) if quick else EngineLoad()
        results = ResultsFile(out / "engine.json", {"load": str(load)})
        model = save_checkpoint(out / "model")
        for seed in seeds:
            for eviction in EVICTIONS:
                results.cell(f"engine/{eviction}/{seed}", partial(run_engine, load, eviction, seed, model))
        return 0 if report("engine", results.cells, seeds) else 1
    results = ResultsFile(out / "results.json", {"num_sessions": num_sessions, "length_scale": length_scale})
    cells = [
        SimulatedCell(num_gpus, eviction, seed, num_sessions, length_scale)
        for num_gpus in arguments.gpus for seed in seeds for eviction in EVICTIONS
    ]  # fmt: skip
    left = [cell for cell in cells if cell.name not in results.cells]
    with ProcessPoolExecutor(arguments.processes) as pool, tqdm(total=len(left), unit="run") as bar:
        futures = {pool.submit(run_simulated, cell): cell for cell in left}
        for future in as_completed(futures):
            results.keep(futures[future].name, future.result())
            bar.update()
    met = [report(f"{num_gpus} GPUs", results.cells, seeds) for num_gpus in arguments.gpus]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
