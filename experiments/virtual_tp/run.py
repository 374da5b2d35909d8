"""What slices (model.virtual_tp) cost on one rank: steps with and without them, in turn in one process.

    python -m experiments.virtual_tp.run checkpoints/tiny
    python -m experiments.virtual_tp.run                     # random weights, 28 M

Medians over rounds; a step is always over the same positions. Bar: at most 3% more in each cell, for slices to be the
default.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from experiments.lib.random_llama import save_llama
from experiments.narrow_weights.run import STEPS, timed
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.worker.rank import Rank
from megatron_medha.worker.startup.load import load_rank

BAR = 1.03


def main() -> None:
    """Print a table of times; exit code 1 where slices cost more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: a random Llama of 28 M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--slices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    logging.getLogger("megatron_medha").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = Path(directory)
            save_llama(
                checkpoint, hidden_size=512, ffn_size=1376, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
                vocab_size=4096,
            )  # fmt: skip
        sys.exit(compare(checkpoint, args.dtype, args.slices, args.threads, args.rounds))


def compare(checkpoint: Path, dtype: str, slices: list[int], threads: int, rounds: int) -> int:
    """Print times of each step; 1 if the bar is missed."""
    ranks: dict[str, Rank] = {}
    for count in (1, *slices):
        model = ModelOptions(device="cpu", dtype=dtype, num_threads=threads, virtual_tp=str(count))
        config = RankConfig(
            server_endpoint="inproc://nobody", checkpoint=str(checkpoint), kv_memory_bytes=1 << 30, model=model
        )
        ranks[str(count)], _ = load_rank(config, lambda what, fraction: None)
    seconds = timed(ranks, rounds)
    print(f"| {dtype}, {threads} threads, ms | {' | '.join(ranks)} slices | costs |\n|{' --- |' * (len(ranks) + 2)}")
    worst = 0.0
    for name, _, _ in STEPS:
        plain_s, *sliced_s = (seconds[kind, name] for kind in ranks)
        cost = max(sliced_s) / plain_s
        worst = max(worst, cost)
        print(f"| {name} | {' | '.join(f'{1e3 * one_s:.2f}' for one_s in (plain_s, *sliced_s))} | {cost - 1:+.1%} |")
    print(f"at most {worst - 1:+.1%}   bar {BAR - 1:+.0%}   {'kept' if worst <= BAR else 'MISSED'}")
    return int(worst > BAR)


if __name__ == "__main__":
    main()
