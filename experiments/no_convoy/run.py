"""Short prompts beside a long one, on the real server: LARS with adaptive chunks against whole-prompt FCFS.

    python -m experiments.no_convoy.run checkpoints/tiny

Per setting one server is started; on it, in turn: the long prompt alone, short prompts one at a time while
nothing else runs (idle), then the long prompt with the short ones arriving at random during its prefill.
Prints a table beside the bars, writes no_convoy.png next to this file (or into --out).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.drawing import panels
from experiments.lib.http_stream import Streamed, answered
from experiments.lib.server_process import serving, vocab_size
from megatron_medha.stats.summary import percentile

SETTINGS = {
    "lars": ["scheduler=lars"],
    "fcfs, whole prompts": ["scheduler=whole_prompt"],
}
STEP_BUDGET_S = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting's figures, seconds."""

    setting: str
    idle_s: list[float]
    beside_s: list[float]
    beside_at_s: list[float]       # arrival of each, after the long prompt's
    beside_prompt_tokens: list[int]
    long_alone_s: float            # TTFT
    long_beside_s: float
    idle_work_s: float             # what the short ones took in all, one at a time

    @property
    def short_p99_s(self) -> float:
        """The 99th percentile, interpolated."""
        return percentile(sorted(self.beside_s), 99)


async def measure(setting: str, port: int, args: argparse.Namespace) -> Outcome:
    """All phases on one server."""
    rng = random.Random(args.seed)
    vocab = vocab_size(port)

    def prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(num_tokens)]

    lengths = [rng.randint(args.short_min, args.short_max) for _ in range(args.shorts)]
    for _ in range(60):  # the cost model learns the machine from traffic; let it have some
        pair = (rng.randint(args.short_min, 4 * args.short_max) for _ in range(2))
        await asyncio.gather(*(answered(port, prompt(num_tokens), 8) for num_tokens in pair))
    await answered(port, prompt(args.long // 4), 2)
    long_prompt = prompt(args.long)
    alone = await answered(port, long_prompt, 2)
    idle = [await answered(port, prompt(n), args.short_output) for n in lengths]

    long_task = asyncio.create_task(answered(port, prompt(args.long), 2))
    long_start_s = asyncio.get_running_loop().time()
    # Arrivals spread over the prefill: uniform order statistics are what Poisson arrivals look like in a window.
    offsets_s = sorted(rng.uniform(0.05, 0.9) * alone.ttft_s for _ in lengths)

    async def short(offset_s: float, num_tokens: int) -> Streamed:
        await asyncio.sleep(max(0.0, long_start_s + offset_s - asyncio.get_running_loop().time()))
        return await answered(port, prompt(num_tokens), args.short_output)

    beside = await asyncio.gather(*(short(o, n) for o, n in zip(offsets_s, lengths, strict=True)))
    long_beside = await long_task
    return Outcome(
        setting,
        [r.ttft_s for r in idle],
        [r.ttft_s for r in beside],
        offsets_s,
        lengths,
        alone.ttft_s,
        long_beside.ttft_s,
        sum(r.end_s - r.sent_s for r in idle),
    )


def report(outcomes: list[Outcome]) -> bool:
    """The table; whether LARS keeps the bars."""
    print(f"\n{'setting':<22}{'idle p50':>10}{'idle p99':>10}{'short p50':>11}{'short p99':>11}"
          f"{'long alone':>12}{'long beside':>13}{'short work':>12}")
    for o in outcomes:
        print(f"{o.setting:<22}{statistics.median(o.idle_s):>10.3f}{percentile(sorted(o.idle_s), 99):>10.3f}"
              f"{statistics.median(o.beside_s):>11.3f}{o.short_p99_s:>11.3f}"
              f"{o.long_alone_s:>12.2f}{o.long_beside_s:>13.2f}{o.idle_work_s:>12.2f}")
    lars = outcomes[0]
    short_bar_s = 2 * percentile(sorted(lars.idle_s), 99) + STEP_BUDGET_S
    strict_bar_s = 2 * statistics.median(lars.idle_s) + STEP_BUDGET_S
    long_bar_s = 1.1 * lars.long_alone_s + lars.idle_work_s
    short_ok, long_ok = lars.short_p99_s <= short_bar_s, lars.long_beside_s <= long_bar_s
    print(f"\nshort p99 under LARS  {lars.short_p99_s:.3f} s   bar 2 x idle p99 + step budget = {short_bar_s:.3f} s "
          f"(with idle p50: {strict_bar_s:.3f} s)   {'kept' if short_ok else 'MISSED'}")
    print(f"long beside           {lars.long_beside_s:.2f} s    bar 1.1 x alone + the shorts' work = "
          f"{long_bar_s:.2f} s   {'kept' if long_ok else 'MISSED'}")
    if len(outcomes) > 1:
        print(f"whole-prompt FCFS     short p99 is {outcomes[1].short_p99_s / lars.short_p99_s:.0f} times that of LARS")
    return short_ok and long_ok


def plot(outcomes: list[Outcome], path: Path) -> None:
    """TTFT of each short prompt over the time at which it came."""
    figure, axes = panels(width=8, height=4.5)
    for outcome, colour in zip(outcomes, ("#0072b2", "#d55e00"), strict=False):
        axes.plot(outcome.beside_at_s, outcome.beside_s, "o", color=colour, markersize=4, label=outcome.setting)
    axes.axhline(statistics.median(outcomes[0].idle_s), color="#555555", linestyle=":", label="idle, median")
    axes.set_yscale("log")
    axes.set_xlabel("arrival after the long prompt, s")
    axes.set_ylabel("TTFT of a short prompt, s")
    axes.set_title("Short prompts beside one long prompt in prefill")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--shorts", type=int, default=50, help="how many short prompts arrive beside it")
    parser.add_argument("--short-min", type=int, default=64)
    parser.add_argument("--short-max", type=int, default=256)
    parser.add_argument("--short-output", type=int, default=8, help="output tokens of each short prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(SETTINGS), action="append")
    parser.add_argument("--override", action="append", default=[], help="more overrides for every server")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for setting, overrides in SETTINGS.items():
        if args.only and setting not in args.only:
            continue
        log = args.out / f"decisions_{setting.split(',')[0]}.jsonl"
        print(f"[{setting}] starting the server", flush=True)
        with serving(
            f"checkpoint={args.checkpoint}", f"tracking.decision_log={log}", *overrides, *args.override
        ) as port:
            outcomes.append(asyncio.run(measure(setting, port, args)))
    is_kept = report(outcomes)
    plot(outcomes, args.out / "no_convoy.png")
    sys.exit(0 if is_kept else 1)


if __name__ == "__main__":
    main()
