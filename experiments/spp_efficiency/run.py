"""How much of the second core does stream pipelining use? One long prompt, 1 stage against 2 stages, a thread each.

    python -m experiments.spp_efficiency.run                    # 64K tokens in chunks of 1,024
    python -m experiments.spp_efficiency.run --tokens 16384     # a minute

M chunks through P stages take (M + P - 1) chunk times at best, so the bar is 95% of M / (M + P - 1). Beside it tp=2
on the same cores. Two figures for each layout:

* measured: the whole prefill by the clock, as the front sees it. Means something on idle cores only.
* by CPU time: each step's own CPU seconds, laid out as the pipeline lays them out (a step starts when the stage
  before has finished it and its own stage the step before). Other programs on the cores do not enter it; nor does
  waiting for messages, which `measured` has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from array import array
from pathlib import Path

from tqdm import tqdm

from experiments.lib.random_llama import save_llama
from megatron_medha.bits.rank_processes import RankProcesses, rank_processes
from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling

BAR = 0.95
# Attention of a long prompt dominates: 4 heads of 64 and 2 layers make 64K tokens 4.4 TFLOP, a minute on a core.
MODEL = {"hidden_size": 256, "ffn_size": 688, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
BLOCK_SIZE = 64


def prefill(
    ranks: RankProcesses, checkpoint: Path, layout: ParallelLayout, num_tokens: int, chunk: int
) -> list[list[float]]:
    """Prefill one prompt; returns [wall seconds], then the CPU seconds of every step by stage."""
    num_blocks = num_tokens // BLOCK_SIZE + 1
    block_bytes = 2 * BLOCK_SIZE * MODEL["num_kv_heads"] * MODEL["head_dim"] * 4 * MODEL["num_layers"]
    ranks.load(
        RankConfig(
            layout=layout, server_endpoint="", checkpoint=str(checkpoint),
            model=ModelOptions(device="cpu", dtype="float32", block_size=BLOCK_SIZE, num_threads=1),
            kv_memory_bytes=num_blocks * block_bytes,
        )  # fmt: skip
    )
    prompt = array("i", (index % 1000 for index in range(num_tokens)))
    new = NewRequest("a", prompt.tobytes(), num_tokens, Sampling(max_output_tokens=1, temperature=0.0))
    starts = list(range(0, num_tokens, chunk))
    cpu_s: list[list[float]] = [[] for _ in range(layout.spp)]
    num_submitted = 0
    started_s = time.monotonic()
    with tqdm(total=len(starts), desc=f"spp={layout.spp} tp={layout.tp}", unit="chunk") as bar:
        while len(cpu_s[-1]) < len(starts):
            # As the scheduler does: when stage 0 is free and fewer batches are in flight than there are stages.
            while (
                num_submitted < len(starts)
                and num_submitted == len(cpu_s[0])
                and num_submitted - len(cpu_s[-1]) < layout.spp
            ):
                start = starts[num_submitted]
                count = min(chunk, num_tokens - start)
                chunks = (Chunk("a", start, count, start + count == num_tokens),)
                begin = append_op("a", 0, (Extent(0, num_blocks),))
                first = RankStep(num_submitted, chunks, (new,), kv_ops=(begin,))
                ranks.send_to_kvp_rank(0, RankStep(num_submitted, chunks) if start else first)
                num_submitted += 1
            for answer in ranks.answers():
                stage = layout.coord_of(answer.done.rank).spp
                cpu_s[stage].append(answer.cpu_s)
                bar.update(stage == layout.spp - 1)
    return [[time.monotonic() - started_s], *cpu_s]


def makespan_s(cpu_s: list[list[float]]) -> float:
    """The pipeline's length if every step took its CPU time: start(i, s) = max(end(i, s - 1), end(i - 1, s))."""
    ends = [0.0] * len(cpu_s)
    for durations in zip(*cpu_s, strict=True):
        arrived = 0.0
        for stage, duration_s in enumerate(durations):
            ends[stage] = arrived = max(ends[stage], arrived) + duration_s
    return ends[-1]


def main() -> None:
    """1 stage, 2 stages, tp=2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the prompt (default: 65536)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per chunk (default: 1024)")
    args = parser.parse_args()
    num_chunks = -(-args.tokens // args.chunk)
    with tempfile.TemporaryDirectory() as name, rank_processes(2) as ranks:
        save_llama(Path(name), **MODEL)
        found = {
            label: prefill(ranks, Path(name), layout, args.tokens, args.chunk)
            for label, layout in {
                "1 stage": ParallelLayout(), "2 stages": ParallelLayout(spp=2), "tp=2": ParallelLayout(tp=2)
            }.items()
        }  # fmt: skip
    ideal = num_chunks / (num_chunks + 1)
    print(f"{args.tokens} tokens in {num_chunks} chunks; ideal efficiency of 2 stages {ideal:.3f}, "
          f"bar {BAR * ideal:.3f}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'':<10}{'measured s':>12}{'efficiency':>12}{'by CPU time s':>15}{'efficiency':>12}{'of ideal':>10}")
    (one_s,), *one_cpu = found["1 stage"]
    for label, ((wall_s,), *cpu_s) in found.items():
        num_ranks = 1 if label == "1 stage" else 2
        measured, replayed_s = one_s / wall_s / num_ranks, makespan_s(cpu_s)
        replayed = makespan_s(one_cpu) / replayed_s / num_ranks
        of_ideal = f"{replayed / ideal:>10.3f}" if label == "2 stages" else ""
        print(f"{label:<10}{wall_s:>12.1f}{measured:>12.3f}{replayed_s:>15.1f}{replayed:>12.3f}{of_ideal:>10}"
              f"   CPU s by stage: {', '.join(f'{sum(stage):.1f}' for stage in cpu_s)}")
    (two_s,), *_ = found["2 stages"]
    is_kept = one_s / two_s / 2 >= BAR * ideal
    print(f"2 stages, measured: {one_s / two_s / 2 / ideal:.3f} of ideal; bar {BAR}: {'kept' if is_kept else 'MISSED'}")
    sys.exit(not is_kept)


if __name__ == "__main__":
    main()
