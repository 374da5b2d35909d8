"""First token against time per token: a long prompt in small chunks beside decodes, over 1, 2 or 4 KV shards.

    python -m experiments.kvp_tradeoff.run

Llama-3 8B, tp 4 x 4 stages x KVP 1, 2 or 4 on H100; a prompt of 1M, 2M or 4M tokens in chunks of 32 to 256. TTFT of the
prompt, alone in its chunks, and the p95 of the time that one of its chunks and a decode beside it take through all
stages. A replica holds an equal share of the prompt's KV at its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.lib.paper import LLAMA3_8B, Results, figure, h100
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.summary import percentile

HERE = Path(__file__).parent
DEGREES = (1, 2, 4)
CHUNKS = (32, 64, 128, 256)
TOKENS = (1_048_576, 2_097_152, 4_194_304)
# Every so many-th chunk is calculated: times change little from one to the next.
EVERY = {1_048_576: 8, 2_097_152: 16, 4_194_304: 32}
DECODE_TOKENS = 1000


def step_times_s(kvp: int, num_tokens: int, chunk_tokens: int) -> tuple[list[float], float]:
    """Seconds of every EVERYth chunk with a decode beside it, through all stages, and TTFT of the prompt."""
    layout = ParallelLayout(tp=4, spp=4, kvp=kvp)
    shard_tokens = num_tokens // kvp
    truth = Truth(h100(LLAMA3_8B, layout).cost(layout), shard_tokens, TruthConfig(), seed=0)
    traversals_s, slowest_stages_s = [], []
    for batch in _batches(num_tokens, chunk_tokens, shard_tokens):
        times = truth(batch)
        traversals_s.append(Pipeline(layout.spp, layout.kvp).run(0, times, 0.0))
        slowest_stages_s.append(max(max(stages) for stages in times.stage_s if stages))
    # Streamed: the last stage is reached once, then a chunk leaves every slowest stage's time.
    ttft_s = EVERY[num_tokens] * sum(slowest_stages_s) + traversals_s[-1]
    return traversals_s, ttft_s


def _batches(num_tokens: int, chunk_tokens: int, shard_tokens: int) -> Iterator[Batch]:
    for start in range(0, num_tokens, EVERY[num_tokens] * chunk_tokens):
        ranks = tuple(range(start // shard_tokens + 1))
        chunk = Chunk("long", start, chunk_tokens, False, ranks)
        decode = Chunk("decode", DECODE_TOKENS, 1, True, (ranks[-1],))
        yield Batch(batch_id=0, chunks=(decode, chunk), released=(), created_s=0.0, budget_s=1.0, predicted_s=1.0)


def main() -> int:
    """Run, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"model": "llama3_8b", "hardware": "h100", "tp": 4, "spp": 4})
    results.runs.clear()
    print("| tokens | chunk | " + " | ".join(f"kvp {kvp}: TTFT | p95 step" for kvp in DEGREES) + " |")
    print("|" + " --- |" * (2 + 2 * len(DEGREES)))
    drawing, axes = figure(4.2, 3.6, columns=len(TOKENS))
    for num_tokens, axis in zip(TOKENS, axes, strict=True):
        points: dict[int, list[tuple[float, float]]] = {kvp: [] for kvp in DEGREES}
        for chunk_tokens in CHUNKS:
            cells = []
            for kvp in DEGREES:
                steps_s, ttft_s = step_times_s(kvp, num_tokens, chunk_tokens)
                p95_ms = 1e3 * percentile(sorted(steps_s), 95)
                points[kvp].append((p95_ms, ttft_s))
                cells += [f"{ttft_s:.0f} s", f"{p95_ms:.1f} ms"]
            print(f"| {num_tokens >> 20}M | {chunk_tokens} | " + " | ".join(cells) + " |", flush=True)
        for kvp, marker in zip(DEGREES, "osD", strict=True):
            axis.plot(*zip(*points[kvp], strict=True), marker=marker, label=f"kvp {kvp}")
        rounded = {f"kvp {kvp}": [[round(ms, 2), round(s, 1)] for ms, s in found] for kvp, found in points.items()}
        results.put(f"{num_tokens >> 20}M", rounded)
        axis.set_title(f"{num_tokens >> 20}M tokens", fontsize=9)
        axis.set_xlabel("p95 step, ms")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TTFT, s")
    axes[0].legend(fontsize=8)
    drawing.savefig(HERE / "kvp_tradeoff.png", dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
