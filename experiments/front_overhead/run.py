"""What does a token cost on its way through the front, and how late is it? 64 streams over HTTP, server on one core.

    python -m experiments.front_overhead.run --tokenizer checkpoints/tiny
    python -m experiments.front_overhead.run --tokenizer checkpoints/tiny --peers outputs/peers/installed   # and vLLM's

The model is simulated: its steps take a fixed time and no CPU, so what is left is the front, scheduler included. The
server is pinned to one core and the client to another. With --peers the same is asked of vLLM, which is installed there
if it is not yet (network, 3.5 GB) and whose model is simulated too (vllm_executor.py). Three loads:

* as fast as it goes: steps of a tenth of a millisecond. CPU time per token over all processes, and tokens a second.
* steps of 10 ms, so 6,400 tokens a second are due, and steps of 50 ms, 1,280 a second. Added latency: when the client
  has a token, less when the work of its step was over. And what lies between the end of a step and the next one's
  beginning, which each token waits for too.

CPU time counts all that share the core; tokens a second do not. Exits with 1 if a bar of ours is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from experiments.front_overhead.client import NUM_STREAMS, Received, read_streams
from experiments.front_overhead.fronts import Front, StepStarts, ours, vllm
from experiments.lib.process_stats import tree_cpu_s
from experiments.lib.quantile import quantile

MAX_CPU_S_PER_TOKEN = 200e-6
MIN_TOKENS_PER_S = 5_000
FAST_STEP_S = 1e-4
PACED_STEPS_S = (10e-3, 50e-3)
WARM_UP_TOKENS = 50
OpenFront = Callable[[float], AbstractContextManager[Front]]


@dataclass(frozen=True, slots=True)
class Load:
    """What the client saw of one load, and what the server's processes used meanwhile."""

    num_tokens: int
    wall_s: float
    server_cpu_s: float
    added_s: array[float]    # to each token's way to the client, sorted; empty where steps were not written down
    between_s: array[float]  # end of a step to the beginning of the next one, sorted

    @property
    def cpu_s_per_token(self) -> float:
        """Of the server's processes, all threads."""
        return self.server_cpu_s / self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Over all streams."""
        return self.num_tokens / self.wall_s

    @property
    def cores_used(self) -> float:
        """By the server; below 1 where others had the core, or the client or the model was the slower one."""
        return self.server_cpu_s / self.wall_s


def main() -> int:
    """Measures all loads; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/tiny"),
                        help="directory with tokenizer.json and tokenizer_config.json")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream, as fast as it goes (default 1000)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each round that is paced (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="of each load; the median counts (default 3)")
    parser.add_argument("--checkout", type=Path, help="another working copy, whose server is measured instead")
    parser.add_argument("--peers", type=Path, help="folder with vLLM in it, or where it is to be installed")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("needs two cores: one for the server, one for the client")
    os.sched_setaffinity(0, {cores[1]})

    def our_front(step_s: float, *, logs_steps: bool) -> AbstractContextManager[Front]:
        return ours(step_s, arguments.tokenizer, cores[0], arguments.checkout, logs_steps=logs_steps)

    with our_front(FAST_STEP_S, logs_steps=False) as front:
        fast = measure(front, FAST_STEP_S, arguments.tokens, arguments.rounds)
    paced = []
    for step_s in PACED_STEPS_S:
        with our_front(step_s, logs_steps=True) as front:
            paced.append(measure(front, step_s, round(arguments.seconds / step_s), arguments.rounds))
    is_met = report("ours", fast, paced)
    if arguments.peers is not None:
        peers = arguments.peers.resolve()
        with vllm(arguments.tokenizer, cores[0], peers, peers / "front_overhead.log") as front:
            fast = measure(front, FAST_STEP_S, arguments.tokens, arguments.rounds)
            paced = [
                measure(front, step_s, round(arguments.seconds / step_s), arguments.rounds)
                for step_s in PACED_STEPS_S
            ]
        report("vLLM", fast, paced)
    return 0 if is_met else 1


