"""Each mechanism taken away alone: what it is worth, where it has work to do.

    python -m experiments.ablations.run      # after experiments/headline, of which it takes over what is the same

Three tables, simulated. Scheduling: Llama-3 8B on 16 A100, tp 8 x 2 stages, 10 minutes of chats with 5% long prompts at
0.25 and 0.75 requests/s. Overload: the same for 5 minutes at 1.75 requests/s until all are done, with and without
progress_share, under SRPT. Parallelism: one prompt of 1M tokens prefilled alone on 64 H100, and the tokens after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiments.headline.systems import LAYOUT, cluster
from experiments.kvp_tpot.run import tpot_s
from experiments.lib.paper import LLAMA3_8B, Results, best_alone_s, figure, h100, measure, scheduler
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.stats.outcome import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig

HERE = Path(__file__).parent
QPS = (0.25, 0.75)
MINUTES = 10
# What is taken away, and a system of experiments/headline that has been run there, or a configuration that is run here.
VARIANTS: dict[str, str | tuple[str, ...]] = {
    "all mechanisms": "lars",
    "no LARS: first come, first served": "medha_fcfs",
    "no LARS: absolute slack": "medha_lrs",
    "no adaptive chunks: 512 tokens a step": ("lars", "scheduler.chunking=fixed", "scheduler.fixed_chunk_tokens=512"),
    "no adaptive chunks: 2,048": ("lars", "scheduler.chunking=fixed", "scheduler.fixed_chunk_tokens=2048"),
    "no space sharing": "lars_no_sharing",
    "no progress_share": "lars_no_progress",
    "no triage": "lars_no_triage",
    "no triage, no slack margin": "lars_no_margin",
}
OVERLOAD_QPS, OVERLOAD_MINUTES = 1.75, 5
OVERLOAD = {
    f"SRPT, progress_share={share}": ("lars", "scheduler.policy=srpt", f"scheduler.progress_share={share}")
    for share in (0.1, 0)
}
NUM_TOKENS = 1_000_000
LAYOUTS = {
    "8 GPUs: tp 8": ParallelLayout(tp=8),
    "64: tp 8, 8 stages (SPP)": ParallelLayout(tp=8, spp=8),
    "64: tp 8, 4 stages, 2 shards (SPP, KVP)": ParallelLayout(tp=8, spp=4, kvp=2),
    "64: tp 8, 8 shards (KVP)": ParallelLayout(tp=8, kvp=8),
}


def main() -> int:
    """Run what is missing, print, draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(HERE / "results.json", {"minutes": MINUTES, "seed": 42})
    headline = json.loads((HERE.parent / "headline" / "results.json").read_text())["runs"]
    _scheduling(results, headline)
    _overload(results)
    _parallelism(results)
    _draw(results.runs)
    return 0


def _run(results: Results, name: str, words: str | tuple[str, ...], qps: float, minutes: int, drain_s: float) -> Any:
    if name not in results.runs:
        assert not isinstance(words, str), f"{name} is a run of experiments/headline"
        on = cluster()
        measured = measure(
            on.scheduler(scheduler(*words), LAYOUT), WorkloadConfig(qps=qps, duration_s=60.0 * minutes), 42,
            on.isolated(LAYOUT, NUM_TOKENS), Slo(), runs_on=(LAYOUT, on.truth(LAYOUT)),
            front_s=on.engine.request_s, drain_s=drain_s, label=name,
        )  # fmt: skip
        values = measured.values(LengthClasses())
        values["longest_ttft_s"] = round(measured.ttfts_s(None, LengthClasses())[-1], 2)
        results.put(name, values)
    return results.runs[name]


def _scheduling(results: Results, headline: dict[str, Any]) -> None:
    print("| requests/s | | short p50 | p99 | long p50 | p90 | SLO short | long | all | TPOT p50 | p99 |")
    print("|" + " --- |" * 11)
    for qps in QPS:
        for title, variant in VARIANTS.items():
            if isinstance(variant, str):
                results.put(f"{title}, {qps}/s", headline[f"{variant} 5% {qps}/s {MINUTES}min"])
            values = _run(results, f"{title}, {qps}/s", variant, qps, MINUTES, 20.0 * MINUTES)
            cells = [f"{values['short'][f'ttft_p{percent}_s']:.3g}" for percent in (50, 99)]
            cells += [f"{values['long'][f'ttft_p{percent}_s']:.3g}" for percent in (50, 90)]
            cells += [f"{values[group]['attainment']:.0%}" for group in ("short", "long", "all")]
            cells += [f"{1000 * values['all'][f'tpot_p{percent}_s']:.0f} ms" for percent in (50, 99)]
            print(f"| {qps} | {title} | " + " | ".join(cells) + " |", flush=True)


def _overload(results: Results) -> None:
    print(f"\n| overload, {OVERLOAD_QPS} requests/s | long p50 | p90 | p99 | longest | short p99 |")
    print("|" + " --- |" * 6)
    for title, words in OVERLOAD.items():
        values = _run(results, f"{title}, overload", words, OVERLOAD_QPS, OVERLOAD_MINUTES, 1e9)
        cells = [f"{values['long'][f'ttft_p{percent}_s']:.0f} s" for percent in (50, 90, 99)]
        cells += [f"{values['longest_ttft_s']:.0f} s", f"{values['short']['ttft_p99_s']:.2f} s"]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


def _parallelism(results: Results) -> None:
    print("\n| H100 | TTFT of 1M tokens | ms per token after 1M | after 4M |")
    print("|" + " --- |" * 4)
    for title, layout in LAYOUTS.items():
        on = h100(LLAMA3_8B, layout)
        alone = ParallelLayout(tp=layout.tp, spp=layout.spp)  # a prompt this short lies on one replica
        values = {
            "ttft_s": round(best_alone_s(h100(LLAMA3_8B, alone), alone, (1024, 4096), NUM_TOKENS), 2),
            "tpot_ms": [round(1e3 * tpot_s(on, layout, num_tokens), 2) for num_tokens in (NUM_TOKENS, 4 * NUM_TOKENS)],
        }
        results.put(title, values)
        print(f"| {title} | {values['ttft_s']:.1f} s | " + " | ".join(f"{ms:.1f}" for ms in values["tpot_ms"]) + " |")


def _draw(runs: dict[str, Any]) -> None:
    drawing, axes = figure(5.5, 3.8, columns=2)
    for axis, group in zip(axes, ("short", "long"), strict=True):
        for row, title in enumerate(reversed(VARIANTS)):
            values = runs[f"{title}, {QPS[1]}/s"][group]
            points = [values[f"ttft_p{percent}_s"] for percent in (50, 90, 99)]
            axis.plot(points, [row] * 3, color="0.75", zorder=1)
            for point, color in zip(points, ("#1f77b4", "#ff7f0e", "#d62728"), strict=True):
                axis.scatter([point], [row], color=color, zorder=2, s=22)
        axis.set_xscale("log")
        axis.set_xlabel(f"TTFT of {group} prompts, s: p50 blue, p90 orange, p99 red", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(VARIANTS)), list(reversed(VARIANTS)), fontsize=8)
    axes[1].set_yticks(range(len(VARIANTS)), [""] * len(VARIANTS))
    drawing.suptitle(f"Llama-3 8B on 16 A100, 5% long, {QPS[1]} requests/s, simulated", fontsize=9)
    drawing.savefig(HERE / "ablations.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
