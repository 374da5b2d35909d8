"""Does a turn cost its new tokens? The real engine, 28 million parameters, 20 turns up to 32K tokens.

    python -m experiments.session_turns.run            # 20 minutes or so; on an idle machine
    python -m experiments.session_turns.run --quick    # 5 turns up to 4K tokens, to see that it runs

One session alone, then eight at half load: gaps are 15 times what a turn of the lone session took, drawn from half to
one and a half of that. Each turn's TTFT is held against the prefill of its new tokens alone: the time from the
position where they begin to the last one in a lone prefill of the whole prompt without a prefix cache, read from that
server's decision log, median of three. New tokens are those after the prompt and the answer before; the first turn,
where all are new, is left out.

Bars, one session and eight: TTFT over that time at most 1.2 at the median and 2 at p99.
Finished parts are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from experiments.lib.random_llama import save_small_model
from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.served_log import ServedLog
from experiments.lib.session_bench import bench_sessions
from megatron_medha.stats.summary import percentile
from megatron_medha.workload.session_file import write_session_rows
from megatron_medha.workload.sessions import TurnRow

OUTPUT_TOKENS = 16
LOAD = 0.5
REPEATS = 3
BARS = {50: 1.2, 99: 2.0}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a session."""

    num_turns: int
    num_tokens: int  # of the last prompt

    def prompt_tokens(self, turn: int) -> int:
        """Of a turn, from 0."""
        return (turn + 1) * self.num_tokens // self.num_turns


def session_rows(lengths: Lengths, num_sessions: int, gap_s: float) -> list[TurnRow]:
    """Sessions that begin one after another within a gap, with gaps from half to one and a half of that."""
    rows = []
    for index in range(num_sessions):
        draw = Random(f"gaps {index}")
        for turn in range(lengths.num_turns):
            tokens = lengths.prompt_tokens(turn)
            if turn == 0:
                rows.append(TurnRow(f"s{index}", tokens, OUTPUT_TOKENS, start_s=index * gap_s / num_sessions))
            else:
                rows.append(TurnRow(f"s{index}", tokens, OUTPUT_TOKENS, think_s=draw.uniform(0.5, 1.5) * gap_s))
    return rows


def prefill_curve(log: ServedLog, request_id: str) -> list[tuple[int, float]]:
    """Positions of a prompt and the seconds of the clock at which they were computed: its beginning, ends of chunks."""
    points: list[tuple[int, float]] = []
    for step in log.steps:
        for chunk in step.batch.chunks:
            if chunk.request_id == request_id and chunk.start < log.lengths[request_id]:
                points = points or [(chunk.start, step.submitted_s)]
                points.append((chunk.start + chunk.num_tokens, step.completed_s))
    return points


def at_position(curve: Sequence[tuple[int, float]], position: int) -> float:
    """When it was reached; straight between ends of chunks."""
    index = max(1, bisect_left([end for end, _ in curve], position))
    (x0, y0), (x1, y1) = curve[index - 1], curve[index]
    return y0 + (y1 - y0) * (position - x0) / (x1 - x0)


def lone_prefill(checkpoint: Path, lengths: Lengths, scratch: Path) -> dict[str, Any]:
    """The curves of a prompt of the last turn's length, alone and without a prefix cache."""
    path = scratch / "lone.jsonl"
    write_session_rows(path, [TurnRow(f"s{index}", lengths.num_tokens, 1) for index in range(REPEATS + 1)])
    ran = bench_sessions(
        checkpoint, ["kv.prefix_cache=false"], [f"workload.path={path.resolve()}", "workload.sessions.max_live=1"]
    )
    long = [name for name, num_tokens in ran.log.lengths.items() if num_tokens == lengths.num_tokens]
    return {"curves": [prefill_curve(ran.log, name) for name in long[1:]]}  # the first warms up


def turns(checkpoint: Path, lengths: Lengths, num_sessions: int, gap_s: float, scratch: Path) -> dict[str, Any]:
    """Sessions as the client saw them."""
    path = scratch / f"sessions{num_sessions}.jsonl"
    write_session_rows(path, session_rows(lengths, num_sessions, gap_s))
    ran = bench_sessions(checkpoint, [], [f"workload.path={path.resolve()}"])
    kept = ("session", "turn", "prompt_tokens", "new_tokens", "cached_tokens", "ttft_s", "e2e_s", "ending")
    return {"rows": [{name: row[name] for name in kept} for row in ran.rows], "gap_s": gap_s}


def report(name: str, rows: Sequence[dict[str, Any]], curves: Sequence[Sequence[tuple[int, float]]]) -> bool:
    """Print turns beside the prefill of their new tokens, and bars."""
    counted = [row for row in rows if row["turn"] > 1 and row["ttft_s"] is not None]
    num_failed = len([row for row in rows if row["ttft_s"] is None])
    ratios: list[float] = []
    print(f"\n{name}\nprompt tokens   new  cached     TTFT   alone   ratio")
    for row in sorted(counted, key=lambda row: (row["prompt_tokens"], row["session"])):
        end = row["prompt_tokens"]
        alone_s = median(at_position(curve, end) - at_position(curve, end - row["new_tokens"]) for curve in curves)
        ratios.append(row["ttft_s"] / alone_s)
        cached = "-" if row["cached_tokens"] is None else row["cached_tokens"]
        print(f"{end:13,} {row['new_tokens']:5} {cached:7} {row['ttft_s']:7.3f}s {alone_s:6.3f}s  {ratios[-1]:5.2f}")
    ordered = sorted(ratios)
    met = [verdict(f"{name}, turns without a first token", str(num_failed), "0", not num_failed)]
    for percent, bar in BARS.items():
        ratio = percentile(ordered, percent)
        question = f"{name}, TTFT over the prefill of the new tokens alone"
        met.append(verdict(question, f"p{percent} {ratio:.2f}", f"at most {bar:g}", ratio <= bar))
    return all(met)


def main() -> int:
    """Run what has not run, print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/session_turns, or ..._quick")
    arguments = parser.parse_args()
    lengths = Lengths(5, 4096) if arguments.quick else Lengths(20, 32_768)
    out = arguments.out or Path("outputs") / ("session_turns_quick" if arguments.quick else "session_turns")
    results = ResultsFile(out / "results.json", {"num_turns": lengths.num_turns, "num_tokens": lengths.num_tokens})
    checkpoint = out / "model"
    if not (checkpoint / "tokenizer_config.json").is_file():
        save_small_model(checkpoint)
    curves = results.cell("lone prefill", partial(lone_prefill, checkpoint, lengths, out))["curves"]
    single = results.cell("1 session", partial(turns, checkpoint, lengths, 1, 0.0, out))
    service_s = fmean(row["e2e_s"] for row in single["rows"] if row["e2e_s"] is not None)
    met = []
    for num_sessions in arguments.sessions:
        name = "1 session" if num_sessions == 1 else f"{num_sessions} sessions"
        gap_s = 0.0 if num_sessions == 1 else (num_sessions / LOAD - 1.0) * service_s
        found = results.cell(name, partial(turns, checkpoint, lengths, num_sessions, gap_s, out))
        met.append(report(name, found["rows"], curves))
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
