"""`medha simulate`: composes the configuration, runs the simulation with a progress bar, and writes a run directory."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_medha.cli.parts.arguments import SWEEP_FLAGS
from megatron_medha.cli.parts.command_options import directory_of, run_job_command
from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.cli.parts.wandb_run import WandbRun, check_wandb
from megatron_medha.cli.reports.plots import check_plots, plot
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.simulate_options import RequestsFormat, SimulateOptions, simulation_config
from megatron_medha.options.yaml_text import yaml_values
from megatron_medha.sim.run_directory import REQUESTS, RunDirectory
from megatron_medha.sim.simulation import Simulation, SimulationResult, StateSample
from megatron_medha.stats.summary import CLASSES
from megatron_medha.stats.summary_table import summary_table

USAGE = f"""\
usage: medha simulate [group=option] [key=value ...]
       medha simulate -m key=value,value ...

Runs the server's own scheduler in virtual time on a modelled cluster, under a random workload or a trace. Prints
latencies by length class, and writes requests, samples, plots and a Perfetto trace of the stages into a directory.
It needs no GPU and no checkpoint.

examples:
  medha simulate                                   # the Medha paper's traffic, ten minutes of it, on its 16 A100
  medha simulate system=loongserve                 # the same requests under LoongServe-like sequence parallelism
  medha simulate model=llama3_70b_1m hardware=h100 parallel.tp=8 parallel.spp=4 workload.qps=0.25 seed=1
  medha simulate scheduler=vllm_chunk_512 workload=medha_mix_01pct
  medha simulate parallel.spp=1 workload=trace workload.path=AzureLLMInferenceTrace_conv.csv workload.duration_s=600
  medha simulate workload=sessions workload.sessions.length_scale=0.1   # agent sessions, a closed loop
  medha simulate record=full out=runs/a && medha explain runs/a r17
  medha simulate -m system=medha,loongserve,static_cp out=multirun/systems
  medha simulate truth=noisy belief=online workload.arrivals=gamma workload.cv=3
  medha simulate -m scheduler=fcfs,edf,lars workload.qps=0.25,0.75 out=multirun/policies

flags:
{SWEEP_FLAGS}"""

_INSTALL_PARQUET = "pip install 'megatron_medha[parquet]'"


def run(words: Sequence[str]) -> int:
    """Simulate once, or for every combination."""
    return run_job_command("simulate", words, USAGE, SimulateOptions, simulate)


def simulate(options: SimulateOptions, composed_yaml: str, typed: JobWords) -> dict[str, Any]:
    """One simulation with its output; returns what is in summary.json."""
    config = simulation_config(options)
    _check_extras(options)
    simulation = Simulation(config)
    # The directory's own name is left out of what is in it: two runs of the same options are equal to the byte.
    directory = RunDirectory.create(
        directory_of(options.out, "simulate"), _without_out(composed_yaml), config.seed, typed.origin()
    )
    tracker = WandbRun(options.tracking, "simulate", yaml_values(composed_yaml), directory.path, typed.name)
    _print_run(options, simulation)
    began_s = time.perf_counter()
    try:
        result = _with_progress(simulation, directory, options, tracker)
    except BaseException:
        tracker.fail()
        raise
    took_s = time.perf_counter() - began_s
    table = summary_table(result.values)
    directory.finish(result.values, table)
    print(f"\n{table}")
    print(f"{result.end_s:,.0f} simulated seconds in {took_s:.1f} s, {result.end_s / took_s:,.0f} times real time")
    if options.requests is RequestsFormat.PARQUET:
        _write_parquet(directory.path)
    plot(options.plots, directory.path)
    print(f"results are in {directory.path}")
    tracker.finish(directory.path)
    return result.values


def _with_progress(
    simulation: Simulation, directory: RunDirectory, options: SimulateOptions, tracker: WandbRun
) -> SimulationResult:
    facts = simulation.workload.facts
    with (
        directory.recording(simulation.config, options.record, facts.last_arrival_s) as watchers,
        tqdm(total=facts.num_requests, unit="request", file=sys.stderr, dynamic_ncols=True) as bar,
    ):
        write_sample = watchers.on_sample

        def show(sample: object) -> None:
            assert isinstance(sample, StateSample)
            write_sample(sample)
            bar.set_postfix_str(
                f"simulated {sample.now_s:,.0f} s, {len(sample.waiting)} wait, {sample.num_decoding} decode",
                refresh=False,
            )
            bar.update(sample.num_ended - bar.n)
            slacks = {name: [one.relative_slack for one in sample.waiting if one.length_class == name]
                      for name in CLASSES}  # fmt: skip
            tracker.sample(
                sample.now_s,
                {
                    "num_waiting": len(sample.waiting),
                    "num_decoding": sample.num_decoding,
                    "num_ended": sample.num_ended,
                    "kv_used_share": sample.kv_used_share,
                    **{f"{name}.least_relative_slack": min(found) for name, found in slacks.items() if found},
                },
            )

        watchers.on_sample = show
        result = simulation.run(watchers)
        bar.update(facts.num_requests - bar.n)
    return result


def _print_run(options: SimulateOptions, simulation: Simulation) -> None:
    facts, layout, setup = simulation.workload.facts, options.parallel.replica, simulation.config.setup
    instances = simulation.config.instances
    if instances is None:
        kv_tokens = setup.num_blocks * setup.block_size * layout.kvp
        where = f"tp {layout.tp}, spp {layout.spp}, kvp {layout.kvp}"
        who = f"policy {setup.config.policy}"
    else:
        kv_tokens = instances.num_instances * instances.tokens_per_instance
        where = f"{instances.num_instances} instances of tp {instances.config.instance_tp}"
        who = f"system {instances.config.kind.value}, held to the deadlines of tp {layout.tp}, spp {layout.spp}, " \
            f"kvp {layout.kvp}"
    print(
        f"{setup.shape.name} on {layout.world_size} {setup.hardware.name} ({where}), KV for {kv_tokens:,} tokens, "
        f"{who}\n{simulation.workload}"
    )
    assert options.model.shape is not None
    if facts.max_request_tokens > options.model.shape.max_context_len:
        print(
            f"the longest request has {facts.max_request_tokens:,} tokens, more than the "
            f"{options.model.shape.max_context_len:,} that {setup.shape.name} was made for: "
            "simulated as if it had been extended"
        )


def _check_extras(options: SimulateOptions) -> None:
    """What is not installed is found out before the run, not after it."""
    check_plots(options.plots)
    check_wandb(options.tracking)
    if options.requests is RequestsFormat.PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"requests=parquet: pyarrow is not installed; {_INSTALL_PARQUET}, or requests=jsonl")


def _without_out(composed_yaml: str) -> str:
    return "".join(line for line in composed_yaml.splitlines(keepends=True) if not line.startswith("out:"))


def _write_parquet(run: Path) -> None:
    """Write requests.parquet beside requests.jsonl: the same rows and columns, typed alike in every run.

    A column in which a run has only nulls would have no type, and tables of several runs would not fit together: it is
    text for `why`, seconds otherwise.
    """
    import pyarrow
    from pyarrow import json, parquet

    table = json.read_json(run / REQUESTS)
    fields = [
        field.with_type(pyarrow.string() if field.name == "why" else pyarrow.float64())
        if pyarrow.types.is_null(field.type)
        else field
        for field in table.schema
    ]
    parquet.write_table(table.cast(pyarrow.schema(fields)), run / "requests.parquet")
