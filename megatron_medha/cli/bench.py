"""`medha bench`: puts a running server under load, and writes what its clients saw into a run directory."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from tqdm import tqdm

from megatron_medha.bench.client import Target, find_model
from megatron_medha.bench.idle import lengths_between, measure_idle
from megatron_medha.bench.load_generator import LoadClient, SentRequest, closed_loop, open_loop
from megatron_medha.bench.measured import BenchMeasurement, MeasurementWindow
from megatron_medha.cli.parts.arguments import SWEEP_FLAGS
from megatron_medha.cli.parts.command_options import directory_of, run_job_command
from megatron_medha.cli.parts.served import served
from megatron_medha.cli.parts.wandb_run import WandbRun, check_wandb
from megatron_medha.cli.reports.plots import check_plots, plot
from megatron_medha.options.bench_options import BenchOptions, IdleMeasurement
from megatron_medha.options.yaml_text import to_yaml, yaml_values
from megatron_medha.sim.run_directory import RunDirectory
from megatron_medha.stats.capacity_search import CapacitySearch
from megatron_medha.stats.summary_table import summary_table
from megatron_medha.workload.workload import Workload

USAGE = f"""\
usage: medha bench [group=option] [key=value ...]
       medha bench -m key=value,value ...

Sends a workload to any server with OpenAI's completions API, streaming, with prompts as token ids. Prints latencies by
length class, SLO attainment and goodput, and writes every request into a directory. TTFT counts from the time at which
a request was due, not from when this client sent it.

examples:
  medha bench                                      # two minutes of small prompts, one in twenty a long one
  medha bench url=http://gpu-7:8000 workload=medha_mix_05pct workload.qps=0.5 classes=medha
  medha bench concurrency=8 workload.num_requests=200
  medha bench capacity=search workload.num_requests=300 slo.tpot_s=0.1
  medha bench workload=trace workload.path=trace.csv.gz workload.time_scale=0.5 tracking=wandb
  medha bench -m workload.qps=0.5,1,2 out=multirun/load
  medha bench -m "serve='checkpoint=DIR scheduler=fcfs','checkpoint=DIR scheduler=lars'" workload.qps=0.5,1

flags:
{SWEEP_FLAGS}"""


def run(words: Sequence[str]) -> int:
    """Run one load, or a search of several."""
    return run_job_command("bench", words, USAGE, BenchOptions, bench)


def bench(options: BenchOptions, composed_yaml: str) -> dict[str, Any]:
    """One `medha bench` with its output; returns what is in summary.json."""
    check_plots(options.plots)
    check_wandb(options.tracking)
    config = yaml_values(composed_yaml)
    config.pop("api_key")  # a secret; nothing that is written down needs it
    config.pop("out")      # a directory may be moved
    directory = RunDirectory.create(directory_of(options.out, "bench"), to_yaml(config), options.seed)
    directory.write_json("machine.json", {"platform": platform.platform(), "num_cores": os.cpu_count()})
    tracker = WandbRun(options.tracking, "bench", config, directory.path)
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
            model = await find_model(target, session)
            print(f"{model} at {target.url}\n{workload}")
            isolated_s = await self._isolated(target, session, model, workload)
            client = LoadClient(
                target=target, session=session, model=model, tokens=options.tokens, slo=options.slo,
                seed=options.seed, isolated_s=isolated_s,
            )  # fmt: skip
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

    async def _load(self, client: LoadClient, workload: Workload, label: str) -> dict[str, Any]:
        options, facts = self._options, workload.facts
        if options.concurrency is None:
            window = MeasurementWindow.of_open_loop(facts.last_arrival_s, options.exclude_share)
        else:
            window = MeasurementWindow.of_closed_loop(facts.num_requests, options.exclude_share)
        measured = BenchMeasurement(options.classes, options.slo, window)
        with (
            (self._directory.path / "requests.jsonl").open("w", encoding="utf-8") as stream,
            tqdm(total=facts.num_requests, unit="request", desc=label, file=sys.stderr, dynamic_ncols=True) as bar,
        ):

            def note(sent: SentRequest) -> None:
                is_counted = measured.add(sent)
                row = self._directory.request_values(sent.outcome, options.classes, options.slo)
                row |= {"send_lag_s": round(sent.send_lag_s, 6), "is_counted": is_counted}
                stream.write(json.dumps(row) + "\n")
                bar.update()
                self._tracker.sample(
                    (sent.outcome.last_token_s or sent.outcome.request.arrival_s),
                    {f"{row['length_class']}.ttft_s": row["ttft_s"], f"{row['length_class']}.tpot_s": row["tpot_s"]},
                )

            if options.concurrency is None:
                await open_loop(client, workload.requests(), note, options.max_drain_s)
            else:
                await closed_loop(client, workload.requests(), options.concurrency, note)
        values = measured.values()
        table = summary_table(values) + measured.remarks()
        print(f"\n{table}")
        self._directory.finish(values, table)
        return values
