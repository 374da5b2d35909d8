"""What does a token cost on its way through the front? 64 streams over HTTP, on one core, beside a client on another.

    python -m experiments.front_overhead.run --tokenizer checkpoints/tiny

The server runs a simulated model whose steps take a fixed time and no CPU: what is left is the front, scheduler
included. It is pinned to one core and the client to another. Two loads:

* as fast as it goes: steps of a tenth of a millisecond. CPU time per token, and tokens a second.
* paced: steps of 10 ms, so 6,400 tokens a second are due. How much later than its step each token arrives: the gap to
  the token before it, less the step.

CPU time counts whoever shares the core; tokens a second do not. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.lib.process_stats import cpu_s
from experiments.lib.server_process import serving_process

NUM_STREAMS = 64
MAX_CPU_S_PER_TOKEN = 200e-6
MIN_TOKENS_PER_S = 5_000
FAST_STEP_S = 1e-4
PACED_STEP_S = 10e-3
PROMPT = "a prompt of some words"
WARM_UP_TOKENS = 50
END_OF_EVENT = b"}\n\n"


@dataclass(frozen=True, slots=True)
class Load:
    """What the client saw of one load, and what the server's process used meanwhile."""

    num_tokens: int
    wall_s: float
    server_cpu_s: float
    gaps_s: array[float]  # between two tokens of one stream, sorted

    @property
    def cpu_s_per_token(self) -> float:
        """Of the server's process, all threads."""
        return self.server_cpu_s / self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Over all streams."""
        return self.num_tokens / self.wall_s

    @property
    def cores_used(self) -> float:
        """By the server's process; below 1 where others had the core, or the client was the slower one."""
        return self.server_cpu_s / self.wall_s

    def gap_s(self, quantile: float) -> float:
        """A quantile of the gaps."""
        return self.gaps_s[min(len(self.gaps_s) - 1, int(quantile * len(self.gaps_s)))]


def main() -> int:
    """Measures both loads; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", default="checkpoints/tiny", help="directory with tokenizer.json")
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each load; the median counts (default 3)")
    parser.add_argument("--checkout", type=Path, help="another working copy, whose server is measured instead")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("needs two cores: one for the server, one for the client")
    os.sched_setaffinity(0, {cores[1]})
    fast = measure(FAST_STEP_S, arguments, cores[0])
    return report(fast, measure(PACED_STEP_S, arguments, cores[0]))


def measure(step_s: float, arguments: argparse.Namespace, core: int) -> Load:
    """The median round, by CPU time, of a server of its own."""
    overrides = (
        "runtime=sim", f"tokenizer={arguments.tokenizer}", "model=llama3_8b", "model.shape.vocab_size=250",
        "hardware=h100", "hardware.flops_per_s=1e21", "hardware.memory_bytes_per_s=1e21",
        f"hardware.step_overhead_s={step_s}", "hardware.layer_overhead_s=0", "hardware.kernel_overhead_s=0",
        f"scheduler.max_num_sequences={NUM_STREAMS}",
    )  # fmt: skip
    with serving_process(*overrides, core=core, checkout=arguments.checkout) as server:
        port, pid = server.port, server.process.pid
        asyncio.run(load(port, pid, WARM_UP_TOKENS))
        rounds = []
        for _ in tqdm(range(arguments.rounds), desc=f"steps of {1e3 * step_s:g} ms", unit="round"):
            rounds.append(asyncio.run(load(port, pid, arguments.tokens)))
    return sorted(rounds, key=lambda one: one.cpu_s_per_token)[len(rounds) // 2]


async def load(port: int, pid: int, num_tokens: int) -> Load:
    """All streams at once, each of that many tokens."""
    began_s, began_cpu_s = time.monotonic(), cpu_s(pid)
    streams = await asyncio.gather(*(stream(port, num_tokens) for _ in range(NUM_STREAMS)))
    wall_s, used_s = time.monotonic() - began_s, cpu_s(pid) - began_cpu_s
    gaps = array("d", sorted(gap_s for gaps_s in streams for gap_s in gaps_s))
    return Load(NUM_STREAMS * num_tokens, wall_s, used_s, gaps)


async def stream(port: int, num_tokens: int) -> array[float]:
    """The gaps between the tokens of one completion. Looks for ends of events only, so that the client keeps up."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    gaps_s = array("d")
    last_s: float | None = None
    num_seen = 0
    rest = b""
    while part := await reader.read(1 << 16):
        now_s = time.monotonic()
        whole = rest + part
        num_events = whole.count(END_OF_EVENT)
        rest = whole[whole.rfind(END_OF_EVENT) + len(END_OF_EVENT) :] if num_events else whole
        num_seen += num_events
        if last_s is not None:
            gaps_s.extend([now_s - last_s] * min(num_events, 1))
            gaps_s.extend([0.0] * (num_events - 1))  # those that came together with one before
        if num_events:
            last_s = now_s
    writer.close()
    if num_seen != num_tokens:
        raise SystemExit(f"a stream brought {num_seen} tokens, not {num_tokens}: {whole[-300:]!r}")
    return gaps_s


def report(fast: Load, paced: Load) -> int:
    """Prints figures beside bars; the exit code."""
    is_cheap = fast.cpu_s_per_token <= MAX_CPU_S_PER_TOKEN
    is_quick = fast.tokens_per_s >= MIN_TOKENS_PER_S
    cheap_bar, quick_bar = f"{1e6 * MAX_CPU_S_PER_TOKEN:.0f} us", f"{MIN_TOKENS_PER_S:,}"
    say("CPU time per token, as fast as it goes", f"{1e6 * fast.cpu_s_per_token:.0f} us", cheap_bar, is_cheap)
    say("tokens a second on one core", f"{fast.tokens_per_s:,.0f} ({fast.cores_used:.0%} of it)", quick_bar, is_quick)
    say(f"the same, {NUM_STREAMS / PACED_STEP_S:,.0f} tokens a second due: CPU time per token",
        f"{1e6 * paced.cpu_s_per_token:.0f} us")  # fmt: skip
    say("tokens a second", f"{paced.tokens_per_s:,.0f} ({paced.cores_used:.0%} of it)")
    for quantile in (0.5, 0.9, 0.99):
        added_s = max(0.0, paced.gap_s(quantile) - PACED_STEP_S)
        say(f"a token later than its step, p{100 * quantile:g}", f"{1e3 * added_s:.2f} ms")
    return 0 if is_cheap and is_quick else 1


def say(what: str, figure: str, bar: str = "", is_met: bool = True) -> None:
    """One line of the report."""
    print(f"{what:60s} {figure:24s} {'bar ' + bar if bar else ''}{'' if is_met else ', missed'}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
