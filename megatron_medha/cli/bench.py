"""`medha bench`: puts a running server under load, and writes what its clients saw into a run directory."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TextIO

import aiohttp
from tqdm import tqdm

from megatron_medha.bench.client import Target, find_model
from megatron_medha.bench.context_fit import check_fits
from megatron_medha.bench.idle import lengths_between, measure_idle
from megatron_medha.bench.load_generator import LoadClient, SentRequest, closed_loop, open_loop
from megatron_medha.bench.measured import BenchMeasurement, MeasurementWindow
from megatron_medha.bench.session_loop import session_loop
from megatron_medha.bench.session_prompts import PromptMaker, prompt_maker
from megatron_medha.bench.turn_table import SentTurn, TurnMeasurement, turns_table
from megatron_medha.cli.parts.arguments import SWEEP_FLAGS
from megatron_medha.cli.parts.command_options import directory_of, run_job_command
from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.cli.parts.served import served
from megatron_medha.cli.parts.wandb_run import WandbRun, check_wandb
from megatron_medha.cli.reports.plots import check_plots, plot
from megatron_medha.options.bench_options import BenchOptions, IdleMeasurement
from megatron_medha.options.yaml_text import to_yaml, yaml_values
from megatron_medha.sim.run_directory import RunDirectory
from megatron_medha.stats.capacity_search import CapacitySearch
from megatron_medha.stats.summary_table import summary_table
from megatron_medha.workload.session_play import SessionPlay
from megatron_medha.workload.workload import Workload

USAGE = f"""\
usage: medha bench [group=option] [key=value ...]
       medha bench -m key=value,value ...

Sends a workload to any server with OpenAI's completions API, streaming, with prompts as token ids; or plays sessions,
whose prompts contain the answers before them. Prints latencies by length class, SLO attainment and goodput, and writes
every request into a directory. TTFT counts from the time at which a request was due, not from when it was sent.

examples:
  medha bench                                      # two minutes of small prompts, one in twenty a long one
  medha bench url=http://gpu-7:8000 workload=medha_mix_05pct workload.qps=0.5 classes=medha
  medha bench concurrency=8 workload.num_requests=200
  medha bench workload=sessions workload.sessions.num_sessions=4 workload.sessions.length_scale=0.02
  medha bench capacity=search workload.num_requests=300 slo.tpot_s=0.1
  medha bench workload=trace workload.path=trace.csv.gz workload.time_scale=0.5 tracking=wandb
  medha bench -m workload.qps=0.5,1,2 out=multirun/load
  medha bench -m "serve='checkpoint=DIR scheduler=fcfs','checkpoint=DIR scheduler=lars'" workload.qps=0.5,1

