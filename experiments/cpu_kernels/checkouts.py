"""Attention of this checkout against that of another one, in turn in one run: what a change of the kernels costs.

    python -m experiments.cpu_kernels.checkouts ../other
    python -m experiments.cpu_kernels.checkouts ../other --dtype bfloat16 --threads 1 --cases decode

Each checkout is a process with its own .venv, and is asked for one case at a time, the first one changing. Medians of
the seconds of a call, and the median of the ratios of neighbouring turns. --clock cpu: the processes' CPU time, for a
machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = [
    ("decode 1 x 1K", 1, 1, 1 << 10), ("decode 1 x 8K", 1, 1, 8 << 10), ("decode 1 x 32K", 1, 1, 32 << 10),
    ("decode 1 x 128K", 1, 1, 128 << 10), ("decode 8 x 1K", 8, 1, 1 << 10), ("decode 8 x 8K", 8, 1, 8 << 10),
    ("chunk 64 at 8K", 1, 64, 8 << 10), ("chunk 256 at 32K", 1, 256, 32 << 10),
    ("chunk 512 at 128K", 1, 512, 128 << 10),
    ("chunk 2048 at 2K", 1, 2048, 2 << 10), ("chunk 2048 at 32K", 1, 2048, 32 << 10),
]  # fmt: skip
_TURN_S = 0.05  # of each checkout, about


def serve(dtype: str, threads: int, clock: str, heads: tuple[int, int, int]) -> None:
    """Be a checkout: for each line, an index of CASES and a number of calls, answer with the seconds of one call."""
    import torch

    from experiments.cpu_kernels.run import CPU, Case, Sizes, prepared
    from megatron_medha.kernels.choose_backend import attention_backend

    now = time.process_time if clock == "cpu" else time.perf_counter
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    index, call = -1, lambda: None
    with torch.inference_mode():
        for line in sys.stdin:
            wanted, count = map(int, line.split())
            if wanted != index:
                index = wanted
                sizes = Sizes(*heads, getattr(torch, dtype))
                call = prepared(attention_backend("native", CPU), Case(*CASES[index][1:]), sizes)
                call()
            started_s = now()
            for _ in range(count):
                call()
            print(json.dumps((now() - started_s) / count), flush=True)


def main() -> None:
    """Time all cases in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="a checkout with a .venv")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 2, 64], help="query heads, kv heads, head dim")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cases", default="", help="only those that begin so")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.dtype, args.threads, args.clock, tuple(args.heads))
    this = Path(__file__).resolve().parents[2]
    words = [
        str(Path(__file__).resolve()), "--serve", "--dtype", args.dtype, "--threads", str(args.threads),
        "--clock", args.clock, "--heads", *map(str, args.heads),
    ]  # fmt: skip
    checkouts = [
        subprocess.Popen(
            [directory / ".venv/bin/python", *words], cwd=directory, env={"PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for directory in (this, args.other.resolve())
    ]  # fmt: skip

    def ask(which: int, index: int, count: int) -> float:
        process = checkouts[which]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{index} {count}\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline()))

    print(f"{args.dtype}, {args.threads} threads, {args.heads} heads, {args.clock} clock")
    print(f"{'':20}    this   other   ratio")
    for index, (name, *_) in enumerate(CASES):
        if not name.startswith(args.cases):
            continue
        one_s = min(ask(which, index, 1) for which in (0, 1))
        count = max(1, int(_TURN_S / one_s))
        turns = []
        for turn in range(args.rounds):
            order = (0, 1) if turn % 2 else (1, 0)
            took = {which: ask(which, index, count) for which in order}
            turns.append((took[0], took[1]))
        mine, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
        ratio = statistics.median(a / b for a, b in turns)
        print(f"{name:20} {mine * 1e3:7.3f} {theirs * 1e3:7.3f} {ratio:7.3f}", flush=True)
    for process in checkouts:
        process.kill()


if __name__ == "__main__":
    main()
