"""How much faster does a second kvp rank make decoding at long context? 1 rank against kvp=2, a thread each.

    python -m experiments.kvp_decode.run                       # 64K and 256K tokens of context
    python -m experiments.kvp_decode.run --context 65536 --steps 20

The context's KV is random numbers: what is in it does not change the time, and computing 256K tokens of prompt
would take an hour. The attention part is everything between query and merged output in every layer, exchange and
merge included; bar: 1.8 times faster. Beside it what exchange and merge cost of it, waiting for the other rank
included, and the time per output token.

Decoding reads memory and does little else, so two more ratios of the same run say what a second core can add here:
`reads` is how much more two processes read from memory per second than one does, each its own part, summing it up and
nothing else; `kernel` compares the attention kernel's time alone, without exchange and merge.

Figures are the best and the median of the steps by the clock, which mean something on idle cores only, and the
median by the thread's own CPU time, which other programs enter through caches and memory alone; of waiting for the
other rank it has what is done awake.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
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

BAR = 1.8
MODEL = {"hidden_size": 512, "ffn_size": 1376, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
BLOCK_SIZE = 64
READ_BYTES = 1 << 28  # as much KV as 64K tokens have, and far more than caches hold
READ_S = 4.0


def prepare(rank: Any, notes: dict[str, float]) -> None:
    """In a rank: fill the KV memory, and time the attention part and what of it is this rank's own work."""
    from megatron_medha.model.attention import PagedCoreAttention

    for layer in rank._kv_layers:
        layer.k.normal_()
        layer.v.normal_()

    def timed(forward: Any) -> Any:
        def call(*args: Any) -> Any:
            started_s, cpu_started_s = time.perf_counter(), time.thread_time()
            result = forward(*args)
            ended_s, cpu_s = time.perf_counter(), time.thread_time() - cpu_started_s
            _, _, _, batch, _ = args
            attended_s = ended_s if batch.shared is None else batch.shared.attention.attended_s
            for label, seconds in (
                ("attention", ended_s - started_s), ("own", attended_s - started_s), ("attention cpu", cpu_s)
            ):  # fmt: skip
                notes[label] = notes.get(label, 0.0) + seconds
            return result

        return call

    for module in rank.model.modules():
        if isinstance(module, PagedCoreAttention):
            module.forward = timed(module.forward)


