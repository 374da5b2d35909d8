"""Does the simulator say what the real engine does? The same requests on a real server, and simulated.

    python -m experiments.simulator_against_engine.run                    # a model of random weights, 28M parameters
    python -m experiments.simulator_against_engine.run checkpoints/tiny
    python -m experiments.simulator_against_engine.run --again DIR        # of a run with --keep DIR: the figures again

One server is put under stretches of short prompts with a long one now and then, idle in between: a warm-up, then by
turns a stretch of calibration and one of comparison. The machine's own speed drifts from minute to minute; that way
both see the same of it. The stretches of comparison are all the same stream, those of calibration all different.

From the stretches of calibration come how long steps take, and the time between client and scheduler. For each stretch
of comparison the simulator is given the times at which the client meant to send, and what the server's scheduler had
learnt until then; of the stretch itself it sees nothing.

Bar, for a quiet machine: TTFT p50 and p99, as the client saw them, within 5%. Printed beside it: how much the repeats
differ among themselves, which no simulator can undercut.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from tqdm import tqdm

from experiments.lib.http_stream import answered
from experiments.lib.random_llama import save_small_model
from experiments.lib.served_log import ServedLog
from experiments.lib.server_process import serving
from experiments.simulator_against_engine.compare import simulate
from experiments.simulator_against_engine.log import Calibration, Grid, calibrate
from megatron_medha.stats.summary import percentile

BAR = 0.05
GAP_S = 1.0  # from the end of a stretch to the next
WARM_UP_S = 10.0
FIRST_ID, LAST_ID = 40, 120  # bytes of text: every model's vocabulary has them
SHORT_TOKENS, OUTPUT_TOKENS = (32, 600), (4, 12)
GRID, LOG, CLIENT = "grid.json", "decisions.jsonl", "client.json"
GRID_S = 30.0  # of measuring
NUM_DRAWS = 16  # simulations of each stretch, with other draws of its steps; figures are their medians
# A rank that shares its core with the front and the client takes 10 to 50% longer whenever they have something to do:
# how long a step takes would be a matter of the client. On two cores, one is left to them.
OVERRIDES = ("model.num_threads=1",)


class Kind(Enum):
    """What a stretch is for."""

    WARM_UP = "warm_up"
    CALIBRATION = "calibration"
    COMPARISON = "comparison"


Asked = tuple[float, int, int]  # seconds after the stretch began, tokens of the prompt and of the answer


@dataclass(frozen=True, slots=True)
class Stretch:
    """Requests as the client means to send them. No two prompts of a run have the same length: it is their name."""

    kind: Kind
    asked: tuple[Asked, ...]
    began_s: float = 0.0  # of the server's clock
    ttft_s: dict[int, float] = field(default_factory=dict)  # by prompt length, from when it was meant to be sent

    @property
    def meant_s(self) -> dict[int, float]:
        """By prompt length, when the client meant to send it, of the server's clock."""
        return {length: self.began_s + at_s for at_s, length, _ in self.asked}


def stream(
    seed: int, seconds: float, qps: float, long_tokens: tuple[int, int], taken: set[int], spacing: int = 1
) -> tuple[Asked, ...]:
    """Poisson arrivals; every 15th prompt is long.

    spacing: lengths are multiples of it, and those up to the next multiple are taken too.
    """
    rng = random.Random(seed)
    found: list[Asked] = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(qps)) < seconds:
        low, high = long_tokens if len(found) % 15 == 7 else SHORT_TOKENS
        free = [n for n in range(low - low % -spacing, high, spacing) if taken.isdisjoint(range(n, n + spacing))]
        if not free:
            raise SystemExit(
                f"there are not that many different lengths from {low} to {high} tokens: give less --seconds, --qps or "
                "--repeats"
            )
        length = rng.choice(free)
        taken.update(range(length, length + spacing))
        found.append((at_s, length, rng.randint(*OUTPUT_TOKENS)))
    return tuple(found)