def measure(front: Front, step_s: float, num_tokens: int, num_rounds: int) -> Load:
    """The median round, by CPU time."""
    front.set_step(step_s)
    asyncio.run(read_streams(front.port, WARM_UP_TOKENS, front.count))
    rounds = []
    for _ in tqdm(range(num_rounds), desc=f"steps of {1e3 * step_s:g} ms", unit="round"):
        rounds.append(_measure_once(front, step_s, num_tokens))
    return sorted(rounds, key=lambda one: one.cpu_s_per_token)[len(rounds) // 2]


def _measure_once(front: Front, step_s: float, num_tokens: int) -> Load:
    began_s, began_cpu_s = time.monotonic(), tree_cpu_s(front.pid)
    received = asyncio.run(read_streams(front.port, num_tokens, front.count))
    wall_s, used_s = time.monotonic() - began_s, tree_cpu_s(front.pid) - began_cpu_s
    starts = {} if front.step_starts is None else front.step_starts()
    added_s, between_s = _added_s(received, starts, step_s), _between_s(received, starts, step_s)
    return Load(NUM_STREAMS * num_tokens, wall_s, used_s, added_s, between_s)


def _added_s(received: list[Received], starts: StepStarts, step_s: float) -> array[float]:
    added_s = array("d")
    for stream in received if starts else ():
        of_answer = starts[stream.response_id]
        added_s.extend(at_s - start_s - step_s for at_s, start_s in zip(stream.times_s, of_answer, strict=True))
    return array("d", sorted(added_s))


def _between_s(received: list[Received], starts: StepStarts, step_s: float) -> array[float]:
    """While all streams were there."""
    if not starts:
        return array("d")
    of_streams = [starts[stream.response_id] for stream in received]
    first_s, last_s = max(one[0] for one in of_streams), min(one[-1] for one in of_streams)
    steps = sorted({start_s for one in of_streams for start_s in one if first_s <= start_s <= last_s})
    between_s = array("d", sorted(later - earlier - step_s for earlier, later in pairwise(steps)))
    if not between_s:
        raise SystemExit("the streams were not all there at once: take more --seconds")
    if between_s[0] < -0.01 * step_s:
        raise SystemExit(f"a simulated step took {1e3 * (between_s[0] + step_s):.2f} ms, not {1e3 * step_s:g}")
    return between_s


def report(name: str, fast: Load, paced: list[Load]) -> bool:
    """Prints figures beside bars; whether they are kept."""
    is_cheap = fast.cpu_s_per_token <= MAX_CPU_S_PER_TOKEN
    is_quick = fast.tokens_per_s >= MIN_TOKENS_PER_S
    line = partial(say, name)
    line("CPU time per token, as fast as it goes", f"{1e6 * fast.cpu_s_per_token:.0f} us",
         f"{1e6 * MAX_CPU_S_PER_TOKEN:.0f} us", is_cheap)  # fmt: skip
    line("tokens a second on one core", f"{fast.tokens_per_s:,.0f} ({fast.cores_used:.0%} of it)",
         f"{MIN_TOKENS_PER_S:,}", is_quick)  # fmt: skip
    for step_s, load in zip(PACED_STEPS_S, paced, strict=True):
        what = f"{NUM_STREAMS / step_s:,.0f} tokens a second due"
        line(f"{what}: tokens a second", f"{load.tokens_per_s:,.0f} ({load.cores_used:.0%} of the core)")
        line(f"{what}: CPU time per token", f"{1e6 * load.cpu_s_per_token:.0f} us")
        for share in (0.5, 0.99):
            line(f"{what}: added to a token, p{100 * share:g}", f"{1e3 * quantile(load.added_s, share):.2f} ms")
        line(f"{what}: between two steps, p50", f"{1e3 * quantile(load.between_s, 0.5):.2f} ms")
    return is_cheap and is_quick


def say(name: str, what: str, figure: str, bar: str = "", is_met: bool = True) -> None:
    """One line of the report."""
    print(f"{name:5s} {what:60s} {figure:24s} {'bar ' + bar if bar else ''}{'' if is_met else ', missed'}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
