"""One prompt of 1M tokens, Llama-3 8B, on 8 to 128 H100: stream pipeline against rings of context parallelism.

    python -m experiments.spp_against_cp.run

Stream pipeline: tp 8 in a node, one stage per node, the best of four fixed chunk sizes. Rings: tp 8 in a node, one
instance per node, each prompt in one pass. Figures are TTFT over the stream pipeline's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from experiments.lib.paper import LLAMA3_8B, Instances, Results, best_alone_s, figure, h100
from megatron_medha.core.layout import ParallelLayout

HERE = Path(__file__).parent
NUM_TOKENS = 1_000_000
TP = 8
CHUNKS = (1024, 2048, 4096, 8192)
PAPER = {8: 1.10, 16: 1.08, 32: 1.08, 64: 1.29, 128: 1.64}
RINGS = {
    "ideal ring": {},
    "no overlap": {"overlaps": False},
    "contiguous parts": {"is_striped": False},
    "contiguous, no overlap, K and V repeated": {"is_striped": False, "overlaps": False, "sent_heads": 32},
}


def main() -> int:
    """Run, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"num_tokens": NUM_TOKENS, "model": "llama3_8b", "hardware": "h100"})
    results.runs.clear()
    print("| GPUs | stream pipeline, s | " + " | ".join(RINGS) + " | paper |")
    print("|" + " --- |" * (3 + len(RINGS)))
    for num_gpus, paper in tqdm(PAPER.items(), leave=False):
        layout = ParallelLayout(tp=TP, spp=num_gpus // TP)
        cluster = h100(LLAMA3_8B, layout)
        spp_s = best_alone_s(cluster, layout, CHUNKS, NUM_TOKENS)
        ring = Instances(cluster=cluster, tp=TP).cost
        ratios = {
            title: replace(ring, **options).prefill_s(num_gpus // TP, NUM_TOKENS, float(NUM_TOKENS) ** 2, 1) / spp_s
            for title, options in RINGS.items()
        }
        results.put(str(num_gpus), {"spp_s": round(spp_s, 3), **{k: round(v, 3) for k, v in ratios.items()}})
        cells = [str(num_gpus), f"{spp_s:.1f}", *(f"{ratio:.2f}" for ratio in ratios.values()), f"{paper:.2f}"]
        tqdm.write("| " + " | ".join(cells) + " |", file=sys.stdout)
    drawing, axis = figure()
    for title in RINGS:
        axis.plot(list(PAPER), [results.runs[str(n)][title] for n in PAPER], marker="o", label=title)
    axis.plot(list(PAPER), list(PAPER.values()), marker="s", color="black", label="paper, its own ring")
    axis.axhline(1.0, color="0.6", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(PAPER), [str(n) for n in PAPER])
    axis.set_xlabel("H100")
    axis.set_ylabel("TTFT over the stream pipeline's, 1M tokens")
    axis.legend(fontsize=7)
    drawing.savefig(HERE / "spp_against_cp.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