def plan(seconds: float, qps: float, long_tokens: tuple[int, int], repeats: int) -> list[Stretch]:
    """All stretches in their order."""
    taken: set[int] = set()
    compared = stream(0, seconds, qps, long_tokens, taken, repeats)
    stretches = [Stretch(Kind.WARM_UP, stream(1, WARM_UP_S, qps, long_tokens, taken))]
    for repeat in range(repeats):
        stretches.append(Stretch(Kind.CALIBRATION, stream(2 + repeat, seconds, qps, long_tokens, taken)))
        longer = tuple((at_s, length + repeat, count) for at_s, length, count in compared)
        stretches.append(Stretch(Kind.COMPARISON, longer))
    return stretches


async def send(port: int, stretch: Stretch, bar: tqdm[Any]) -> Stretch:
    """The stretch, once all of its answers have come to their end."""
    rng = random.Random(0)
    prompts = [[rng.randint(FIRST_ID, LAST_ID) for _ in range(length)] for _, length, _ in stretch.asked]
    began_s = time.monotonic() + GAP_S
    ttft_s: dict[int, float] = {}

    async def one(asked: Asked, prompt: list[int]) -> None:
        at_s, length, num_output_tokens = asked
        await asyncio.sleep(began_s + at_s - time.monotonic())
        answer = await answered(port, prompt, num_output_tokens, may_join_tokens=True)
        ttft_s[length] = answer.token_times_s[0] - began_s - at_s
        bar.update()

    await asyncio.gather(*(one(asked, prompt) for asked, prompt in zip(stretch.asked, prompts, strict=True)))
    return replace(stretch, began_s=began_s, ttft_s=ttft_s)


def measure_grid(checkpoint: Path, directory: Path) -> None:
    """The grid, in a process of its own, which is gone when the server starts."""
    module = "experiments.simulator_against_engine.grid"
    words = ["--seconds", str(GRID_S), str(checkpoint), str(directory / GRID), *OVERRIDES]
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def serve_and_send(checkpoint: Path, stretches: Sequence[Stretch], directory: Path, *overrides: str) -> None:
    """One server under all of them; leaves its log and what the client knows in the directory."""
    with (
        serving(f"checkpoint={checkpoint}", f"tracking.decision_log={directory / LOG}", *overrides) as port,
        tqdm(total=sum(len(stretch.asked) for stretch in stretches), desc="served", unit="request", leave=False) as bar,
    ):
        # Whatever a server puts off until its first request. Of a length that no other prompt has.
        asyncio.run(answered(port, [FIRST_ID] * (SHORT_TOKENS[0] - 1), 2))
        sent = [asyncio.run(send(port, stretch, bar)) for stretch in stretches]
    (directory / CLIENT).write_bytes(msgspec.json.encode(sent))


def quantiles(stretches: Sequence[Stretch], ttft_s: dict[int, float]) -> tuple[float, ...]:
    """p50, p90 and p99 over all requests of the stretches."""
    values = sorted(ttft_s[length] for stretch in stretches for length in stretch.meant_s)
    return tuple(percentile(values, p) for p in (50, 90, 99))


def simulated(log: ServedLog, calibration: Calibration, stretches: Sequence[Stretch]) -> list[dict[int, float]]:
    """TTFT by prompt length in the simulator; of every draw."""
    found = []
    with tqdm(total=NUM_DRAWS * len(stretches), desc="simulated", unit="stretch", leave=False) as bar:
        for seed in range(NUM_DRAWS):
            ttft_s: dict[int, float] = {}
            for place, stretch in enumerate(stretches):
                calibration.steps.begin(len(stretches) * seed + place, stretch.began_s)
                ttft_s |= simulate(log, calibration, stretch.meant_s)
                bar.update()
            found.append(ttft_s)
    return found


