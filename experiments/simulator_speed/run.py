"""How much faster than real time is the simulator? One hour of the paper's mix on 16 A100s, on one core.

    medha compile && python -m experiments.simulator_speed.run    # without the first: interpreted

Bar: 300 times real time in CPU time of this process, workload and deadlines included; goal: 1,000. A second run with
a stop watch around the scheduler says how much of the time is its own: it is the very object that serves, and a
simulation cannot be faster than its decisions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from megatron_medha.system.compiled_core import use_compiled_core

IS_COMPILED = use_compiled_core()

from megatron_medha.core.batch import Batch, Event, Output
from megatron_medha.core.ports import SchedulerProtocol
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.simulation import Simulation, SimulationHooks
from megatron_medha.sim.system import build_system

BAR, GOAL = 300.0, 1000.0


@dataclass(slots=True)
class TimedDecisions:
    """A system with a stop watch."""

    system: SchedulerProtocol
    seconds: float = 0.0
    num_calls: int = 0

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See Decisions."""
        began_s = time.perf_counter()
        outputs = self.system.handle(event, now_s)
        self.seconds += time.perf_counter() - began_s
        self.num_calls += 1
        return outputs

    def schedule(self, now_s: float) -> Batch | None:
        """See Decisions."""
        began_s = time.perf_counter()
        batch = self.system.schedule(now_s)
        self.seconds += time.perf_counter() - began_s
        self.num_calls += 1
        return batch


def watch_s() -> float:
    """What a pair of looks at the clock adds to a timed call."""
    began_s = time.perf_counter()
    for _ in range(100_000):
        time.perf_counter()
    return (time.perf_counter() - began_s) / 100_000


def main() -> int:
    """Print figure and bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the workload")
    parser.add_argument("--qps", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts: others share the machine")
    parser.add_argument("overrides", nargs="*", help="options of medha simulate, as key=value")
    arguments = parser.parse_args()
    overrides = [
        "model=llama3_8b", "hardware=a100_x16", "parallel.tp=8", "parallel.spp=2", "workload=medha_mix_05pct",
        f"workload.qps={arguments.qps}", f"workload.duration_s={arguments.seconds}", *arguments.overrides,
    ]  # fmt: skip
    config = simulation_config(freeze(compose("simulate", SimulateOptions, overrides), SimulateOptions))
    best_s, num_batches, end_s = float("inf"), 0, 0.0
    for _ in range(arguments.repeats):
        began_s = time.process_time()
        result = Simulation(config).run(SimulationHooks())
        best_s = min(best_s, time.process_time() - began_s)
        num_batches, end_s = result.values["machine"]["num_batches"], result.end_s
    timed = TimedDecisions(build_system(config.setup))
    began_s = time.perf_counter()
    Simulation(config).run(SimulationHooks(), timed)
    whole_s = time.perf_counter() - began_s
    share = (timed.seconds - timed.num_calls * watch_s()) / whole_s
    speed = end_s / best_s
    print("compiled" if IS_COMPILED else "interpreted")
    print(
        f"{end_s:,.0f} simulated seconds, {num_batches:,} batches ({num_batches / end_s:.0f} a second) in {best_s:.1f} "
        f"s of CPU time, best of {arguments.repeats}: {best_s / num_batches * 1e6:.0f} us a batch\n"
        f"{speed:,.0f} times real time; bar {BAR:,.0f}: {'met' if speed >= BAR else 'missed'}; goal {GOAL:,.0f}: "
        f"{'met' if speed >= GOAL else 'missed'}\n"
        f"{100 * share:.0f}% of the time is the scheduler's own: with a world that took no time, "
        f"{speed / share:,.0f} times real time"
    )
    return 0 if speed >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
