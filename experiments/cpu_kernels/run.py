"""How near the attention backends come to this machine's limits, side by side.

    python -m experiments.cpu_kernels.run
    python -m experiments.cpu_kernels.run --dtype bfloat16 --threads 1 --heads 32 --kv-heads 8 --head-dim 128

Chunks of a prompt at a long context, against the rate of a large matrix product in the same dtype; decodes, one row per
sequence, against the rate at which memory can be read. Both limits are measured in the same run, between the
kernels' own turns: this is about ratios, as other tenants of a machine slow all of them alike. Medians.
FLOP count both products over the keys a row may see; bytes count each key and value once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.choose_backend import attention_backend, backend_names
from megatron_medha.kernels.kv.slot_table import SlotTable

CPU = torch.device("cpu")
BLOCK_SIZE = 16
CHUNK_BAR = 0.60   # of the matmul rate, for chunks of BAR_CHUNK tokens
BAR_CHUNK = 256
DECODE_BAR = 0.80  # of the read bandwidth, for one decode


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of one layer: so many sequences of so many rows each, at so much context."""

    num_sequences: int
    num_rows: int
    context: int  # keys the last row sees

    @property
    def name(self) -> str:
        """For the table."""
        context = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        if self.num_rows > 1:
            return f"chunk {self.num_rows} at {context}"
        return f"decode {self.num_sequences} x {context}"


CASES = [
    *(Case(1, chunk, 32768) for chunk in (32, 64, 128, 256, 512)),
    *(Case(1, chunk, chunk) for chunk in (256, 2048)),
    *(Case(num_sequences, 1, context) for num_sequences, context in ((1, 131072), (1, 1024), (8, 1024), (8, 16384))),
]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Heads and dtype of the attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def flop(self, case: Case) -> float:
        """Of both products, over visible keys."""
        keys = sum(case.context - row for row in range(case.num_rows))
        return 4.0 * case.num_sequences * keys * self.num_heads * self.head_dim

    def kv_bytes(self, case: Case) -> float:
        """Keys and values, once."""
        return 2.0 * case.num_sequences * case.context * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def prepared(backend: AttentionBackend, case: Case, sizes: Sizes) -> Callable[[], object]:
    """A call that computes the case once over filled KV."""
    blocks_each = -(-case.context // BLOCK_SIZE)
    num_blocks = blocks_each * case.num_sequences
    layer = backend.allocate(num_blocks, BLOCK_SIZE, sizes.num_kv_heads, sizes.head_dim, sizes.dtype)
    for tensor in layer:
        tensor.normal_()
    ranges = []
    for index in range(case.num_sequences):
        table = SlotTable(BLOCK_SIZE)
        table.append([(index * blocks_each, blocks_each)])
        ranges.append(QueryRange(index * case.num_rows, case.num_rows, case.context - case.num_rows, table))
    plan = backend.plan(ranges)
    num_tokens = case.num_sequences * case.num_rows
    group = sizes.num_heads // sizes.num_kv_heads
    q = torch.randn(num_tokens, sizes.num_kv_heads, group, sizes.head_dim).to(sizes.dtype)
    k, v = torch.randn(2, num_tokens, sizes.num_kv_heads, sizes.head_dim).to(sizes.dtype)
    return lambda: backend.attend(plan, q, k, v, layer, sizes.head_dim**-0.5)


def main() -> None:
    """Time all cases in rounds, print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice, one a core")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backends", default=",".join(backend_names(CPU)))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.backends.split(",")
    dtypes = [torch.float32, torch.bfloat16] if args.dtype == "both" else [getattr(torch, args.dtype)]
    for dtype in dtypes:
        report(Sizes(args.heads, args.kv_heads, args.head_dim, dtype), names, args.rounds)


@torch.inference_mode()
def report(sizes: Sizes, names: list[str], rounds: int) -> None:
    """One dtype: measure, then print."""
    left, right = torch.randn(2, 2048, 2048).to(sizes.dtype)
    large = torch.randn(1 << 27)  # 512 MiB: beyond every cache
    limits = {"matmul": lambda: left @ right, "read": lambda: large.sum()}
    seconds: dict[tuple[str, str], list[float]] = {}

    def turn(key: tuple[str, str], call: Callable[[], object]) -> None:
        started_s = time.perf_counter()
        call()
        seconds.setdefault(key, []).append(time.perf_counter() - started_s)

    with tqdm(total=len(CASES) * rounds, desc=str(sizes.dtype), leave=False) as bar:
        for case in CASES:
            calls = {name: prepared(attention_backend(name, CPU), case, sizes) for name in names}
            for call in calls.values():
                call()
            # Short cases several times in a row, or the clock and the caches decide.
            repeats = max(1, min(200, int(2e8 / sizes.flop(case))))
            for _ in range(rounds):
                for name, limit in limits.items():
                    turn((name, "limit"), limit)
                for name, call in calls.items():
                    for _ in range(repeats):
                        turn((name, case.name), call)
                bar.update()
    median = {key: statistics.median(times) for key, times in seconds.items()}
    matmul_rate = 2 * 2048**3 / median["matmul", "limit"]
    read_rate = large.numel() * 4 / median["read", "limit"]
    print(
        f"\n{sizes.dtype}, {sizes.num_heads} heads / {sizes.num_kv_heads} x {sizes.head_dim}, "
        f"{torch.get_num_threads()} threads: matmul {matmul_rate / 1e9:.0f} GFLOP/s, read {read_rate / 1e9:.1f} GB/s"
    )
    print(f"{'':22}" + "".join(f"{name:>11} ms  of limit" for name in names))
    for case in CASES:
        line = f"{case.name:22}"
        for name in names:
            took_s = median[name, case.name]
            share = share_of_limit(case, sizes, took_s, matmul_rate, read_rate)
            line += f"{took_s * 1e3:14.3f}  {share:8.0%}"
        print(line)
    for case, limit_bar in ((Case(1, BAR_CHUNK, 32768), CHUNK_BAR), (Case(1, 1, 131072), DECODE_BAR)):
        share = share_of_limit(case, sizes, median[names[0], case.name], matmul_rate, read_rate)
        verdict = "kept" if share >= limit_bar else "MISSED"
        print(f"{names[0]}: {case.name} at {share:.0%} of its limit   bar {limit_bar:.0%}   {verdict}")


def share_of_limit(case: Case, sizes: Sizes, took_s: float, matmul_rate: float, read_rate: float) -> float:
    """Of the matmul rate for chunks, of the read bandwidth for decodes."""
    if case.num_rows > 1:
        return sizes.flop(case) / took_s / matmul_rate
    return sizes.kv_bytes(case) / took_s / read_rate


if __name__ == "__main__":
    main()
