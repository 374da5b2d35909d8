"""Does the simulator say what the real engine does? The same requests on a real server, and simulated.

    python -m experiments.simulator_against_engine.run                    # a model of random weights, 28M parameters
    python -m experiments.simulator_against_engine.run checkpoints/tiny

1. Calibration: a server that knows nothing of the machine is put under a stream of short prompts and a few long ones.
   From its decision log come how long steps take, and the time between client and scheduler.
2. A second server starts from that profile and is put --repeats times under another stream.
3. The simulator is given the times at which the client meant to send, the scheduler's setup from the log, and step 1's
   cost as the truth; it has seen nothing of step 2.

Bar, for a quiet machine: TTFT p50 and p99, as the client saw them, within 5%. Printed beside it: how much the repeats
differ among themselves, which no simulator can undercut, and how far the decisions of both agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.lib.http_stream import complete
from experiments.lib.server_process import serving
from experiments.peers.checkpoint import make_checkpoint
from experiments.simulator_against_engine.compare import agreement, chunks_of, simulate
from experiments.simulator_against_engine.log import Calibration, ServedLog, calibrate
from megatron_medha.engine.summary import percentile

BAR = 0.05
GAP_S = 3.0  # between repeats, in which everything ends
FIRST_ID, LAST_ID = 40, 120  # bytes of text: every model's vocabulary has them


@dataclass(frozen=True, slots=True)
class Planned:
    """A request as the client means to send it. No two prompts have the same length: it is their name in all logs."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    repeat: int


def stream(seed: int, seconds: float, qps: float, long_tokens: tuple[int, int], taken: set[int]) -> list[Planned]:
    """Poisson arrivals; every 15th prompt is long."""
    rng = random.Random(seed)
    planned: list[Planned] = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(qps)) < seconds:
        bounds = long_tokens if len(planned) % 15 == 7 else (64, 1024)
        length = rng.choice([n for n in range(*bounds) if n not in taken])
        taken.add(length)
        planned.append(Planned(at_s, length, rng.randint(8, 32), 0))
    return planned


def repeated(planned: Sequence[Planned], repeats: int, period_s: float) -> list[Planned]:
    """The same stream again and again, every prompt some tokens longer each time: lengths stay names."""
    return [
        Planned(one.at_s + repeat * period_s, one.num_prompt_tokens + repeat, one.num_output_tokens, repeat)
        for repeat in range(repeats)
        for one in planned
    ]


async def send(port: int, planned: Sequence[Planned], label: str) -> tuple[float, dict[int, float]]:
    """When the stream began; by prompt length the seconds from when it was meant to be sent to its first token."""
    rng = random.Random(0)
    prompts = [[rng.randint(FIRST_ID, LAST_ID) for _ in range(one.num_prompt_tokens)] for one in planned]
    began_s = time.monotonic() + 0.5
    found: dict[int, float] = {}
    with tqdm(total=len(planned), desc=label, unit="request", leave=False) as bar:

        async def one(plan: Planned, prompt: list[int]) -> None:
            await asyncio.sleep(began_s + plan.at_s - time.monotonic())
            answer = await complete(port, prompt, plan.num_output_tokens, may_join_tokens=True)
            if answer.error is not None:
                raise SystemExit(f"a request of {plan.num_prompt_tokens} tokens failed: {answer.error}")
            found[plan.num_prompt_tokens] = answer.token_times_s[0] - began_s - plan.at_s
            bar.update()

        await asyncio.gather(*(one(plan, prompt) for plan, prompt in zip(planned, prompts, strict=True)))
    return began_s, found


def serve_and_send(
    checkpoint: Path, planned: Sequence[Planned], log: Path, label: str, *overrides: str
) -> tuple[float, dict[int, float], ServedLog]:
    """One server under one stream."""
    with serving(f"checkpoint={checkpoint}", f"tracking.decision_log={log}", *overrides) as port:
        asyncio.run(complete(port, [FIRST_ID] * 33, 2))  # whatever a server puts off until its first request
        began_s, ttft_s = asyncio.run(send(port, planned, label))
    return began_s, ttft_s, ServedLog.read(log)


