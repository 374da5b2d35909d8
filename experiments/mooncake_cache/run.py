"""What would a prefix cache have served of Mooncake's recorded hour of conversations?

    medha compile && python -m experiments.mooncake_cache.run --trace conversation_trace.jsonl
    python -m experiments.mooncake_cache.run --trace FILE --quick     # the first five minutes

The trace is kvcache-ai/Mooncake's, FAST25-release/traces/conversation_trace.jsonl, or the same as CSV: 12,031 requests,
one hash id for each 512 tokens of a prompt. It is simulated on 16 A100 (Llama-3 8B, tp 8, spp 2) with a prefix cache
and without; beside that the hits of endless memory. Nothing tells which prompts contain earlier outputs, so outputs are
kept and never hit. Draws hits over time and TTFT with and without, mooncake_cache.png.

Bars: a hit rate above 0, and TTFT p50 and p99 not above those without. Finished parts are kept in --out.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from experiments.lib.drawing import panels
from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.simulations import configured
from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.stats.summary import percentile
from megatron_medha.workload.workload import Workload

CACHE = {"with": "kv.prefix_cache=true", "without": "kv.prefix_cache=false"}
BIN_S = 60.0
PERCENTS = [0.5, *range(1, 100), 99.5, 99.9]


def config_of(trace: Path, cache: str, duration_s: float | None) -> SimulationConfig:
    """A simulation of the trace."""
    words = [
        "model=llama3_8b_1m", "hardware=a100_x16", "parallel=tp8_spp2", "workload=trace", f"workload.path={trace}",
        CACHE[cache], *([] if duration_s is None else [f"workload.duration_s={duration_s}"]),
    ]  # fmt: skip
    return configured(words)


def simulated(trace: Path, cache: str, duration_s: float | None) -> dict[str, Any]:
    """Hits by minute of arrival, and quantiles of TTFT."""
    config = config_of(trace, cache, duration_s)
    ended: list[RequestStats] = []
    values = Simulation(config).run(SimulationHooks(on_outcome=ended.append)).values
    bins: dict[int, list[int]] = {}
    for one in ended:
        counts = bins.setdefault(int(one.request.arrival_s // BIN_S), [0, 0])
        counts[0] += one.num_cached_tokens or 0
        counts[1] += one.request.num_prompt_tokens
    ttft_s = sorted(one.ttft_s for one in ended if one.ttft_s is not None)
    every, machine = values["all"], values["machine"]
    return {
        **{name: every[name] for name in ("hit_rate", "attainment", "num_finished", "num_requests")},
        **{name: machine[name] for name in ("utilisation", "num_tokens_computed")},
        "kv_tokens": config.setup.num_blocks * config.setup.block_size,
        "ttft_s": [percentile(ttft_s, percent) for percent in PERCENTS],
        "minutes": [[minute, *counts] for minute, counts in sorted(bins.items())],
    }  # fmt: skip


def endless(trace: Path, duration_s: float | None) -> dict[str, Any]:
    """The hit rate if nothing were ever evicted, and every prompt computed before the next one comes."""
    config = config_of(trace, "with", duration_s)
    granule_tokens = config.granule_tokens
    assert granule_tokens is not None
    seen: set[bytes] = set()
    num_hits = num_tokens = 0
    for request in Workload(config.workload, config.seed).requests(granule_tokens):
        keys = [request.prefix_keys[i : i + KEY_BYTES] for i in range(0, len(request.prefix_keys), KEY_BYTES)]
        most = keys[: (request.num_prompt_tokens - 1) // granule_tokens]  # the last token is computed
        num_hits += next((place for place, key in enumerate(most) if key not in seen), len(most)) * granule_tokens
        num_tokens += request.num_prompt_tokens
        seen.update(keys)
    return {"hit_rate": num_hits / num_tokens}


def draw(found: dict[str, Any], infinite: float, path: Path) -> None:
    """Hits over time beside endless memory's, and TTFT with and without."""
    figure, (hits, times) = panels(1, 2)
    minutes = [minute for minute, _, _ in found["with"]["minutes"]]
    hits.plot(minutes, [100.0 * cached / whole for _, cached, whole in found["with"]["minutes"]], label="cached")
    hits.axhline(100.0 * infinite, color="grey", linestyle="--", label="endless memory, whole trace")
    hits.set(xlabel="minute of arrival", ylabel="% of prompt tokens", title="Prompt tokens cached", ylim=(0, None))
    for cache, colour in (("with", "#1f77b4"), ("without", "#d62728")):
        times.plot(found[cache]["ttft_s"], PERCENTS, color=colour, label=f"{cache} prefix cache")
    times.set(xscale="log", xlabel="TTFT, seconds", ylabel="% of requests", title="TTFT")
    for axes in (hits, times):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run what has not run, print figures beside bars, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/mooncake_cache, or ..._quick")
    arguments = parser.parse_args()
    duration_s = 300.0 if arguments.quick else None
    out = arguments.out or Path("outputs") / ("mooncake_cache_quick" if arguments.quick else "mooncake_cache")
    results = ResultsFile(out / "results.json", {"trace": arguments.trace.name, "duration_s": duration_s})
    infinite = results.cell("endless", partial(endless, arguments.trace, duration_s))["hit_rate"]
    found = {
        cache: results.cell(cache, partial(simulated, arguments.trace, cache, duration_s)) for cache in CACHE
    }  # fmt: skip
    print(f"\nKV for {found['with']['kv_tokens']:,} tokens; endless memory would serve {infinite:.2%} of prompt tokens")
    print("prefix cache  hit rate  computed tokens  busy   TTFT p50     p90     p99  meet the SLO")
    for cache, one in found.items():
        p50, p90, p99 = (one["ttft_s"][PERCENTS.index(percent)] for percent in (50, 90, 99))
        print(
            f"{cache:12}  {one['hit_rate']:8.2%}  {one['num_tokens_computed']:15,} {one['utilisation']:5.1%}  "
            f"{p50:8.3f}s {p90:6.3f}s {p99:6.3f}s  {one['attainment']:11.2%}"
        )
    draw(found, infinite, out / "mooncake_cache.png")
    met = [verdict("hit rate", f"{found['with']['hit_rate']:.2%}", "above 0", found["with"]["hit_rate"] > 0.0)]
    for percent in (50, 99):
        cached_s, uncached_s = (found[cache]["ttft_s"][PERCENTS.index(percent)] for cache in CACHE)
        figure = f"{cached_s:.3f} s against {uncached_s:.3f} s without"
        met.append(verdict(f"TTFT p{percent}", figure, "not above", cached_s <= uncached_s))
    print(f"plot: {out / 'mooncake_cache.png'}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
