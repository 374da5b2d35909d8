"""`medha plan`: simulates layouts in parallel processes, and says which is the cheapest, or carries the most."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

from megatron_medha.commands.arguments import FLAGS, parse_arguments
from megatron_medha.commands.options_help import describe_options

if TYPE_CHECKING:
    from megatron_medha.plan_config import Candidates, PlanOptions
    from megatron_medha.sim.trial import Trial, Verdict

T = TypeVar("T")
R = TypeVar("R")

USAGE = f"""\
usage: medha plan [group=option] [key=value ...]

Simulates the layouts (tp, spp, kvp, replicas) that a cluster has GPUs and memory for, in parallel processes. Prints
the fewest GPUs with which slo.attainment of all requests meet their targets, or the most load that all GPUs carry.
Trials that cannot pass any more end early.

examples:
  medha plan model=llama3_8b hardware=a100_x16 workload=medha_mix_05pct workload.qps=0.25
  medha plan model=llama3_70b hardware=h100_x16 workload=medha_mix_00pct workload.qps=2 slo.ttft_s=1 slo.tpot_s=0.05
  medha plan find=capacity hardware=a100_x8 workload=medha_mix_00pct policies=[lars,fcfs]

flags:
{FLAGS}"""

_MAX_ROWS = 30
_MAX_DOUBLINGS = 12


def run(words: Sequence[str]) -> int:
    """Search; exit code 1 if nothing meets the targets."""
    arguments = parse_arguments(words)
    if arguments.wants_help:
        print(USAGE, describe_options("plan"), sep="\n", end="")
        return 0
    from megatron_medha.compose import as_yaml, compose, freeze
    from megatron_medha.plan_config import Find, PlanOptions, candidates

    composed = compose("plan", PlanOptions, arguments.overrides, arguments.config_dir)
    if arguments.shows_config:
        print(as_yaml(composed, arguments.resolves_config), end="")
        return 0
    options = freeze(composed, PlanOptions)
    found = candidates(options)
    _say_what_is_tried(options, found)
    num_processes = options.num_processes or len(os.sched_getaffinity(0))
    # Not forked: a child must not inherit what Hydra and the progress bar hold.
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        search = _cheapest if options.find is Find.CHEAPEST else _capacity
        return search(options, found.trials, pool)


def _cheapest(options: PlanOptions, trials: Sequence[Trial], pool: ProcessPoolExecutor) -> int:
    """All candidates of a size at once, the smallest size first; the first size of which one passes ends it."""
    from megatron_medha.sim.trial import judge

    verdicts: list[Verdict] = []
    winners: list[Verdict] = []
    with _bar(len(trials)) as bar:
        for num_gpus, group in groupby(trials, key=lambda trial: trial.num_gpus):
            bar.set_postfix_str(f"{num_gpus} GPUs")
            verdicts += _all(pool, judge, group, bar.update)
            winners = [verdict for verdict in verdicts if verdict.passes]
            if winners:
                break
    _print_table(
        [[*_layout_cells(verdict.trial), *_verdict_cells(verdict)] for verdict in _best_first(verdicts)],
        ["GPUs", "tp", "spp", "kvp", "dp", "policy", "meet SLO", "TTFT p90", "TPOT p90", "busy", ""],
    )
    if not winners:
        print(
            f"\nnone of {len(verdicts)} candidates meets the SLO for {options.slo.attainment:.0%} of the requests; "
            "take a larger cluster, less load (find=capacity says how much) or a looser slo"
        )
        return 1
    best = _best_first(winners)[0]
    layout = best.trial.config.setup.layout
    print(
        f"\n{best.trial.num_gpus} {options.hardware.name} GPUs: parallel.tp={layout.tp} parallel.spp={layout.spp} "
        f"parallel.kvp={layout.kvp} on {best.trial.dp} replica{'s' if best.trial.dp > 1 else ''}, "
        f"scheduler.policy={best.trial.config.setup.config.policy}; {best.attainment:.1%} meet the SLO "
        f"({options.slo.attainment:.0%} must)"
    )
    return 0


def _capacity(options: PlanOptions, trials: Sequence[Trial], pool: ProcessPoolExecutor) -> int:
    """The largest load of every candidate that uses all GPUs it can, each searched in a process of its own."""
    largest: dict[tuple[object, str], Trial] = {}
    for trial in trials:  # ascending: the last one of a layout has the most replicas
        largest[trial.config.setup.layout, trial.config.setup.config.policy] = trial
    chosen = list(largest.values())
    with _bar(len(chosen)) as bar:
        results = list(_all(pool, _Search(options.resolution), chosen, bar.update))
    results.sort(key=lambda result: -result[1])
    rows = [[*_layout_cells(trial), f"{qps:.3f}", f"{qps / trial.num_gpus:.4f}"] for trial, qps in results]
    _print_table(rows, ["GPUs", "tp", "spp", "kvp", "dp", "policy", "requests/s", "per GPU"])
    best, qps = results[0]
    if not qps:
        print(f"\nno load, however small, meets the SLO for {options.slo.attainment:.0%} of the requests")
        return 1
    layout = best.config.setup.layout
    print(
        f"\n{qps:.3f} requests/s on {best.num_gpus} GPUs of {options.hardware.name}: parallel.tp={layout.tp} "
        f"parallel.spp={layout.spp} parallel.kvp={layout.kvp} on {best.dp} replica{'s' if best.dp > 1 else ''}, "
        f"scheduler.policy={best.config.setup.config.policy}"
    )
    return 0


class _Search:
    """Doubles or halves the load until the verdict turns, then bisects; picklable."""

    def __init__(self, resolution: float) -> None:
        self._resolution = resolution

    def __call__(self, trial: Trial) -> tuple[Trial, float]:
        from megatron_medha.sim.trial import at_rate, judge

        assert trial.config.workload.qps is not None
        qps = trial.config.workload.qps * trial.dp
        passes = judge(at_rate(trial, qps)).passes
        low, high = (qps, None) if passes else (None, qps)
        for _ in range(_MAX_DOUBLINGS):
            if low is not None and high is not None:
                break
            qps = qps * 2.0 if high is None else qps / 2.0
            if judge(at_rate(trial, qps)).passes:
                low = qps
            else:
                high = qps
        if low is None or high is None:
            return trial, low or 0.0
        while high - low > self._resolution * low:
            qps = 0.5 * (low + high)
            if judge(at_rate(trial, qps)).passes:
                low = qps
            else:
                high = qps
        return trial, low


def _all(
    pool: ProcessPoolExecutor, work: Callable[[T], R], items: Iterable[T], advance: Callable[[], object]
) -> Iterator[R]:
    futures: list[Future[R]] = [pool.submit(work, item) for item in items]
    for future in as_completed(futures):
        advance()
        yield future.result()


def _best_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return sorted(
        verdicts,
        key=lambda verdict: (
            not verdict.passes, -(verdict.attainment or 0.0), verdict.trial.num_gpus, _layout_cells(verdict.trial),
        ),
    )  # fmt: skip


def _layout_cells(trial: Trial) -> list[str]:
    layout, policy = trial.config.setup.layout, trial.config.setup.config.policy
    return [str(trial.num_gpus), str(layout.tp), str(layout.spp), str(layout.kvp), str(trial.dp), policy]


def _verdict_cells(verdict: Verdict) -> list[str]:
    if verdict.attainment is None or verdict.ttft_p90_s is None:
        return ["-", "-", "-", "-", verdict.why]
    ttft = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in verdict.ttft_p90_s.items() if seconds is not None)
    tpot = "-" if verdict.tpot_p90_s is None else f"{verdict.tpot_p90_s * 1e3:.0f} ms"
    return [f"{verdict.attainment:.1%}", ttft, tpot, f"{verdict.utilisation or 0.0:.0%}", ""]


def _print_table(rows: list[list[str]], header: list[str]) -> None:
    left_out = len(rows) - _MAX_ROWS
    rows = [header, *rows[:_MAX_ROWS]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    print()
    for row in rows:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
    if left_out > 0:
        print(f"and {left_out} more")


def _say_what_is_tried(options: PlanOptions, found: Candidates) -> None:
    name = found.trials[0].config.setup.shape.name
    print(
        f"{name} on up to {options.hardware.num_devices} GPUs of {options.hardware.name}: "
        f"{len(found.trials)} candidates; {len(found.impossible)} layouts cannot be"
    )
    for layout, why in found.impossible[:3]:
        print(f"  tp={layout.tp} spp={layout.spp} kvp={layout.kvp}: {why}")
    if len(found.impossible) > 3:
        print(f"  and {len(found.impossible) - 3} more")


def _bar(total: int):  # type: ignore[no-untyped-def]  # tqdm has no types
    from tqdm import tqdm

    return tqdm(total=total, unit="candidate", file=sys.stderr, dynamic_ncols=True)
