"""Two dimensions against three on 64 H100: Llama-3 70B, tp 8 x 8 stages, or tp 8 x 4 stages x 2 KV shards.

    python -m experiments.three_d.run                 # 5 simulated minutes at 0.25 to 1.75 requests/s

5% long prompts of up to 2M tokens. With two shards a request keeps at most 1M tokens on one replica.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.lib.paper import LLAMA3_70B, Cluster, Results, engine, hardware, measure, scheduler
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.stats.outcome import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig

HERE = Path(__file__).parent
QPS = (0.25, 0.75, 1.25, 1.75)
SHARD_TOKENS = 1_048_576
LAYOUTS = {"2D": ParallelLayout(tp=8, spp=8), "3D": ParallelLayout(tp=8, spp=4, kvp=2)}


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="simulated minutes of arrivals (default 5)")
    arguments = parser.parse_args()
    on = Cluster(shape=LLAMA3_70B, hardware=hardware("h100_x64", 64), engine=engine())
    # Both are held to the same deadlines, those of the pipeline alone.
    isolated_s = on.isolated(LAYOUTS["2D"], 2_000_000)
    results = Results(HERE / "results.json", {"minutes": arguments.minutes, "scheduler": "lars"})
    print("| layout | requests/s | short p50 | p90 | p99 | long p50 | p90 | TPOT p50 | p90 |")
    print("|" + " --- |" * 9)
    for qps in QPS:
        for name, layout in LAYOUTS.items():
            key = f"{name} {qps}/s"
            if key not in results.runs:
                shard_tokens = SHARD_TOKENS if layout.kvp > 1 else None
                measured = measure(
                    on.scheduler(scheduler("lars"), layout, shard_tokens=shard_tokens),
                    WorkloadConfig(qps=qps, duration_s=60.0 * arguments.minutes, long_prompt_scale=2.0),
                    42, isolated_s, Slo(), runs_on=(layout, on.truth(layout, shard_tokens)),
                    front_s=on.engine.request_s, drain_s=20.0 * arguments.minutes, label=key,
                )  # fmt: skip
                values = measured.values(LengthClasses())
                results.put(key, values)
            values = results.runs[key]
            cells = [f"{values['short'][f'ttft_p{percent}_s']:.2f} s" for percent in (50, 90, 99)]
            cells += [f"{values['long'][f'ttft_p{percent}_s']:.0f} s" for percent in (50, 90)]
            cells += [f"{1000 * values['all'][f'tpot_p{percent}_s']:.0f} ms" for percent in (50, 90)]
            print(f"| {name} | {qps} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
