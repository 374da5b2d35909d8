"""An hour of mixed load with clients that leave at random: does memory grow, is a block or an answer lost?

    python -m experiments.soak.run checkpoints/tiny --minutes 60

A server on real ranks, with little KV memory, so that answers preempt each other, and with kv_audit=true: after every
step the scheduler's blocks are checked, and each rank's own book against them; the first mismatch ends the server.
A dozen clients send short and long prompts, streams and whole answers, several choices, with and without logprobs.
A third of them leave at a random moment; all others must get every token they asked for.

Memory is what the front and each rank have allocated (anonymous pages), every few seconds. After a fifth of the time
(caches fill) it is averaged over ten spans, and a straight line is fitted to these. Exits with 1 if the lower end of
the slope's 95% interval is above zero, if an answer is lost, if an audit fails, or if blocks are not free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from experiments.lib.drawing import panels
from experiments.lib.http_stream import post
from experiments.lib.process_stats import anonymous_bytes, children
from experiments.lib.server_process import serving_process, vocab_size

OUT = Path("outputs/soak")
NUM_CLIENTS = 12
LEAVING_SHARE = 1 / 3
SAMPLE_INTERVAL_S = 5.0
WARM_UP_SHARE = 0.2
NUM_SPANS = 10
T_95_OF_8 = 2.306  # Student's t, two-sided 95%, for ten spans less the line's two parameters
IDLE_TIMEOUT_S = 60.0
MIB = 2**20
OVERRIDES = (
    "kv_audit=true", "model.kv_memory_gib=0.02", "parallel.kvp=2",
    "parallel.max_tokens_per_shard=1024", "model.num_threads=1", "recovery.heartbeat_timeout_s=120",
)  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    num_whole: int = 0
    num_left: int = 0
    num_tokens: int = 0
    lost: list[str] = field(default_factory=list)  # what went wrong with each


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth of one process, in MiB per hour, with its standard error."""

    process: str
    mib_per_hour: float
    error: float
    mean_mib: float

    @property
    def is_above_zero(self) -> bool:
        """Beyond what chance explains."""
        return self.mib_per_hour - T_95_OF_8 * self.error > 0


def main() -> int:
    """Runs the soak; 1 if anything was lost or grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("override", nargs="*", help="further options of medha serve")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up-minutes", type=float, help="until all books and caches are full; default: a fifth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    overrides = (f"checkpoint={arguments.checkpoint}", *OVERRIDES, *arguments.override)
    with serving_process(*overrides) as server:
        pid = server.process.pid
        tally, samples = asyncio.run(soak(server.port, pid, 60.0 * arguments.minutes, arguments.seed))
        state = idle_state(server.port)
        is_alive = server.process.poll() is None
    names = ["front", *(f"rank {rank}" for rank in range(len(samples[0][1]) - 1))]
    warm_up_minutes = arguments.warm_up_minutes
    if warm_up_minutes is None:
        warm_up_minutes = WARM_UP_SHARE * arguments.minutes
    slopes = [
        slope(name, [(at_s, sample[place]) for at_s, sample in samples if at_s >= 60.0 * warm_up_minutes])
        for place, name in enumerate(names)
    ]
    results = {
        "minutes": arguments.minutes, "warm_up_minutes": warm_up_minutes, "tally": asdict(tally),
        "slopes": [asdict(one) for one in slopes], "at_the_end": state, "samples": samples,
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    plot(names, samples, warm_up_minutes)
    return report(tally, slopes, state, is_alive)


async def soak(port: int, pid: int, seconds: float, seed: int) -> tuple[Tally, list[tuple[float, list[int]]]]:
    """The load, and (seconds, memory of front and ranks) meanwhile."""
    tally = Tally()
    began_s = time.monotonic()
    until_s = began_s + seconds
    vocab = await asyncio.to_thread(vocab_size, port)
    clients = [
        asyncio.create_task(client(port, random.Random(1000 * seed + place), vocab, until_s, tally))
        for place in range(NUM_CLIENTS)
    ]
    processes = (pid, *children(pid))  # none may be replaced: a rank that is lost would end the run here
    samples = []
    with tqdm(total=round(seconds), unit="s", desc="soak") as progress:
        while (now_s := time.monotonic()) < until_s:
            samples.append((now_s - began_s, [anonymous_bytes(one) for one in processes]))
            progress.update(round(now_s - began_s) - progress.n)
            progress.set_postfix(whole=tally.num_whole, left=tally.num_left, lost=len(tally.lost))
            await asyncio.sleep(SAMPLE_INTERVAL_S)
    await asyncio.gather(*clients)
    return tally, samples


async def client(port: int, rng: random.Random, vocab: int, until_s: float, tally: Tally) -> None:
    """One request after the other."""
    while time.monotonic() < until_s:
        num_prompt = rng.randrange(600, 1700) if rng.random() < 0.1 else rng.randrange(1, 300)
        num_output, n = rng.randrange(1, 64), rng.choice((1, 1, 1, 2, 3))
        is_stream = rng.random() < 0.7
        body = {
            "prompt": [rng.randrange(vocab) for _ in range(num_prompt)], "max_tokens": num_output, "n": n,
            "ignore_eos": True, "stream": is_stream, "logprobs": rng.choice((None, None, None, 2)),
            "temperature": rng.choice((0.0, 1.0)), "stream_options": {"include_usage": True} if is_stream else None,
        }  # fmt: skip
        leaves_after_s = rng.expovariate(1 / 2.0) if rng.random() < LEAVING_SHARE else None
        try:
            async with asyncio.timeout(leaves_after_s):
                usage = await ask(port, body)
        except TimeoutError:
            tally.num_left += 1
            continue
        except (OSError, ValueError, EOFError) as error:
            tally.lost.append(repr(error)[:200])
            continue
        if usage != (wanted := n * num_output):
            tally.lost.append(f"{usage} tokens of {wanted}")
        tally.num_whole += 1
        tally.num_tokens += wanted


async def ask(port: int, body: dict[str, object]) -> int:
    """Output tokens by the answer's own count, once all of it has come; ValueError for anything but an answer."""
    reader, writer = await post(port, body)
    try:
        answer = await reader.read(-1)
    finally:
        writer.transport.abort()  # in the middle of a stream too
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError(answer[:300])
    if not body["stream"]:
        return int(json.loads(rest)["usage"]["completion_tokens"])
    if b"data: [DONE]" not in rest:
        raise ValueError(rest[-300:])
    return int(rest.rpartition(b'"completion_tokens":')[2].partition(b",")[0].partition(b"}")[0])


