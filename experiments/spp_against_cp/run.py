"""One prompt of 1M tokens, Llama-3 8B, on 8 to 128 H100: stream pipeline against rings of context parallelism.

    python -m experiments.spp_against_cp.run

Stream pipeline: tp 8 in a node, one stage per node, the best of four fixed chunk sizes. Rings: of nodes (tp 8 in each)
or of single GPUs, each prompt in one pass. Figures are TTFT over the stream pipeline's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.lib.paper import LLAMA3_8B, Instances, Results, best_alone_s, figure, h100
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.sim.baselines.ring_cost import RingCost

HERE = Path(__file__).parent
NUM_TOKENS = 1_000_000
TP = 8
CHUNKS = (1024, 2048, 4096, 8192)
PAPER = {8: 1.10, 16: 1.08, 32: 1.08, 64: 1.29, 128: 1.64}
RINGS: dict[str, tuple[int, dict[str, Any]]] = {  # tp of an instance, and what is not ideal about the ring
    "ideal ring": (8, {}),
    "ideal ring of GPUs": (1, {}),
    "of GPUs, no overlap": (1, {"overlaps": False}),
    "of GPUs, K and V of all heads": (1, {"sent_heads": LLAMA3_8B.num_heads}),
    "contiguous parts": (8, {"is_striped": False}),
}


def hidden_from(ring: RingCost) -> float:
    """Tokens on each GPU from which a ring's transfers hide behind its attention."""
    # A hop's transfer grows with the tokens of a part, its attention with their square.
    parts = 64
    tokens = NUM_TOKENS // parts
    attention_s = ring.instance.attention_s(0, NUM_TOKENS) / parts**2
    return tokens * ring.hop_send_s(parts, tokens) / attention_s


def main() -> int:
    """Run, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"num_tokens": NUM_TOKENS, "model": "llama3_8b", "hardware": "h100"})
    results.runs.clear()
    print("| GPUs | stream pipeline, s | without host time | " + " | ".join(RINGS) + " | paper | its excess, s |")
    print("|" + " --- |" * (5 + len(RINGS)))
    for num_gpus, paper in tqdm(PAPER.items(), leave=False):
        layout = ParallelLayout(tp=TP, spp=num_gpus // TP)
        cluster = h100(LLAMA3_8B, layout)
        spp_s = best_alone_s(cluster, layout, CHUNKS, NUM_TOKENS)
        no_host = replace(cluster, engine=replace(cluster.engine, step_s=0.0, stage_entry_s=0.0))
        device_s = best_alone_s(no_host, layout, CHUNKS, NUM_TOKENS)
        rings = {title: replace(Instances(cluster=cluster, tp=tp).cost, **options)
                 for title, (tp, options) in RINGS.items()}  # fmt: skip
        ratios = {
            title: ring.prefill_s(num_gpus // ring.tp, NUM_TOKENS, float(NUM_TOKENS) ** 2, 1) / spp_s
            for title, ring in rings.items()
        }
        values = {"spp_s": spp_s, "spp_without_host_s": device_s, **ratios}
        results.put(str(num_gpus), {key: round(value, 3) for key, value in values.items()})
        cells = [str(num_gpus), f"{spp_s:.1f}", f"{device_s:.1f}", *(f"{ratio:.2f}" for ratio in ratios.values()),
                 f"{paper:.2f}", f"{(paper - ratios['ideal ring of GPUs']) * spp_s:.1f}"]  # fmt: skip
        tqdm.write("| " + " | ".join(cells) + " |", file=sys.stdout)
    for title in ("ideal ring of GPUs", "of GPUs, K and V of all heads"):
        results.note("hidden_from_tokens", title, round(hidden_from(rings[title])))
        print(f"{title}: transfers hide from {hidden_from(rings[title]):,.0f} tokens on each GPU")
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