flags:
{SWEEP_FLAGS}"""


def run(words: Sequence[str]) -> int:
    """Run one load, or a search of several."""
    return run_job_command("bench", words, USAGE, BenchOptions, bench)


def bench(options: BenchOptions, composed_yaml: str, typed: JobWords) -> dict[str, Any]:
    """One `medha bench` with its output; returns what is in summary.json."""
    check_plots(options.plots)
    check_wandb(options.tracking)
    config = yaml_values(composed_yaml)
    config.pop("api_key")  # a secret; nothing that is written down needs it
    config.pop("out")      # a directory may be moved
    directory = RunDirectory.create(
        directory_of(options.out, "bench"), to_yaml(config), options.seed, typed.origin()
    )
    directory.write_json("machine.json", {"platform": platform.platform(), "num_cores": os.cpu_count()})
    tracker = WandbRun(options.tracking, "bench", config, directory.path, typed.name)
    try:
        with nullcontext(options.url) if options.serve is None else served(options.serve, directory.path) as url:
            values = asyncio.run(_Bench(replace(options, url=url), directory, tracker).run())
    except BaseException:
        tracker.fail()
        raise
    plot(options.plots, directory.path)
    print(f"results are in {directory.path}")
    tracker.finish(directory.path)
    return values


@dataclass(frozen=True)
class _Bench:
    """The steps of one `medha bench`."""

    _options: BenchOptions
    _directory: RunDirectory
    _tracker: WandbRun

    async def run(self) -> dict[str, Any]:
        options = self._options
        workload = Workload(options.workload, options.seed)
        target = options.target
        async with target.session() as session:
            model, max_tokens = await find_model(target, session)
            print(f"{model} at {target.url}\n{workload}")
            check_fits(workload, options.seed, max_tokens)
            isolated_s = await self._isolated(target, session, model, workload)
            client = LoadClient(
                target=target, session=session, model=model, tokens=options.tokens, slo=options.slo,
                seed=options.seed, isolated_s=isolated_s,
            )  # fmt: skip
            if options.workload.sessions is not None:
                maker = await prompt_maker(options.prompts, target, session, model, options.tokens, options.seed)
                return await self._play(client, workload.play(), maker)
            search = options.capacity_search()
            if search is None:
                return await self._load(client, workload, "")
            return await self._search(client, search)

    async def _isolated(
        self, target: Target, session: aiohttp.ClientSession, model: str, workload: Workload
    ) -> Callable[[int], float]:
        options = self._options
        if options.idle is IdleMeasurement.SKIP:
            return lambda num_tokens: 0.0
        least = min(request.num_prompt_tokens for request in workload.requests())
        lengths = lengths_between(least, workload.facts.max_prompt_tokens)
        with tqdm(lengths, unit="length", desc="alone on the server", file=sys.stderr, dynamic_ncols=True) as bar:

            def note(num_tokens: int, seconds: float) -> None:
                bar.set_postfix_str(f"{num_tokens:,} tokens {seconds:.3g} s", refresh=False)
                bar.update()

            idle = await measure_idle(target, session, model, options.tokens, lengths, options.seed, note)
        self._directory.write_json("idle.json", {"num_tokens": idle.num_tokens, "ttft_s": idle.seconds})
        return idle.at

    async def _search(self, client: LoadClient, search: CapacitySearch) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        values: dict[str, Any] = {}
        while (qps := search.next_qps()) is not None:
            config = replace(self._options.workload, qps=qps)
            values = await self._load(client, Workload(config, self._options.seed), f"qps {qps:.4g}: ")
            counted = values["all"]
            probe = search.note(qps, counted["num_met"], counted["num_requests"])
            verdict = ("passes" if probe.passes else "fails") + ("" if probe.is_clear else ", but not for certain")
            print(f"qps {qps:.4g}: {counted['attainment']:.1%} meet the SLO: {verdict}\n")
            runs.append({"qps": qps, "passes": probe.passes, "is_clear": probe.is_clear, **values})
        best = search.best_qps
        print(
            "no rate met the SLO" if best is None
            else f"capacity {best:.4g} requests per second" + ("" if search.is_resolved else " at least, not resolved")
        )  # fmt: skip
        passed = next((one for one in runs if one["qps"] == best), values)
        values = {**passed, "capacity_qps": best, "is_resolved": search.is_resolved, "probes": runs}
        self._directory.write_json("summary.json", values)
        return values

    async def _play(self, client: LoadClient, play: SessionPlay, maker: PromptMaker) -> dict[str, Any]:
        turns = TurnMeasurement()
        with self._noting(sum(len(one.turns) for one in play.sessions), MeasurementWindow.of_sessions(), "") as noted:

            def note(turn: SentTurn) -> None:
                turns.add(turn)
                noted.note(turn.sent, {"session": turn.session, "turn": turn.number, "new_tokens": turn.num_new_tokens})

            await session_loop(client, play, maker, note)
        values = noted.measured.values() | {"sessions": turns.values(play)}
        return self._finish(values, "\n" + turns_table(values["sessions"]) + noted.measured.remarks())

    async def _load(self, client: LoadClient, workload: Workload, label: str) -> dict[str, Any]:
        options, facts = self._options, workload.facts
        if options.concurrency is None:
            window = MeasurementWindow.of_open_loop(facts.last_arrival_s, options.exclude_share)
        else:
            window = MeasurementWindow.of_closed_loop(facts.num_requests, options.exclude_share)
        with self._noting(facts.num_requests, window, label) as noted:
            if options.concurrency is None:
                await open_loop(client, workload.requests(), noted.note, options.max_drain_s)
            else:
                await closed_loop(client, workload.requests(), options.concurrency, noted.note)
        return self._finish(noted.measured.values(), noted.measured.remarks())

    @contextmanager
    def _noting(self, num_requests: int, window: MeasurementWindow, label: str) -> Iterator[_Noted]:
        with (
            (self._directory.path / "requests.jsonl").open("w", encoding="utf-8") as stream,
            tqdm(total=num_requests, unit="request", desc=label, file=sys.stderr, dynamic_ncols=True) as bar,
        ):
            measured = BenchMeasurement(self._options.classes, self._options.slo, window)
            yield _Noted(self._options, self._directory, self._tracker, measured, stream, bar)

    def _finish(self, values: dict[str, Any], remarks: str) -> dict[str, Any]:
        table = summary_table(values) + remarks
        print(f"\n{table}")
        self._directory.finish(values, table)
        return values


@dataclass(frozen=True, slots=True)
class _Noted:
    """Takes requests in as they end."""

    options: BenchOptions
    directory: RunDirectory
    tracker: WandbRun
    measured: BenchMeasurement
    stream: TextIO
    bar: Any  # tqdm has no types

    def note(self, sent: SentRequest, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write a request down, with what else is known of it."""
        is_counted = self.measured.add(sent)
        row = self.directory.request_values(sent.outcome, self.options.classes, self.options.slo)
        row |= {"send_lag_s": round(sent.send_lag_s, 6), "is_counted": is_counted, **more}
        self.stream.write(json.dumps(row) + "\n")
        self.bar.update()
        self.tracker.sample(
            (sent.outcome.last_token_s or sent.outcome.request.arrival_s),
            {f"{row['length_class']}.ttft_s": row["ttft_s"], f"{row['length_class']}.tpot_s": row["tpot_s"]},
        )
