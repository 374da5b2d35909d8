"""Ranks killed one after the other under a mixed load: does every request end, and with the same answer?

    python -m experiments.rank_faults.run checkpoints/tiny
    python -m experiments.rank_faults.run checkpoints/tiny --parallel parallel.tp=2

One server. First the load undisturbed; then the same requests again, while each rank is killed (SIGKILL) in turn at a
random moment. Prints how many requests were answered, whether the answers are those of the first pass, and how long
the server was not ready after each kill, beside the bar: 10 s and the time that the model took to load at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.lib.http_stream import Streamed, complete
from experiments.lib.process_stats import process_tree
from experiments.lib.server_process import Server, answers, serving_process, vocab_size

BAR_S = 10.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request of the load."""

    at_s: float
    prompt: list[int]
    num_output: int


def mixed_load(rng: random.Random, num_requests: int, vocab: int, longest: int) -> list[Wanted]:
    """Mostly short prompts, a tenth long ones, over a few seconds."""
    load = []
    for _ in range(num_requests):
        length = rng.randrange(longest // 2, longest) if rng.random() < 0.1 else rng.randrange(8, 300)
        prompt = [rng.randrange(vocab) for _ in range(length)]
        load.append(Wanted(rng.uniform(0.0, 8.0), prompt, rng.randrange(16, 96)))
    return load


async def send_all(port: int, load: list[Wanted], progress: tqdm[None]) -> list[Streamed]:
    """Every request at its time; a bar counts tokens."""

    async def send(wanted: Wanted) -> Streamed:
        await asyncio.sleep(wanted.at_s)
        return await complete(port, wanted.prompt, wanted.num_output, on_token=lambda: progress.update())

    return await asyncio.gather(*map(send, load))


async def kill_in_turn(
    server: Server, num_ranks: int, rng: random.Random, progress: tqdm[None], num_tokens: int
) -> list[float]:
    """Kill each rank at a random point of its share of the tokens; how long the server was not ready after each."""
    down_s, ready = [], f"http://127.0.0.1:{server.port}/ready"
    for rank in range(num_ranks):
        due = (rank + rng.uniform(0.1, 0.8)) / num_ranks * num_tokens
        while progress.n < due:
            await asyncio.sleep(POLL_S)
        os.kill(rank_pids(server.process.pid)[rank], signal.SIGKILL)
        killed_s = time.monotonic()
        while await asyncio.to_thread(answers, ready):
            await asyncio.sleep(POLL_S)
        noticed_s = time.monotonic()
        while not await asyncio.to_thread(answers, ready):
            await asyncio.sleep(POLL_S)
        down_s.append(time.monotonic() - killed_s)
        progress.write(f"rank {rank} killed at {due / num_tokens:.0%} of the tokens: noticed after "
                       f"{noticed_s - killed_s:.2f} s, ready again after {down_s[-1]:.2f} s")
    return down_s


def rank_pids(server_pid: int) -> dict[int, int]:
    """Processes of the server's ranks, by rank: their options are on their command lines."""
    found = {}
    for pid in process_tree(server_pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if match := re.search(r'"rank":(\d+),', words):
            found[int(match[1])] = pid
    return found


def counter(port: int, name: str) -> int:
    """A counter of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(f"medha:{name}_total"))


def main() -> None:
    """Both passes, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--parallel", nargs="+", default=["parallel.spp=2"], help="the layout, as medha serve takes it")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--longest", type=int, default=2000, help="tokens of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # In float32, so that other batches after a fault do not round to other tokens.
    overrides = [f"checkpoint={args.checkpoint}", "model.dtype=float32", "model.kv_memory_gib=0.25", *args.parallel,
                 "recovery.failure_window_s=0"]
    with serving_process(*overrides) as server:
        port, load_s = server.port, server.ready_after_s
        num_ranks = len(rank_pids(server.process.pid))
        load = mixed_load(rng, args.requests, vocab_size(port), args.longest)
        num_tokens = sum(wanted.num_output for wanted in load)
        print(f"{num_ranks} ranks ({' '.join(args.parallel)}) ready after {load_s:.1f} s; "
              f"{len(load)} requests, {num_tokens} tokens", flush=True)
        with tqdm(total=num_tokens, desc="undisturbed", unit="token") as progress:
            calm = asyncio.run(send_all(port, load, progress))

        async def disturbed(progress: tqdm[None]) -> tuple[list[Streamed], list[float]]:
            found, down_s = await asyncio.gather(
                send_all(port, load, progress), kill_in_turn(server, num_ranks, rng, progress, num_tokens)
            )
            return found, down_s

        with tqdm(total=num_tokens, desc="with faults", unit="token") as progress:
            completions, down_s = asyncio.run(disturbed(progress))
        failures, recoveries = counter(port, "rank_failures"), counter(port, "rank_recoveries")
    errors = [answer.error for answer in (*calm, *completions) if answer.error is not None]
    num_same = sum(one.text == other.text for one, other in zip(calm, completions, strict=True))
    bar_s = BAR_S + load_s
    print(f"\nanswered      {len(completions) - sum(a.error is not None for a in completions)} of {len(load)}"
          f"   /metrics counts {failures} failures, {recoveries} recoveries")
    for error in errors[:3]:
        print(f"  error: {error}")
    print(f"same answers  {num_same} of {len(load)}")
    print(f"recovery      at most {max(down_s):.2f} s   bar 10 s + model load = {bar_s:.2f} s   "
          f"{'kept' if max(down_s) <= bar_s else 'MISSED'}")
    is_good = not errors and num_same == len(load) and max(down_s) <= bar_s and failures == recoveries == num_ranks
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
