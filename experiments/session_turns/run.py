"""Does a turn cost its new tokens? The real engine, 28 million parameters, 20 turns up to 32K tokens.

    python -m experiments.session_turns.run                   # half an hour or so; on an idle machine
    python -m experiments.session_turns.run --tokens 12288    # prompts of up to 12K tokens: a third of that
    python -m experiments.session_turns.run --quick           # 5 turns up to 4K tokens, to see that it runs

One session alone, then eight at half load: gaps are 15 times what a turn of the lone session took, drawn from half to
one and a half of that. Each turn's TTFT is held against the prefill of its new tokens alone: the time from the
position where they begin to the last one in a lone prefill of the whole prompt without a prefix cache, read from that
server's decision log, median of three. New tokens are those after the prompt and the answer before; the first turn,
where all are new, is left out.

Published sessions of coding agents have prompts of 142K tokens, of which 96% were seen before, and answers of 444.
Answers here have as many to each new token (128 to 1,638 new ones), and then 16. With 16, all but a little of a turn is
prefill, so that half load is a device that prefills half of the time.

Turns of eight sessions meet, whatever the server does. So the same arrivals and the same lone prefills are also gone
through by one device that computes nothing else, can be interrupted at any moment, and follows the better of three
orders: what is between its figures and ours is ours, what is between its figures and the bars is the load's.

Bars, one session and eight: TTFT over the prefill alone at most 1.2 at the median and 2 at p99.
Finished parts are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from experiments.lib.random_llama import save_small_model
from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.served_log import ServedLog
from experiments.lib.session_bench import BenchRun, bench_sessions
from experiments.session_turns.best_order import ORDERS, Job, response_times_s
from megatron_medha.core.batch import Arrived, Batch, Completed
from megatron_medha.stats.summary import percentile
from megatron_medha.workload.session_file import write_session_rows
from megatron_medha.workload.sessions import TurnRow

ANSWER_PER_NEW_TOKEN = 444 / (0.04 * 142_000)
SHORT_ANSWER = 16
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

    @property
    def answer_tokens(self) -> int:
        """Of an answer, as many to each new token as published."""
        return round(ANSWER_PER_NEW_TOKEN * self.num_tokens / self.num_turns)


def session_rows(lengths: Lengths, num_sessions: int, num_outputs: int, gap_s: float) -> list[TurnRow]:
    """Sessions that begin one after another within a gap, with gaps from half to one and a half of that."""
    rows = []
    for index in range(num_sessions):
        draw = Random(f"gaps {index}")
        for turn in range(lengths.num_turns):
            tokens = lengths.prompt_tokens(turn)
            if turn == 0:
                rows.append(TurnRow(f"s{index}", tokens, num_outputs, start_s=index * gap_s / num_sessions))
            else:
                rows.append(TurnRow(f"s{index}", tokens, num_outputs, think_s=draw.uniform(0.5, 1.5) * gap_s))
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


def turns(
    checkpoint: Path, lengths: Lengths, num_sessions: int, num_outputs: int, gap_s: float, scratch: Path
) -> dict[str, Any]:
    """Sessions as the client saw them, and what the scheduler had of their time."""
    path = scratch / f"sessions{num_sessions}.jsonl"
    write_session_rows(path, session_rows(lengths, num_sessions, num_outputs, gap_s))
    ran = bench_sessions(checkpoint, [], [f"workload.path={path.resolve()}"])
    kept = (
        "session", "turn", "arrival_s", "prompt_tokens", "new_tokens", "cached_tokens", "ttft_s", "e2e_s", "ending"
    )  # fmt: skip
    times = scheduler_times(ran)
    rows = [{name: row[name] for name in kept} for row in ran.rows]
    return {"rows": [row | times.get((row["session"], row["prompt_tokens"]), {}) for row in rows], "gap_s": gap_s}


def scheduler_times(ran: BenchRun) -> dict[tuple[str, int], dict[str, float]]:
    """By session and length of the prompt: seconds before its first chunk, and from that to its first token."""
    waiting: dict[str, tuple[str, int, float]] = {}
    begun: dict[str, tuple[str, int, float, float]] = {}
    in_flight: dict[int, Batch] = {}
    found: dict[tuple[str, int], dict[str, float]] = {}
    for record in ran.log.records:
        entry, now_s = record.entry, record.now_s
        if isinstance(entry, Arrived):
            session = entry.request.session_id.rsplit(" ", 1)[-1]
            waiting[entry.request.request_id] = session, entry.request.num_prompt_tokens, now_s
        elif isinstance(entry, Batch):
            in_flight[entry.batch_id] = entry
            for chunk in entry.chunks:
                if chunk.request_id in waiting:
                    begun[chunk.request_id] = *waiting.pop(chunk.request_id), now_s
        elif isinstance(entry, Completed):
            for chunk in in_flight.pop(entry.batch_id).chunks:
                if chunk.samples_token and chunk.request_id in begun:
                    session, num_tokens, arrival_s, begin_s = begun.pop(chunk.request_id)
                    found[session, num_tokens] = {"wait_s": begin_s - arrival_s, "prefill_s": now_s - begin_s}
    return found


def report(name: str, rows: Sequence[dict[str, Any]], curves: Sequence[Sequence[tuple[int, float]]]) -> bool:
    """Print turns beside the prefill of their new tokens, what the best order of one device makes of them, and bars."""
    served = [row for row in rows if row["ttft_s"] is not None]
    jobs = [Job(row["arrival_s"], alone_s(row, curves)) for row in served]
    counted = [index for index, row in enumerate(served) if row["turn"] > 1]
    print(f"\n{name}\nprompt tokens   new  cached     TTFT   alone   ratio   waited  prefill  outside the scheduler")
    for index in sorted(counted, key=lambda index: (served[index]["prompt_tokens"], served[index]["session"])):
        row, alone = served[index], jobs[index].alone_s
        cached = "-" if row["cached_tokens"] is None else row["cached_tokens"]
        inside = ""
        if "wait_s" in row:
            outside_s = row["ttft_s"] - row["wait_s"] - row["prefill_s"]
            inside = f"{row['wait_s']:7.3f}s {row['prefill_s']:7.3f}s {outside_s:7.3f}s"
        print(
            f"{row['prompt_tokens']:13,} {row['new_tokens']:5} {cached:7} {row['ttft_s']:7.3f}s {alone:6.3f}s  "
            f"{row['ttft_s'] / alone:5.2f}  {inside}"
        )
    ratios = sorted(served[index]["ttft_s"] / jobs[index].alone_s for index in counted)
    least = dict.fromkeys(BARS, inf)
    for order_name, order in ORDERS.items():
        times_s = response_times_s(jobs, order)
        ordered = sorted(times_s[index] / jobs[index].alone_s for index in counted)
        figures = {percent: percentile(ordered, percent) for percent in BARS}
        least = {percent: min(least[percent], figures[percent]) for percent in BARS}
        print(f"one device, {order_name}: " + ", ".join(f"p{percent} {figures[percent]:.2f}" for percent in BARS))
    busy_s, span_s = sum(job.alone_s for job in jobs), max(job.arrival_s for job in jobs)
    print(f"prefills alone are {busy_s / max(span_s, busy_s):.0%} of the time")
    num_failed = len(rows) - len(served)
    met = [verdict(f"{name}, turns without a first token", str(num_failed), "0", not num_failed)]
    for percent, bar in BARS.items():
        ratio = percentile(ratios, percent)
        question = f"{name}, TTFT over the prefill of the new tokens alone"
        figure = f"p{percent} {ratio:.2f} (one device at best {least[percent]:.2f})"
        met.append(verdict(question, figure, f"at most {bar:g}", ratio <= bar))
    return all(met)


def alone_s(row: dict[str, Any], curves: Sequence[Sequence[tuple[int, float]]]) -> float:
    """The prefill of a turn's new tokens, alone."""
    end, start = row["prompt_tokens"], row["prompt_tokens"] - row["new_tokens"]
    return median(at_position(curve, end) - at_position(curve, start) for curve in curves)


