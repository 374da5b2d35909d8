"""How near does eviction by value come to one that knows the future? 64 agent sessions, KV for 16 of them.

    medha compile && python -m experiments.hit_rate.run       # simulated: all LOADS, 5 seeds, three evictions
    python -m experiments.hit_rate.run --length 0.1           # the same with prompts and outputs a tenth as long
    python -m experiments.hit_rate.run --engine               # the real engine, lengths and gaps scaled down
    python -m experiments.hit_rate.run --quick [--engine]     # a smaller load and one seed, to see that it runs

Drawn sessions (megatron_medha/workload/session_mix.py) are played in a closed loop under each kv.eviction. KV is a
quarter of the sessions times the mean prompt of a turn, and fits the longest request. Of the run by value, the order in
which requests began and ended is kept, and the same order is gone through with a clairvoyant eviction of the same
memory, and with endless memory (experiments/hit_rate/clairvoyant.py). Other evictions have a closed loop, and so an
order, of their own.

Bars: in each seed, by value at least 95% of the clairvoyant hit rate (64 sessions), and not below LRU's or TTL's (all).
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
from experiments.hit_rate.engine import EngineLoad, run_engine
from experiments.hit_rate.figures import hit_figures
from experiments.lib.random_llama import session_checkpoint
from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.simulations import configured, session_words
from megatron_medha.core.kv.shards import default_shard_tokens
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.workload.workload import Workload

EVICTIONS = ("value", "lru", "ttl")
TP8_SPP2 = ["parallel.tp=8", "parallel.spp=2"]
FIT_SHARE = 0.25  # of the sessions, that KV has room for
BAR = 0.95


@dataclass(frozen=True, slots=True)
class SimulatedLoad:
    """Sessions, and on what they run."""

    layout: list[str]
    num_sessions: int = 64
    length_scale: float = 1.0
    has_clairvoyant_bar: bool = True


LOADS = {
    "16 GPUs": SimulatedLoad(TP8_SPP2),
    "64 GPUs": SimulatedLoad([*TP8_SPP2, "parallel.kvp=4"]),
    # The longest session takes most of the memory.
    "16 GPUs, 16 sessions": SimulatedLoad(TP8_SPP2, 16, has_clairvoyant_bar=False),
    "16 GPUs, 12 sessions": SimulatedLoad(TP8_SPP2, 12, 0.7, has_clairvoyant_bar=False),
}
QUICK_LOADS = {
    "16 GPUs": SimulatedLoad(TP8_SPP2, 12, 0.1), "64 GPUs": SimulatedLoad([*TP8_SPP2, "parallel.kvp=4"], 12, 0.1)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SimulatedCell:
    """One simulation."""

    place: str
    load: SimulatedLoad
    eviction: str
    seed: int

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.place}/{self.eviction}/{self.seed}"

    def config(self) -> SimulationConfig:
        """With KV for a share of the sessions."""
        load = self.load
        config = configured([
            "model=llama3_8b_1m", "hardware=a100", *load.layout, "workload=sessions", f"kv.eviction={self.eviction}",
            *session_words(num_sessions=load.num_sessions, length_scale=load.length_scale), f"seed={self.seed}",
        ])  # fmt: skip
        setup, facts = config.setup, Workload(config.workload, config.seed).facts
        num_tokens = FIT_SHARE * load.num_sessions * facts.num_prompt_tokens / facts.num_requests
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


def report(place: str, cells: dict[str, Any], seeds: range, has_clairvoyant_bar: bool = True) -> bool:
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
        verdict(f"{place}, by value against clairvoyant", f"{least:.1%} in the worst seed",
                f"at least {BAR:.0%}" if has_clairvoyant_bar else "none", least >= BAR or not has_clairvoyant_bar),
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
    parser.add_argument("--load", action="append", choices=LOADS, help="default: all; may be given more than once")
    parser.add_argument("--length", type=float, default=1.0, help="factor on the tokens of all prompts and outputs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/hit_rate, or ..._quick, ..._0.1")
    arguments = parser.parse_args()
    quick = arguments.quick
    scaled = "" if arguments.length == 1.0 else f"_{arguments.length}"
    out = arguments.out or Path("outputs") / f"hit_rate{'_quick' if quick else ''}{scaled}"
    seeds = range(1 if quick else arguments.seeds)
    if arguments.engine:
        load = EngineLoad(num_sessions=8, turns=5.0) if quick else EngineLoad()
        results = ResultsFile(out / "engine.json", {"load": str(load)})
        model = session_checkpoint(out / "model")
        for seed in seeds:
            for eviction in EVICTIONS:
                results.cell(f"engine/{eviction}/{seed}", partial(run_engine, load, eviction, seed, model))
        return 0 if report("engine", results.cells, seeds) else 1
    loads = {
        place: replace(load, length_scale=arguments.length * load.length_scale)
        for place, load in (QUICK_LOADS if quick else LOADS).items() if place in (arguments.load or LOADS)
    }  # fmt: skip
    results = ResultsFile(out / "results.json", {"quick": quick, "length": arguments.length})
    cells = [
        SimulatedCell(place, load, eviction, seed)
        for place, load in loads.items() for seed in seeds for eviction in EVICTIONS
    ]  # fmt: skip
    left = [cell for cell in cells if cell.name not in results.cells]
    with ProcessPoolExecutor(arguments.processes) as pool, tqdm(total=len(left), unit="run") as bar:
        futures = {pool.submit(run_simulated, cell): cell for cell in left}
        for future in as_completed(futures):
            results.keep(futures[future].name, future.result())
            bar.update()
    met = [report(place, results.cells, seeds, load.has_clairvoyant_bar) for place, load in loads.items()]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
