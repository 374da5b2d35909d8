"""Does the memory of a simulation stay flat over a simulated day?

    medha compile && python -m experiments.simulated_day.run    # without the first: interpreted

86,400 simulated seconds of the paper's mix on 16 A100 at 0.75 requests/s on average, by day more and by night less
(64,800 requests), with all that `medha simulate` writes: request rows and samples go to disk as they come. Answers are
a tenth as long as the mix's: it is requests that could pile up, and their tokens that take the time. Resident memory is
read every simulated hour.

Bar: from the third hour on, when caches are full, at most 1 MiB more per simulated hour. Known growth, counted in it:
the summary keeps 8 latencies of 8 bytes per request, of which percentiles are taken: 0.2 MiB per hour here.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from megatron_medha.options.compose import as_yaml, compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.run_directory import RunDirectory
from megatron_medha.sim.simulation import Simulation, StateSample

HOUR_S, WARM_HOURS, BAR_MIB = 3600.0, 2, 1.0
MIB = 1 << 20


def resident_bytes() -> int:
    """Of this process: what it has allocated. Pages of files, like its libraries, come and go as the system pleases."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> int:
    """Print memory by hour, figure and bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("overrides", nargs="*", help="options of medha simulate, as key=value")
    arguments = parser.parse_args()
    if arguments.hours < WARM_HOURS + 2:
        parser.error(f"--hours {arguments.hours:g}: memory is judged from hour {WARM_HOURS} on; take {WARM_HOURS + 2}")
    end_s = arguments.hours * HOUR_S
    overrides = [
        "model=llama3_8b", "hardware=a100_x16", "parallel.tp=8", "parallel.spp=2", "workload=medha_mix_01pct",
        "workload.qps=0.75", f"workload.duration_s={end_s}", "workload.arrivals=diurnal",
        f"workload.period_s={24 * HOUR_S}", "workload.amplitude=0.6", "workload.output_scale=0.1", *arguments.overrides,
    ]  # fmt: skip
    composed = compose("simulate", SimulateOptions, overrides)
    options = freeze(composed, SimulateOptions)
    config = simulation_config(options)
    hours: list[tuple[float, float]] = []  # simulated hour, MiB
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory.create(Path(scratch) / "run", as_yaml(composed, resolves=True), config.seed)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        simulation = Simulation(config)
        facts = simulation.workload.facts
        num_hours = round(arguments.hours)
        with (
            directory.recording(config, options.record, facts.last_arrival_s) as watchers,
            tqdm(total=num_hours, unit="hour") as bar,
        ):
            write = watchers.on_sample
            bar.write("hour     MiB")

            def look(sample: StateSample) -> None:
                write(sample)
                if sample.now_s >= HOUR_S * (len(hours) + 1):
                    gc.collect()
                    hours.append((sample.now_s / HOUR_S, resident_bytes() / MIB))
                    bar.write(f"{hours[-1][0]:4.1f}  {hours[-1][1]:6.1f}")
                    bar.update()

            watchers.on_sample = look
            result = simulation.run(watchers)
        took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        num_rows = sum(1 for _ in (directory.path / "requests.jsonl").open())
        num_bytes = sum(file.stat().st_size for file in directory.path.iterdir())
    print(
        f"{'compiled' if IS_COMPILED else 'interpreted'}: {facts.num_requests:,} requests, "
        f"{result.values['machine']['num_batches']:,} batches, {result.end_s:,.0f} "
        f"simulated seconds in {took_s:.0f} s ({took_cpu_s:.0f} s of CPU time, {result.end_s / took_cpu_s:,.0f} times "
        f"real time); {num_rows:,} rows, {num_bytes / MIB:.0f} MiB on disk"
    )
    settled = [point for point in hours if point[0] >= WARM_HOURS]
    growth_mib = slope(settled)
    is_met = growth_mib <= BAR_MIB and num_rows == facts.num_requests
    print(
        f"{growth_mib:+.2f} MiB per simulated hour from hour {WARM_HOURS} on; bar: at most {BAR_MIB:g}: "
        f"{'met' if is_met else 'missed'}"
    )
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
