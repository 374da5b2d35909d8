"""Chunks that keep a step's time against chunks of one size: what a long prompt costs those who decode beside it.

    python -m experiments.adaptive_chunks.run

Llama-3 8B on 8 H100 (tp 8): eight answers decode while one prompt of 1M tokens is prefilled. For every chunk rule the
prompt's TTFT, and the time between two tokens of the others (p50, p95, most).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from experiments.lib.paper import LLAMA3_8B, Cluster, Results, engine, figure, hardware
from megatron_medha.core.batch import Batch
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.sim.sim_world import SimulatedWorld
from megatron_medha.stats.summary import percentile

HERE = Path(__file__).parent
NUM_TOKENS = 1_000_000
NUM_DECODES = 8
LAYOUT = ParallelLayout(tp=8)
STATIC = (32, 128, 512, 2048, 4096)
BUDGETS_S = (0.02, 0.03, 0.05, 0.1, 0.2, 0.4)
NO_OTHERS = SchedulerConfig(has_space_sharing=False, progress_share=0.0, tile_tokens=8)


class _UntilFirstToken(SimulatedWorld):
    """Ends when the long prompt has its first token."""

    def next_event(self):  # type: ignore[no-untyped-def]
        return None if self.records["long"].token_times_s else super().next_event()


def step_times_s(cluster: Cluster, config: SchedulerConfig) -> tuple[float, list[float]]:
    """TTFT of the long prompt, and seconds of every step until then, ascending."""
    decodes = [
        Request(request_id=f"d{i}", num_prompt_tokens=2000, max_output_tokens=10_000_000, arrival_s=0.0)
        for i in range(NUM_DECODES)
    ]
    long = Request(request_id="long", num_prompt_tokens=NUM_TOKENS, max_output_tokens=1, arrival_s=5.0)
    truth = cluster.truth(LAYOUT)
    steps: list[float] = []

    def seconds(batch: Batch) -> float:
        taken = sum(truth(batch).stage_s[0])
        if any(chunk.request_id == "long" for chunk in batch.chunks):
            steps.append(taken)
        return taken

    world = _UntilFirstToken([*decodes, long], seconds)
    # Answers never end here, so memory is made large enough for whatever they may write.
    serve(cluster.scheduler(config, LAYOUT, 100_000_000), world)
    return world.records["long"].ttft_s, sorted(steps)


def main() -> int:
    """Run, print, draw; 1 if a static chunk is better than an adaptive one in both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cluster = Cluster(shape=LLAMA3_8B, hardware=hardware("h100", 8), engine=engine())
    static = replace(NO_OTHERS, chunking=Chunking.FIXED, policy="fcfs")
    rules = {f"static {size}": replace(static, fixed_chunk_tokens=size + NUM_DECODES) for size in STATIC}
    rules |= {f"adaptive {1000 * budget:.0f} ms": replace(NO_OTHERS, step_budget_s=budget) for budget in BUDGETS_S}
    results = Results(HERE / "results.json", {"num_tokens": NUM_TOKENS, "num_decodes": NUM_DECODES})
    results.runs.clear()
    print("| rule | TTFT, s | step p50, ms | p95 | most |")
    print("| --- | --- | --- | --- | --- |")
    for name, config in tqdm(rules.items(), leave=False):
        ttft_s, steps = step_times_s(cluster, config)
        quantiles = [1e3 * percentile(steps, percent) for percent in (50, 95, 100)]
        results.put(name, {"ttft_s": round(ttft_s, 2), "step_ms": [round(q, 2) for q in quantiles]})
        tqdm.write(f"| {name} | {ttft_s:.1f} | " + " | ".join(f"{q:.1f}" for q in quantiles) + " |", file=sys.stdout)
    drawing, axis = figure()
    worse = []
    for kind, color in (("static", "#d62728"), ("adaptive", "#1f77b4")):
        points = {name: run for name, run in results.runs.items() if name.startswith(kind)}
        axis.plot([run["step_ms"][1] for run in points.values()], [run["ttft_s"] for run in points.values()],
                  marker="o", color=color, label=kind)
        for name, run in points.items():
            axis.annotate(name.split()[1], (run["step_ms"][1], run["ttft_s"]), fontsize=7)
    for name, run in results.runs.items():
        if name.startswith("adaptive") and any(
            other["step_ms"][1] < run["step_ms"][1] and other["ttft_s"] < run["ttft_s"]
            for rule, other in results.runs.items() if rule.startswith("static")
        ):
            worse.append(name)
    axis.set_xscale("log")
    axis.set_xlabel("p95 step, ms")
    axis.set_ylabel("TTFT of 1M tokens, s")
    axis.legend()
    drawing.savefig(HERE / "adaptive_chunks.png", dpi=110)
    print("no static chunk is better in both" if not worse else f"a static chunk is better in both than {worse}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
