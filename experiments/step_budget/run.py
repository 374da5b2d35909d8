"""How well steps keep their time budget on a machine nobody has profiled.

    python -m experiments.step_budget.run checkpoints/tiny

Starts a server that knows nothing of the machine, runs a closed loop of chats (prefill and decode) and of
longer prompts on it for --seconds, and reads the server's decision log. `--log FILE` reads another log instead.

A mixed step has decodes and prefill chunks. It is held against its budget once the cost model has seen
--after steps. Printed: the share of mixed steps at most 10% over budget; for information, the share within 10%
either way among those with work for 85% of the budget or more; the error of the predictions; and how much equal
work on this machine differs from one moment to the next, which no prediction can undercut.
Steps of one tile are left out: that floor may break a budget by design.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy

from experiments.lib.http_stream import answered
from experiments.lib.quantile import quantile
from experiments.lib.served_log import ServedLog
from experiments.lib.server_process import serving, vocab_size


async def load(port: int, seconds: float) -> None:
    """Six chats at a time, and one client with longer prompts."""
    vocab, end_s = vocab_size(port), time.monotonic() + seconds

    async def client(seed: int, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int]) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end_s:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(*prompt_tokens))]
            await answered(port, prompt, rng.randint(*output_tokens))

    chats = (client(seed, (32, 512), (32, 200)) for seed in range(6))
    await asyncio.gather(*chats, client(99, (1024, 8192), (1, 8)))


def main() -> None:
    """Run the load, read the log, print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--log", type=Path, help="a decision log to read instead of running a load")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--after", type=int, default=500, help="steps the cost model has seen before")
    parser.add_argument("--override", action="append", default=[], help="more overrides for the server")
    args = parser.parse_args()
    if args.log is not None:
        sys.exit(0 if report(args.log, args.after) else 1)
    if args.checkpoint is None:
        parser.error("name a checkpoint, or a log with --log")
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "decisions.jsonl"
        with serving(f"checkpoint={args.checkpoint}", f"tracking.decision_log={log}", *args.override) as port:
            asyncio.run(load(port, args.seconds))
        sys.exit(0 if report(log, args.after) else 1)


def machine_noise(num_blocks: int = 100) -> list[float]:
    """Relative difference of each of so many equal pieces of work (matrix products) from the one before, ascending."""
    matrix = numpy.random.default_rng(0).random((384, 384), dtype=numpy.float32)
    durations_s: list[float] = []
    for _ in range(num_blocks):
        start_s = time.perf_counter()
        for _ in range(32):
            matrix @ matrix  # noqa: B018
        durations_s.append(time.perf_counter() - start_s)
    return sorted(abs(b / a - 1.0) for a, b in zip(durations_s, durations_s[1:], strict=False))


def report(log: Path, after: int) -> bool:
    """Figures beside bars; whether they are kept."""
    noise = machine_noise()
    print(f"equal work, from one moment to the next: p50 {quantile(noise, 0.5):.1%}   p95 {quantile(noise, 0.95):.1%}")
    served = ServedLog.read(log)
    tile = served.header["config"]["tile_tokens"]
    ran = [(step.batch, step.reported_s) for step in served.steps]
    ran = ran[after:]
    if not ran:
        sys.exit(f"{log} holds no steps after the first {after}")
    # The floor of one tile may break the budget by design: in a step that is full before any prefill comes.
    mixed = [
        (batch, duration_s)
        for batch, duration_s in ran
        if any(c.num_tokens == 1 for c in batch.chunks)
        and (sum(c.num_tokens for c in batch.chunks if c.num_tokens > 1) > tile)
    ]
    errors = sorted(abs(batch.predicted_s - duration_s) / duration_s for batch, duration_s in ran)
    print(f"{len(ran)} steps after the first {after}; {len(mixed)} mixed")
    print(f"prediction error      p50 {quantile(errors, 0.5):.1%}   p95 {quantile(errors, 0.95):.1%}   (goal p95 5%)")
    if not mixed:
        sys.exit("no mixed steps: run a load with decodes beside prefills")
    kept = sum(duration_s <= 1.1 * batch.budget_s for batch, duration_s in mixed) / len(mixed)
    filled = [(b, s) for b, s in mixed if b.predicted_s > 0.85 * b.budget_s]
    close = sum(abs(s - b.budget_s) <= 0.1 * b.budget_s for b, s in filled) / max(1, len(filled))
    print(f"mixed steps at most 10% over budget        {kept:.1%}   bar 95%   {'kept' if kept >= 0.95 else 'MISSED'}")
    print(f"{len(filled)} filled mixed steps within 10% either way  {close:.1%}")
    return kept >= 0.95


if __name__ == "__main__":
    main()