def report(grid: Grid, log: ServedLog, stretches: Sequence[Stretch]) -> bool:
    """Figures beside bars; whether they are met."""
    compared = [stretch for stretch in stretches if stretch.kind is Kind.COMPARISON]
    ttft_s = {name: seconds for stretch in compared for name, seconds in stretch.ttft_s.items()}
    calibrating = [stretch for stretch in stretches if stretch.kind is Kind.CALIBRATION]
    calibration = calibrate(grid, log, [(stretch.meant_s, stretch.ttft_s) for stretch in calibrating])
    law = grid.law
    paces, off = sorted(calibration.steps.paces), sorted(abs(left - 1.0) for left in calibration.steps.left)
    print(
        f"law: {law.num_steps} steps of the grid, those held out told with an error of p50 {law.error_p50:.1%}, p95 "
        f"{law.error_p95:.1%}\ncalibration: {len(paces):,} steps; the machine's pace: "
        + ", ".join(f"p{percent} {percentile(paces, percent):.2f}" for percent in (10, 50, 90))
        + f" of the law's seconds; steps at their pace are off by p50 {percentile(off, 50):.1%}, p95 "
        f"{percentile(off, 95):.1%}; {1e3 * calibration.front_in_s:.1f} ms from client to scheduler, "
        f"{1e3 * calibration.front_out_s:.1f} ms back\n"
    )
    print(f"{'TTFT':52s} {'p50 s':>8s} {'p90 s':>8s} {'p99 s':>8s}")

    def show(name: str, values: Sequence[float], digits: int = 4) -> None:
        print(f"{name:52s} " + " ".join(f"{value:8.{digits}f}" for value in values))

    draws = simulated(log, calibration, compared)
    each = [quantiles([stretch], ttft_s) for stretch in compared]
    for repeat, stretch in enumerate(compared):
        show(f"repeat {repeat + 1}, engine", each[repeat])
        show("          simulator", _medians([quantiles([stretch], draw) for draw in draws]))
    real = quantiles(compared, ttft_s)
    show("all, engine", real)
    found = _medians([quantiles(compared, draw) for draw in draws])
    show("     simulator", found)
    print("\nover the engine")
    ratios = [a / b for a, b in zip(found, real, strict=True)]
    show("simulator", ratios, 3)
    show("repeats of the engine: the longest over the shortest", [max(v) / min(v) for v in zip(*each, strict=True)], 3)
    is_met = all(abs(ratio - 1.0) <= BAR for ratio in (ratios[0], ratios[2]))
    print(f"\np50 and p99 within {BAR:.0%}: {'met' if is_met else 'missed'}")
    return is_met


def _medians(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(median(values) for values in zip(*rows, strict=True))


def main() -> int:
    """Run, print, and say whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each stretch")
    parser.add_argument("--qps", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--long", type=int, nargs=2, default=(1000, 2000), help="tokens of long prompts")
    parser.add_argument("--override", action="append", default=[], help="more overrides for the server")
    parser.add_argument("--keep", type=Path, help="a directory for the log; default: a temporary one")
    parser.add_argument("--again", type=Path, help="a directory of --keep: nothing is served, its log is read")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.again or arguments.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        if arguments.again is None:
            checkpoint = arguments.checkpoint
            if checkpoint is None:
                checkpoint = directory / "checkpoint"
                save_small_model(checkpoint)
            bounds = (arguments.long[0], arguments.long[1])
            stretches = plan(arguments.seconds, arguments.qps, bounds, arguments.repeats)
            measure_grid(checkpoint, directory)
            serve_and_send(checkpoint, stretches, directory, *OVERRIDES, *arguments.override)
        sent = msgspec.json.decode((directory / CLIENT).read_bytes(), type=list[Stretch])
        grid = msgspec.json.decode((directory / GRID).read_bytes(), type=Grid)
        is_met = report(grid, ServedLog.read(directory / LOG), sent)
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
