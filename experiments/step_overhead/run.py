"""Where the time of a decode step goes: a real server and its rank, timed at the borders of their parts.

    python -m experiments.step_overhead.run                              # makes the small model first
    python -m experiments.step_overhead.run --checkpoint DIR --threads 2 --repeats 5

Per step, medians over all decode steps of the batch size: from one batch to the next as the front sees it; inside
native functions and sampling on the rank; the rest of the rank's time; what is left, in which the rank waits for the
front. CPU time of both processes beside it, which a busy machine distorts less. Bar: 15% of a step outside kernels
at batch 8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.lib.http_stream import complete
from experiments.lib.process_stats import children
from experiments.lib.random_llama import save_small_model
from experiments.lib.server_process import free_port, started
from experiments.peers.load import prompt

BAR = 0.15
SHARE = "outside kernels, share"
WARM_UP_TOKENS = 32


def main() -> None:
    """Run the server once, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; default: the small model is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/step_overhead"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or args.out / "small"
    if not (checkpoint / "config.json").exists():
        save_small_model(checkpoint)
    batches = [int(size) for size in args.batches.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        with serving(checkpoint, args.threads, Path(directory)) as (port, pids):
            used = asyncio.run(load(port, pids, batches, args.tokens, args.repeats))
        front, rank = (json.loads((Path(directory) / f"{name}.json").read_text()) for name in ("front", "rank"))
    found = {size: figures(size, front, rank) | used[size] for size in batches}
    (args.out / "results.json").write_text(json.dumps({"arguments": vars(args), "results": found}, default=str))
    table = as_table(found)
    (args.out / "table.md").write_text(table)
    print(table)
    if 8 in found and found[8][SHARE] > BAR:
        sys.exit(1)


async def load(
    port: int, pids: dict[str, int], batches: list[int], num_tokens: int, repeats: int
) -> dict[int, dict[str, float]]:
    """Decode in batches of each size; CPU time per step of each process, from when all of them decode."""
    rng = random.Random(0)
    await complete(port, prompt(32, rng), 8, may_join_tokens=True)
    found: dict[int, dict[str, float]] = {}
    for size in batches:
        per_step: dict[str, list[float]] = {name: [] for name in pids}
        for _ in range(repeats):
            begun: dict[str, float] = {}
            num_seen = 0

            def seen(size: int = size, begun: dict[str, float] = begun) -> None:
                nonlocal num_seen
                num_seen += 1
                if num_seen == WARM_UP_TOKENS * size:
                    begun.update({name: cpu_s(pid) for name, pid in pids.items()})

            await asyncio.gather(
                *(
                    complete(port, prompt(32, rng), num_tokens, may_join_tokens=True, on_token=seen)
                    for _ in range(size)
                )
            )
            for name, pid in pids.items():
                per_step[name].append((cpu_s(pid) - begun[name]) / (num_tokens - WARM_UP_TOKENS))
        found[size] = {f"{name} CPU": statistics.median(values) for name, values in per_step.items()}
    return found


def figures(size: int, front: list[dict[str, Any]], rank: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps that decode `size` sequences and nothing else."""
    pairs = [
        (after["at_s"] - before["at_s"], before["scheduler_s"])
        for before, after in zip(front, front[1:], strict=False)
        if before["chunks"] == before["tokens"] == after["chunks"] == after["tokens"] == size
    ]
    steps = [step for step in rank if step["chunks"] == step["tokens"] == size]
    wall_s = statistics.median(wall for wall, _ in pairs)
    rank_s = statistics.median(step["rank_s"] for step in steps)
    kernels_s = statistics.median(sum(step["kernels"].values()) for step in steps)
    scheduler_s = statistics.median(scheduler for _, scheduler in pairs)
    return {
        "step": wall_s,
        "kernels": kernels_s,
        "rank outside kernels": rank_s - kernels_s,
        "rank idle: front, and the way there and back": wall_s - rank_s,
        "of it, scheduler": scheduler_s,
        SHARE: 1 - kernels_s / wall_s,
    }


def as_table(found: dict[int, dict[str, float]]) -> str:
    """One row a figure, one column a batch size; milliseconds."""
    lines = ["| ms a step | " + " | ".join(f"batch {size}" for size in found) + " |"]
    lines.append("| --- |" + " --- |" * len(found))
    for key in next(iter(found.values())):
        cells = (f"{100 * f[key]:.0f}%" if key.endswith("share") else f"{1e3 * f[key]:.2f}" for f in found.values())
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    if 8 in found:
        share = found[8][SHARE]
        lines.append(f"\noutside kernels at batch 8: {share:.0%}, bar {BAR:.0%}: {'met' if share <= BAR else 'missed'}")
    return "\n".join(lines) + "\n"


@contextmanager
def serving(checkpoint: Path, threads: int, out: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """Port and process ids of a timed server; what it wrote is in `out` when the block has ended."""
    port = free_port()
    command = [sys.executable, "-m", "experiments.step_overhead.timed_front", "serve", f"checkpoint={checkpoint}"]
    command += [f"server.port={port}", f"model.num_threads={threads}", "model.kv_memory_gib=1"]
    with started(command, port, environment={"STEP_OVERHEAD_OUT": str(out)}, log=out / "server.log") as server:
        pid = server.process.pid
        yield port, {"front": pid, "rank": children(pid)[0]}


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    ) / 1e9


if __name__ == "__main__":
    main()
