"""How much of the devices prefill and decode use: MFU of stream pipelines, MBU of sharded decodes, on H100.

    python -m experiments.mfu_mbu.run

MFU is causal: (2 x weights x tokens + 2 x layers x heads x head size x tokens^2) over GPUs x peak x time. MBU: weights
and KV read once per token over GPUs x bandwidth x time, one answer alone, one stage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from experiments.kvp_tpot.run import tpot_s
from experiments.lib.paper import LLAMA3_8B, LLAMA3_70B, Results, best_alone_s, figure, h100
from megatron_medha.core.cost.utilisation import prefill_flops
from megatron_medha.core.layout import ParallelLayout

HERE = Path(__file__).parent
TP = 8
TOKENS = (128_000, 256_000, 512_000, 1_000_000, 2_000_000)
STAGES = (1, 4, 16)
DEGREES = (1, 2, 4, 8)


def main() -> int:
    """Run, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"tp": TP, "hardware": "h100"})
    results.runs.clear()
    drawing, (left, right) = figure(columns=2)
    print("| model | GPUs | " + " | ".join(f"MFU at {n // 1000}K" for n in TOKENS) + " |")
    print("|" + " --- |" * (2 + len(TOKENS)))
    cases = [(shape, spp) for shape in (LLAMA3_8B, LLAMA3_70B) for spp in STAGES]
    for shape, spp in tqdm(cases, leave=False):
        layout = ParallelLayout(tp=TP, spp=spp)
        cluster = h100(shape, layout)
        mfu = [
            prefill_flops(shape, n)
            / (TP * spp * cluster.hardware.flops_per_s)
            / best_alone_s(cluster, layout, (1024, 4096), n)
            for n in TOKENS
        ]
        name = f"{shape.name}, {TP * spp} GPUs"
        results.put(f"mfu {name}", {"mfu": [round(value, 3) for value in mfu]})
        tqdm.write(f"| {shape.name} | {TP * spp} | " + " | ".join(f"{value:.0%}" for value in mfu) + " |",
                   file=sys.stdout)
        left.plot(TOKENS, mfu, marker="o", label=name)
    print("\n| model | tokens | " + " | ".join(f"MBU, kvp {kvp}" for kvp in DEGREES) + " |")
    print("|" + " --- |" * (2 + len(DEGREES)))
    for shape in (LLAMA3_8B, LLAMA3_70B):
        for num_tokens in (1_000_000, 4_000_000, 10_000_000):
            mbu = []
            for kvp in DEGREES:
                layout = ParallelLayout(tp=TP, kvp=kvp)
                cluster = h100(shape, layout)
                weights = shape.num_layers * shape.num_layer_params + shape.num_head_params
                num_bytes = kvp * weights * shape.bytes_per_element + num_tokens * shape.kv_bytes_per_token
                bandwidth = layout.world_size * cluster.hardware.memory_bytes_per_s
                mbu.append(num_bytes / bandwidth / tpot_s(cluster, layout, num_tokens))
            name = f"{shape.name}, {num_tokens // 1_000_000}M"
            results.put(f"mbu {name}", {"mbu": [round(value, 3) for value in mbu]})
            print(f"| {shape.name} | {num_tokens:,} | " + " | ".join(f"{value:.0%}" for value in mbu) + " |")
            right.plot(DEGREES, mbu, marker="o", label=name)
    left.set_xscale("log")
    left.set_xlabel("prompt tokens")
    left.set_ylabel("causal MFU of prefill")
    right.set_xlabel("replicas that hold the KV")
    right.set_ylabel("MBU of a decode")
    for axis in (left, right):
        axis.set_ylim(0.0, 1.0)
        axis.legend(fontsize=6)
    drawing.savefig(HERE / "mfu_mbu.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