def report(
    planned: Sequence[Planned], real: dict[int, float], simulated: dict[int, float], calibration: Calibration
) -> bool:
    """Figures beside bars."""

    def quantiles(ttft_s: dict[int, float], chosen: Sequence[Planned]) -> list[float]:
        values = sorted(ttft_s[one.num_prompt_tokens] for one in chosen)
        return [percentile(values, p) for p in (50, 90, 99)]

    print(
        f"steps of the calibration, told by a fit that had not seen them: off by p50 {calibration.error_p50:.1%}, "
        f"p95 {calibration.error_p95:.1%}; {1e3 * calibration.front_in_s:.1f} ms from client to scheduler, "
        f"{1e3 * calibration.front_out_s:.1f} ms back\n"
    )
    print(f"{'TTFT':24s} {'p50 s':>8s} {'p90 s':>8s} {'p99 s':>8s}")
    num_repeats = 1 + max(one.repeat for one in planned)
    for repeat in range(num_repeats):
        chosen = [one for one in planned if one.repeat == repeat]
        for name, ttft_s in (("engine", real), ("simulator", simulated)):
            print(f"{f'repeat {repeat + 1}, {name}':24s} " + " ".join(f"{v:8.4f}" for v in quantiles(ttft_s, chosen)))
    pooled_real, pooled_simulated = quantiles(real, planned), quantiles(simulated, planned)
    ratios = [a / b for a, b in zip(pooled_simulated, pooled_real, strict=True)]
    for name, values in (("all, engine", pooled_real), ("all, simulator", pooled_simulated)):
        print(f"{name:24s} " + " ".join(f"{v:8.4f}" for v in values))
    print(f"{'simulator / engine':24s} " + " ".join(f"{v:8.3f}" for v in ratios))
    is_met = all(abs(ratio - 1.0) <= BAR for ratio in (ratios[0], ratios[2]))
    print(f"\np50 and p99 within {BAR:.0%}: {'met' if is_met else 'missed'}")
    return is_met


def main() -> int:
    """Run, print, and say whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each stream")
    parser.add_argument("--qps", type=float, default=1.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, nargs=2, default=(4000, 8000), help="tokens of long prompts")
    parser.add_argument("--override", action="append", default=[], help="more overrides for the servers")
    parser.add_argument("--keep", type=Path, help="a directory for logs and profile; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint, extra = arguments.checkpoint, arguments.override
        if checkpoint is None:
            checkpoint = directory / "checkpoint"
            make_checkpoint(checkpoint)
        bounds = (arguments.long[0], arguments.long[1])
        first = stream(1, arguments.seconds, arguments.qps, bounds, set())
        began_s, ttft_s, log = serve_and_send(checkpoint, first, directory / "first.jsonl", "calibration", *extra)
        calibration = calibrate(log, began_s, {one.num_prompt_tokens: one.at_s for one in first}, ttft_s)
        profile = directory / "profile.json"
        profile.write_text(json.dumps(asdict(calibration.reported.fitted)), encoding="utf-8")

        # Lengths that are multiples of the number of repeats leave room for those of the repeats.
        once = stream(2, arguments.seconds, arguments.qps, bounds, set())
        taken: set[int] = set()
        spaced = []
        for one in once:
            length = one.num_prompt_tokens - one.num_prompt_tokens % arguments.repeats
            while length in taken:
                length += arguments.repeats
            taken.add(length)
            spaced.append(Planned(one.at_s, length, one.num_output_tokens, 0))
        planned = repeated(spaced, arguments.repeats, arguments.seconds + GAP_S)
        began_s, real, log = serve_and_send(
            checkpoint, planned, directory / "second.jsonl", "comparison", f"profile={profile}", *extra
        )
    requests = [(one.at_s, one.num_prompt_tokens, one.num_output_tokens) for one in planned]
    simulated, decisions = simulate(log, calibration, requests)
    is_met = report(planned, real, simulated, calibration)
    print(agreement(log, chunks_of(log.batches, log.lengths), decisions))
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