def read_memory(config: RankConfig, connection: Connection) -> None:
    """In a process: read so many bytes again and again for a while; sends the seconds of every pass."""
    import torch

    torch.set_num_threads(1)
    values = torch.zeros(READ_BYTES // config.layout.world_size // 4)
    passes_s: list[float] = []
    end_s = time.perf_counter() + READ_S
    while time.perf_counter() < end_s:
        started_s = time.perf_counter()
        values.sum()
        passes_s.append(time.perf_counter() - started_s)
    # What was measured before the other process had begun, or after it had ended, is of one process.
    connection.send(passes_s[len(passes_s) // 10 : -(len(passes_s) // 10) or None])


def decode(ranks: RankProcesses, checkpoint: Path, kvp: int, context: int, num_steps: int) -> list[dict[str, float]]:
    """Decode one request; per step its seconds: in all, and on the slowest rank the attention part and its own work."""
    shard_tokens = context // kvp  # whole partitions, as by default
    num_blocks = shard_tokens // BLOCK_SIZE
    block_bytes = 2 * BLOCK_SIZE * MODEL["num_kv_heads"] * MODEL["head_dim"] * 4 * MODEL["num_layers"]
    ranks.load(
        RankConfig(
            layout=ParallelLayout(kvp=kvp), server_endpoint="", checkpoint=str(checkpoint),
            model=ModelOptions(device="cpu", dtype="float32", block_size=BLOCK_SIZE, num_threads=1),
            kv_memory_bytes=num_blocks * block_bytes, max_tokens_per_shard=shard_tokens,
        ),  # fmt: skip
        prepare,
    )
    first = context - num_steps  # the first decoded position
    prompt = array("i", (index % 1000 for index in range(first + 1)))
    new = NewRequest("a", prompt.tobytes(), first + 1, Sampling(max_output_tokens=num_steps, temperature=0.0))
    # A chunk of one token at the start of each shard; what lies between is random already.
    opening = [Chunk("a", i * shard_tokens, 1, False, tuple(range(i + 1))) for i in range(kvp)]
    steps, sampled = [], ()
    todo = [*opening, *(Chunk("a", first + i, 1, True, tuple(range(kvp))) for i in range(num_steps))]
    known: set[int] = set()
    for batch_id, chunk in enumerate(tqdm(todo, desc=f"kvp={kvp} context={context}", unit="step")):
        started_s = time.perf_counter()
        for rank in range(kvp):
            is_part = rank in chunk.kvp_ranks
            is_new = is_part and rank not in known
            known.update({rank} if is_part else set())
            step = RankStep(
                batch_id, (chunk,) if is_part else (), (new,) if is_new else (), (), sampled if kvp > 1 else (),
                (append_op("a", rank, (Extent(0, num_blocks),)),) if is_new else (),
            )  # fmt: skip
            ranks.send(rank, step)
        answers = []
        while len(answers) < kvp:
            answers += list(ranks.answers())
        duration_s = time.perf_counter() - started_s
        if chunk.samples_token:
            slowest = max(answers, key=lambda answer: answer.notes["attention"])
            steps.append({"step": duration_s, **slowest.notes})
            sampled = tuple((t.request_id, t.token_id) for answer in answers for t in answer.done.tokens)
    return steps[2:]  # the first ones touch memory for the first time


def main() -> None:
    """Both layouts at each context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, action="append", help="tokens (default: 65536 and 262144)")
    parser.add_argument("--steps", type=int, default=30, help="tokens to decode (default: 30)")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name, rank_processes(2) as ranks:
        save_llama(Path(name), **MODEL)
        plain = RankConfig(server_endpoint="", checkpoint="", kv_memory_bytes=0)
        reads = [
            ranks.call(read_memory, msgspec.structs.replace(plain, layout=ParallelLayout(kvp=kvp))) for kvp in (1, 2)
        ]
        for context in args.context or (65536, 262144):
            one, two = (decode(ranks, Path(name), kvp, context, args.steps) for kvp in (1, 2))
            found.append((context, one, two))
    print(
        f"milliseconds per output token; bar: {BAR}x; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for label, of in (("best", min), ("median", statistics.median)):
        (one_s,), two_s = ([of(passes_s) for passes_s in found_s] for found_s in reads)
        rate = sum(READ_BYTES / 2 / seconds for seconds in two_s)
        print(f"reads, {label}: {READ_BYTES / one_s / 1e9:.1f} GB/s by one process, {rate / 1e9:.1f} by two: "
              f"{rate * one_s / READ_BYTES:.2f}x")
    print(f"{'context':>8}{'':>8}{'attention 1':>13}{'attention 2':>13}{'speed-up':>10}{'kernel':>8}"
          f"{'exchange, merge':>17}"
          f"{'TPOT 1':>9}{'TPOT 2':>9}")
    for context, one, two in found:
        for label, clock, of in (
            ("best", "", min), ("median", "", statistics.median), ("CPU", " cpu", statistics.median)
        ):  # fmt: skip
            one_s, two_s = (of([step["attention" + clock] for step in steps]) for steps in (one, two))
            line = f"{context:>8}{label:>8}{one_s * 1e3:>13.2f}{two_s * 1e3:>13.2f}{one_s / two_s:>9.2f}x"
            if not clock:
                merge_s = of([step["attention"] - step["own"] for step in two])
                own_one_s, own_two_s = (of([step["own"] for step in steps]) for steps in (one, two))
                line += f"{own_one_s / own_two_s:>7.2f}x"
                line += f"{merge_s * 1e3:>17.2f}"
                line += "".join(f"{of([step['step'] for step in steps]) * 1e3:>9.2f}" for steps in (one, two))
            print(line)
    ratios = [min(step["attention"] for step in one) / min(step["attention"] for step in two) for _, one, two in found]
    print(f"the best of the attention part: {', '.join(f'{ratio:.2f}x' for ratio in ratios)}; bar {BAR}x: "
          f"{'kept' if min(ratios) >= BAR else 'MISSED'}")
    sys.exit(min(ratios) < BAR)


if __name__ == "__main__":
    main()