def main() -> int:
    """Run what has not run, print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a session's last prompt")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--outputs", type=int, nargs="*", help="tokens of an answer")
    parser.add_argument("--out", type=Path, default=None, help="default: outputs/session_turns, or ..._quick")
    arguments = parser.parse_args()
    lengths = Lengths(5, 4096) if arguments.quick else Lengths(20, arguments.tokens)
    out = arguments.out or Path("outputs") / ("session_turns_quick" if arguments.quick else "session_turns")
    results = ResultsFile(out / "results.json", {"num_turns": lengths.num_turns, "num_tokens": lengths.num_tokens})
    checkpoint = out / "model"
    if not (checkpoint / "tokenizer_config.json").is_file():
        save_small_model(checkpoint)
    curves = results.cell("lone prefill", partial(lone_prefill, checkpoint, lengths, out))["curves"]
    met = []
    for num_outputs in arguments.outputs or [lengths.answer_tokens, SHORT_ANSWER]:
        lone = f"1 session, answers of {num_outputs}"
        single = results.cell(lone, partial(turns, checkpoint, lengths, 1, num_outputs, 0.0, out))
        service_s = fmean(row["e2e_s"] for row in single["rows"] if row["e2e_s"] is not None)
        for num_sessions in arguments.sessions:
            name = lone if num_sessions == 1 else f"{num_sessions} sessions, answers of {num_outputs}"
            gap_s = (num_sessions / LOAD - 1.0) * service_s
            run = partial(turns, checkpoint, lengths, num_sessions, num_outputs, gap_s, out)
            met.append(report(name, results.cell(name, run)["rows"], curves))
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
