"""Time per token of one answer after 4M and 10M tokens, with its KV on 1, 2 or 4 replicas of Llama-3 8B on H100.

    python -m experiments.kvp_tpot.run

Each replica is tp 8 x 4 stages (and tp 4 x 4, which the paper uses too). Stages do not shorten a decode: each reads
its own layers' KV in turn; only tp and kvp divide what is read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.lib.paper import LLAMA3_8B, Cluster, Results, figure, h100
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig

HERE = Path(__file__).parent
DEGREES = (1, 2, 4)
PAPER_SAVING = 0.40  # at 10M tokens, figure 7a: about 40% less, some 30 tokens/s


def tpot_s(cluster: Cluster, layout: ParallelLayout, num_tokens: int) -> float:
    """One token, read through all stages of all replicas."""
    shard_tokens = -(-num_tokens // layout.kvp)
    truth = Truth(cluster.cost(layout), shard_tokens, TruthConfig(), seed=0)
    chunk = Chunk("answer", num_tokens - 1, 1, True, tuple(range(layout.kvp)))
    batch = Batch(batch_id=0, chunks=(chunk,), released=(), created_s=0.0, budget_s=1.0, predicted_s=1.0)
    return Pipeline(layout.spp, layout.kvp).run(0, truth(batch), 0.0)


def main() -> int:
    """Run, print, draw; 1 if the bar is missed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"model": "llama3_8b", "hardware": "h100", "spp": 4})
    results.runs.clear()
    print("| tp | tokens | " + " | ".join(f"kvp {kvp}" for kvp in DEGREES) + " | kvp 2 saves | kvp 4 saves |")
    print("|" + " --- |" * (4 + len(DEGREES)))
    drawing, axis = figure()
    for tp in (8, 4):
        for num_tokens in (4_000_000, 10_000_000):
            times_s = []
            for kvp in DEGREES:
                layout = ParallelLayout(tp=tp, spp=4, kvp=kvp)
                cluster = h100(LLAMA3_8B, layout)
                times_s.append(tpot_s(cluster, layout, num_tokens))
            name = f"tp {tp}, {num_tokens // 1_000_000}M"
            results.put(name, {"tpot_ms": [round(1e3 * seconds, 2) for seconds in times_s]})
            cells = [f"{1e3 * seconds:.1f} ms" for seconds in times_s]
            cells += [f"{1 - seconds / times_s[0]:.0%}" for seconds in times_s[1:]]
            print(f"| {tp} | {num_tokens:,} | " + " | ".join(cells) + " |")
            axis.plot(DEGREES, [1e3 * seconds for seconds in times_s], marker="o", label=name)
    axis.set_xticks(DEGREES)
    axis.set_xlabel("replicas that hold the KV")
    axis.set_ylabel("ms per token")
    axis.set_ylim(bottom=0.0)
    axis.legend(fontsize=7)
    drawing.savefig(HERE / "kvp_tpot.png", dpi=110)
    one, two, _ = results.runs["tp 8, 10M"]["tpot_ms"]
    saving = 1 - two / one
    print(f"10M tokens, tp 8, kvp 2: {saving:.0%} less, {1e3 / two:.0f} tokens/s; paper: about {PAPER_SAVING:.0%}, 30")
    return 0 if saving >= PAPER_SAVING else 1


if __name__ == "__main__":
    sys.exit(main())