def idle_state(port: int) -> dict[str, int]:
    """What is still there once nothing should be; waits for it a while."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/debug/live", timeout=20) as answer:
            load = json.load(answer)["load"]
        state = {"num_live": load["num_live"], "num_owned_blocks": load["num_blocks"] - load["num_free_blocks"]}
        if not any(state.values()) or time.monotonic() > deadline_s:
            return state
        time.sleep(0.2)


def slope(process: str, late: list[tuple[float, int]]) -> Slope:
    """Of a line through the means of ten spans after the warm-up: single samples are too much like their neighbours."""
    size = len(late) // NUM_SPANS
    if not size:
        raise SystemExit(f"{len(late)} samples after the warm-up are too few: take more --minutes")
    spans = [late[place * size : (place + 1) * size] for place in range(NUM_SPANS)]
    xs = [fmean(at_s for at_s, _ in span) / 3600 for span in spans]
    ys = [fmean(num_bytes for _, num_bytes in span) / MIB for span in spans]
    mean_x, mean_y = fmean(xs), fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Slope(process, rise, (rest / (NUM_SPANS - 2) / spread) ** 0.5, mean_y)


def report(tally: Tally, slopes: list[Slope], state: dict[str, int], is_alive: bool) -> int:
    """Prints figures beside bars; the exit code."""
    is_met = is_alive and not tally.lost and not any(state.values())
    print(f"answers whole {tally.num_whole:,} ({tally.num_tokens:,} tokens), clients that left {tally.num_left:,}")
    print(f"lost {len(tally.lost)}, bar 0 {tally.lost[:3] or ''}")
    print(f"server alive, so no audit failed: {is_alive}; at the end {state}, bar 0")
    for one in slopes:
        rise = f"{one.mib_per_hour:+.2f} +- {T_95_OF_8 * one.error:.2f} MiB/h"
        print(f"{one.process:8s} {one.mean_mib:7.1f} MiB, {rise}, bar 0{', missed' if one.is_above_zero else ''}")
        is_met = is_met and not one.is_above_zero
    return 0 if is_met else 1


def plot(names: list[str], samples: list[tuple[float, list[int]]], warm_up_minutes: float) -> None:
    """Memory over time, each process in its own panel: they differ by hundreds of MiB."""
    figure, axes = panels(rows=len(names), width=8, height=1.6, sharex=True)
    for place, (name, panel) in enumerate(zip(names, axes, strict=True)):
        panel.plot([at_s / 60 for at_s, _ in samples], [sample[place] / MIB for _, sample in samples], lw=1)
        panel.axvline(warm_up_minutes, color="grey", lw=0.8, ls=":")
        panel.set_ylabel(f"{name}, MiB")
    axes[-1].set_xlabel("minutes; dotted: end of the warm-up")
    figure.savefig(OUT / "soak.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
