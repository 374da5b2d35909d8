"""`medha plan`: simulates layouts and schedulers in parallel processes; says which is the cheapest, or carries most."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, groupby
from math import inf
from pathlib import Path

from tqdm import tqdm

from megatron_medha.cli.parts.arguments import FLAGS, parse_arguments
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.cli.parts.process_pool import processes, run_all
from megatron_medha.cli.reports.plan_files import check_plan_directory, write_plan
from megatron_medha.cli.reports.plan_table import (
    asked_text,
    attainment_text,
    best_first,
    cost_text,
    gpus_text,
    interval_text,
    print_best,
    print_loads,
    print_loads_compared,
    print_search_size,
    print_verdicts,
    serve_command,
    settings_text,
)
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.plan_options import Contender, PlanGoal, PlanOptions, PlanSearchSpace, candidates
from megatron_medha.sim.planning.candidate import (
    CandidateVerdict,
    IsolatedBound,
    PlanCandidate,
    at_rate,
    evaluate_candidate,
    isolated_bound,
)
from megatron_medha.sim.planning.load_plan import LoadPlan, best_of_sizes
from megatron_medha.sim.system import SystemKind
from megatron_medha.workload.workload import Workload

USAGE = f"""\
usage: medha plan [group=option] [key=value ...]

Simulates the layouts (tp, spp, kvp, replicas) that a cluster has GPUs and memory for, in parallel processes, under one
scheduler or several, and under other systems. Prints the fewest GPUs with which slo.attainment of all requests meet
their targets, or the highest load that all GPUs carry, and what that costs. Trials that cannot pass end early.

examples:
  medha plan model=llama3_8b hardware=a100_x16 workload=medha_mix_05pct workload.qps=0.25
  medha plan model=llama3_70b hardware=h100_x16 workload=medha_mix_00pct workload.qps=2 slo.ttft_s=1 slo.tpot_s=0.05
  medha plan workload=trace workload.path=trace.csv slo.ttft_s=2 out=plans/a     # at the trace's own rate; with files
  medha plan workload.qps=0.1,0.2,0.4 gpu_usd_per_h=2.5 out=plans/b              # GPUs over load
  medha plan workload.qps=0.1 each_class=true      # nine in ten of the long ones too, not only of all requests
  medha plan find=capacity hardware=a100_x8 workload=medha_mix_00pct schedulers=[lars,vllm_chunk_512]
  medha plan systems=[medha,loongserve] schedulers=[lars,fcfs] workload.qps=0.25 gpu_usd_per_h=2.5

flags:
{FLAGS}"""

_QPS = "workload.qps="
_MAX_DOUBLINGS = 12
_MIN_SEARCH_S = 60.0  # that requests of a trace take to come, where its load is varied


def run(words: Sequence[str]) -> int:
    """Search; exit code 1 if nothing meets the targets, under one of the loads."""
    of_loads = words_of_loads(words)
    read = [read_options("plan", one, USAGE, lambda: PlanOptions) for one in of_loads]
    found = [options for options in read if options is not None]
    if len(found) < len(read):
        return 0
    _check_outputs(found)
    plans: list[LoadPlan] = []
    with processes(found[0].num_processes or len(os.sched_getaffinity(0))) as pool:
        for options, one in zip(found, of_loads, strict=True):
            arguments = parse_arguments(one, command="plan")
            space = candidates(options, contenders(options, arguments.overrides, arguments.config_dir))
            if len(found) > 1:
                print(f"\n== {options.workload.qps:g} requests/s ==")
            print_search_size(options, space)
            if options.find is PlanGoal.CAPACITY:
                return _capacity(options, space, pool)
            plans.append(_cheapest(options, space, pool))
            _print_cheapest(options, plans[-1], arguments.overrides)
    if len(plans) > 1:
        print_loads_compared(plans)
    for path in write_plan(found[0], plans, words) if found[0].out is not None else ():
        print(path)
    return 0 if all(plan.winner for plan in plans) else 1


def _check_outputs(found: Sequence[PlanOptions]) -> None:
    """Raises ConfigError before the search for what cannot be shown or written after it."""
    options = found[0]
    if options.find is PlanGoal.CAPACITY and (len(found) > 1 or options.out is not None):
        key = "several loads in workload.qps" if len(found) > 1 else f"out={options.out}"
        raise ConfigError(f"find=capacity finds the load itself and takes no {key}; leave it out, or use find=cheapest")
    check_plan_directory(options.out)


def words_of_loads(words: Sequence[str]) -> list[list[str]]:
    """The words with one load each: workload.qps=1,2,4 stands for three plans."""
    listed = [word for word in words if word.startswith(_QPS) and "," in word]
    if not listed:
        return [list(words)]
    loads = [load.strip() for load in listed[-1].removeprefix(_QPS).strip("[]").split(",")]
    if len(set(loads)) < len(loads):
        raise ConfigError(f"{listed[-1]}: name each load once")
    return [[f"{_QPS}{load}" if word in listed else word for word in words] for load in loads]


def _bounds(space: PlanSearchSpace, pool: ProcessPoolExecutor) -> list[IsolatedBound]:
    """How long the longest prompt takes alone, on every layout on which that is known; prints the best."""
    single = [trial for trial in space.trials if trial.dp == 1]
    with _bar(len(single), "layout") as bar:
        bounds = [bound for bound in run_all(pool, isolated_bound, single, bar.update) if bound is not None]
    bounds.sort(key=lambda bound: (bound.longest_ttft_s, bound.trial.num_gpus))
    if bounds:
        print(
            f"a lone prompt of {bounds[0].longest_prompt_tokens:,} tokens, the longest, takes "
            f"{bounds[0].longest_ttft_s:.2f} s on the best layout: {settings_text(bounds[0].trial)}"
        )
    return bounds


def _why_impossible(options: PlanOptions, space: PlanSearchSpace, bounds: Sequence[IsolatedBound]) -> str:
    """Why no layout can meet the SLO under any load; empty if one might."""
    num_layouts = sum(trial.dp == 1 for trial in space.trials)
    if not bounds or len(bounds) < num_layouts or not all(bound.why for bound in bounds):
        return ""
    best = min(bounds, key=lambda bound: (sum(bound.num_late.values()), bound.longest_ttft_s))
    return (
        f"no layout of {gpus_text(options.hardware.num_devices)} of {options.hardware.name} can meet the SLO for "
        f"{asked_text(options)}, however small the load.\nOn the best, {settings_text(best.trial)}: {best.why}.\n"
        "Take faster hardware, a larger cluster or a looser slo"
    )


def contenders(options: PlanOptions, overrides: Sequence[str], config_dir: Path | None) -> list[Contender]:
    """Who is tried: every option of scheduler= that was named under our own system, and every other system."""
    def chosen(group: str, default: str) -> str:
        return next((word.partition("=")[2] for word in overrides if word.startswith(f"{group}=")), default)

    def with_options(**names: str) -> PlanOptions:
        words = [word for word in overrides if word.partition("=")[0] not in names]
        return freeze(compose("plan", PlanOptions, [*words, *(f"{group}={name}" for group, name in names.items())],
                              config_dir), PlanOptions)  # fmt: skip

    schedulers = options.schedulers or (chosen("scheduler", "lars"),)
    found: list[Contender] = []
    for system in options.systems or (chosen("system", "medha"),):
        own = with_options(system=system)
        if own.system.kind is SystemKind.MEDHA:
            for name in schedulers:
                scheduler = with_options(system=system, scheduler=name).scheduler
                found.append(Contender(name=name, system=own.system, scheduler=scheduler))
        else:
            found.append(Contender(name=system, system=own.system, scheduler=own.scheduler))
    if len({one.name for one in found}) < len(found):
        raise ConfigError(f"schedulers={list(schedulers)} systems={list(options.systems)}: name each one once")
    return found


def _cheapest(options: PlanOptions, space: PlanSearchSpace, pool: ProcessPoolExecutor) -> LoadPlan:
    """All candidates of a size at once, the smallest size first; a contender is done with the first that passes."""
    window, trials = space.window, space.trials
    qps = options.workload.qps or sum(window.num_by_class.values()) / max(window.seconds, 1.0)
    nothing: dict[str, CandidateVerdict | None] = dict.fromkeys(sorted({trial.name for trial in trials}))
    if window.why_too_few:
        why = "cannot say which layout meets the SLO:\n  " + "\n  ".join(window.why_too_few)
        return LoadPlan(qps=qps, window=window, best=nothing, why_none=why)
    bounds = _bounds(space, pool)
    if why := _why_impossible(options, space, bounds):
        return LoadPlan(qps=qps, window=window, bounds=bounds, best=nothing, why_none=why)
    verdicts: list[CandidateVerdict] = []
    best = dict(nothing)
    with _bar(len(trials)) as bar:
        for num_gpus, group in groupby(trials, key=lambda trial: trial.num_gpus):
            bar.set_postfix_str(f"{num_gpus} GPUs")
            of_size = list(group)
            tried = [trial for trial in of_size if best[trial.name] is None]
            bar.update(len(of_size) - len(tried))
            found = list(run_all(pool, evaluate_candidate, tried, bar.update))
            verdicts += found
            for verdict in best_first(verdict for verdict in found if verdict.passes):
                best[verdict.trial.name] = best[verdict.trial.name] or verdict
    why = "" if any(best.values()) else (
        f"none of {len(verdicts)} candidates meets the SLO for {asked_text(options)}; "
        "take a larger cluster, less load (find=capacity says how much) or a looser slo"
    )
    curve = _curve(best_of_sizes(verdicts, best), pool) if options.out is not None else []
    return LoadPlan(
        qps=qps, window=window, bounds=bounds, verdicts=verdicts, best=best, curve=curve, why_none=why
    )


def _curve(chosen: Sequence[CandidateVerdict], pool: ProcessPoolExecutor) -> list[CandidateVerdict]:
    """Those that ended early, run to their end: how far they are from passing."""
    cut = [verdict.trial for verdict in chosen if verdict.attainment is None]
    with _bar(len(cut), "curve point") as bar:
        whole = list(run_all(pool, partial(evaluate_candidate, runs_to_the_end=True), cut, bar.update))
    return sorted(
        [verdict for verdict in (*chosen, *whole) if verdict.attainment is not None],
        key=lambda verdict: (verdict.trial.name, verdict.trial.num_gpus),
    )


def _print_cheapest(options: PlanOptions, plan: LoadPlan, overrides: Sequence[str]) -> None:
    if plan.verdicts:
        print_verdicts(plan.verdicts)
    if plan.why_none:
        print(f"\n{plan.why_none}")
    winner = plan.winner
    if winner is None:
        return
    print_best(options, {
        name: None if found is None else (found.trial, plan.qps) for name, found in plan.best.items()
    })  # fmt: skip
    print(
        f"\n{gpus_text(winner.trial.num_gpus)} of {options.hardware.name}: {settings_text(winner.trial)}; "
        f"{attainment_text(winner)} meet the SLO; {asked_text(options)} must\n"
        f"{interval_text(winner, plan.window.num_by_class)}\n"
        f"{cost_text(options, winner.trial, plan.qps, plan.window)}"
    )
    assert winner.attainment_by_class is not None
    missed = [name for name, share in winner.attainment_by_class.items() if share < options.slo.attainment]
    if missed:
        print(f"{' and '.join(missed)} requests do not meet it, and are too few to change the overall share; "
              "each_class=true asks it of every class")  # fmt: skip
    if (command := serve_command(winner.trial, overrides)) is not None:
        print(f"\n  {command}")


def _capacity(options: PlanOptions, candidates: PlanSearchSpace, pool: ProcessPoolExecutor) -> int:
    """The largest load of every candidate that uses all GPUs it can, each searched in a process of its own."""
    if candidates.window.why_too_few:
        print("\ncannot say which layout meets the SLO:\n  " + "\n  ".join(candidates.window.why_too_few))
        return 1
    if why := _why_impossible(options, candidates, _bounds(candidates, pool)):
        print(f"\n{why}")
        return 1
    largest: dict[tuple[object, str], PlanCandidate] = {}
    for trial in candidates.trials:  # ascending: the last one of a layout has the most replicas
        largest[trial.config.setup.layout, trial.name] = trial
    chosen = list(largest.values())
    most_qps = _max_qps(options)
    with _bar(len(chosen)) as bar:
        search = partial(_largest_load, resolution=options.resolution, most_qps=most_qps)
        results = list(run_all(pool, search, chosen, bar.update))
    results.sort(key=lambda result: -result[1])
    print_loads(results)
    trial, qps = results[0]
    if not qps:
        print(f"\nno request rate meets the SLO for {asked_text(options)}")
        return 1
    best: dict[str, tuple[PlanCandidate, float] | None] = {}
    for one in results:
        best.setdefault(one[0].name, one if one[1] else None)
    print_best(options, best)
    print(
        f"\n{qps:.3f} requests/s on {gpus_text(trial.num_gpus)} of {options.hardware.name}: {settings_text(trial)}\n"
        f"{cost_text(options, trial, qps, candidates.window)}"
    )
    if 2.0 * qps > most_qps:
        print(
            f"It may carry more: at twice this load all requests of {options.workload.path} come within "
            f"{_MIN_SEARCH_S:g} s, which says nothing; take a longer trace"
        )
    return 0


def _max_qps(options: PlanOptions) -> float:
    """The largest load at which a trace lasts long enough to show that queues do not grow."""
    if options.workload.path is None:
        return inf
    return Workload(options.workload, options.seed).facts.num_requests / _MIN_SEARCH_S


def _largest_load(trial: PlanCandidate, resolution: float, most_qps: float) -> tuple[PlanCandidate, float]:
    """Doubles or halves the load until the verdict turns, then bisects. No load above most_qps is tried."""
    qps = trial.config.workload.qps
    assert qps is not None
    low, high = 0.0, inf  # passes; fails
    for place in count():
        if evaluate_candidate(at_rate(trial, qps)).passes:
            low = qps
        else:
            high = qps
        if low and high < inf:
            if high - low <= resolution * low:
                break
            qps = 0.5 * (low + high)
        elif place == _MAX_DOUBLINGS or 2.0 * low > most_qps:
            break
        else:
            qps = 2.0 * qps if low else 0.5 * qps
    return trial, low


def _bar(total: int, unit: str = "candidate"):  # type: ignore[no-untyped-def]  # tqdm has no types
    return tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)
