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
from megatron_medha.cli.reports.plan_table import (
    attainment_text,
    best_first,
    cost_text,
    gpus_text,
    interval_text,
    print_best,
    print_loads,
    print_search_size,
    print_verdicts,
    settings_text,
)
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.plan_options import Contender, PlanGoal, PlanOptions, PlanSearchSpace, candidates
from megatron_medha.sim.planning.candidate import (
    CandidateVerdict,
    PlanCandidate,
    at_rate,
    evaluate_candidate,
    isolated_bound,
)
from megatron_medha.sim.system import SystemKind
from megatron_medha.workload.workload import Workload

USAGE = f"""\
usage: medha plan [group=option] [key=value ...]

Simulates the layouts (tp, spp, kvp, replicas) that a cluster has GPUs and memory for, in parallel processes, under one
scheduler or several, and under other systems. Prints the fewest GPUs with which slo.attainment of all requests meet
their targets, or the highest load that all GPUs carry, and the cost of a request. Trials that cannot pass end early.

examples:
  medha plan model=llama3_8b hardware=a100_x16 workload=medha_mix_05pct workload.qps=0.25
  medha plan model=llama3_70b hardware=h100_x16 workload=medha_mix_00pct workload.qps=2 slo.ttft_s=1 slo.tpot_s=0.05
  medha plan workload.qps=0.1 each_class=true      # nine in ten of the long ones too, not only of all requests
  medha plan find=capacity hardware=a100_x8 workload=medha_mix_00pct schedulers=[lars,vllm_chunk_512]
  medha plan systems=[medha,loongserve] schedulers=[lars,fcfs] workload.qps=0.25 gpu_usd_per_h=2.5

flags:
{FLAGS}"""

_MAX_DOUBLINGS = 12
_MIN_SEARCH_S = 60.0  # that requests of a trace take to come, where its load is varied


def run(words: Sequence[str]) -> int:
    """Search; exit code 1 if nothing meets the targets."""
    options = read_options("plan", words, USAGE, lambda: PlanOptions)
    if options is None:
        return 0
    arguments = parse_arguments(words, command="plan")
    found = candidates(options, contenders(options, arguments.overrides, arguments.config_dir))
    print_search_size(options, found)
    if found.window.why_too_few:
        print("\ncannot say which layout meets the SLO:\n  " + "\n  ".join(found.window.why_too_few))
        return 1
    num_processes = options.num_processes or len(os.sched_getaffinity(0))
    with processes(num_processes) as pool:
        if not _is_possible(options, found, pool):
            return 1
        search = _cheapest if options.find is PlanGoal.CHEAPEST else _capacity
        return search(options, found, pool)


def _is_possible(options: PlanOptions, found: PlanSearchSpace, pool: ProcessPoolExecutor) -> bool:
    """Whether some layout might meet the SLO under a load that is small enough; prints how fast the best one is."""
    single = [trial for trial in found.trials if trial.dp == 1]
    with _bar(len(single), "layout") as bar:
        bounds = [bound for bound in run_all(pool, isolated_bound, single, bar.update) if bound is not None]
    if not bounds:
        return True
    fastest = min(bounds, key=lambda bound: (bound.longest_ttft_s, bound.trial.num_gpus))
    print(
        f"a lone prompt of {fastest.longest_prompt_tokens:,} tokens, the longest, takes {fastest.longest_ttft_s:.2f} s "
        f"on the best layout: {settings_text(fastest.trial)}"
    )
    if len(bounds) < len(single) or not all(bound.why for bound in bounds):
        return True
    best = min(bounds, key=lambda bound: (sum(bound.num_late.values()), bound.longest_ttft_s))
    print(
        f"\nno layout of {gpus_text(options.hardware.num_devices)} of {options.hardware.name} can meet the SLO for "
        f"{_asked(options)}, however small the load.\nOn the best, {settings_text(best.trial)}: {best.why}.\n"
        "Take faster hardware, a larger cluster or a looser slo"
    )
    return False


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


def _cheapest(options: PlanOptions, candidates: PlanSearchSpace, pool: ProcessPoolExecutor) -> int:
    """All candidates of a size at once, the smallest size first; a contender is done with the first that passes."""
    verdicts: list[CandidateVerdict] = []
    best: dict[str, CandidateVerdict] = {}
    trials = candidates.trials
    with _bar(len(trials)) as bar:
        for num_gpus, group in groupby(trials, key=lambda trial: trial.num_gpus):
            bar.set_postfix_str(f"{num_gpus} GPUs")
            of_size = list(group)
            tried = [trial for trial in of_size if trial.name not in best]
            bar.update(len(of_size) - len(tried))
            found = list(run_all(pool, evaluate_candidate, tried, bar.update))
            verdicts += found
            for verdict in best_first(verdict for verdict in found if verdict.passes):
                best.setdefault(verdict.trial.name, verdict)
    print_verdicts(verdicts)
    if not best:
        print(
            f"\nnone of {len(verdicts)} candidates meets the SLO for {_asked(options)}; "
            "take a larger cluster, less load (find=capacity says how much) or a looser slo"
        )
        return 1
    window = candidates.window
    qps = options.workload.qps or sum(window.num_by_class.values()) / max(window.seconds, 1.0)
    names = {trial.name for trial in trials}
    print_best(options, {name: (best[name].trial, qps) if name in best else None for name in sorted(names)})
    winner = min(best_first(best.values()), key=lambda verdict: verdict.trial.num_gpus)
    print(
        f"\n{gpus_text(winner.trial.num_gpus)} of {options.hardware.name}: {settings_text(winner.trial)}; "
        f"{attainment_text(winner)} meet the SLO; {_asked(options)} must\n"
        f"{interval_text(winner, window.num_by_class)}\n"
        f"{cost_text(options, winner.trial, qps)}"
    )
    assert winner.attainment_by_class is not None
    missed = [name for name, share in winner.attainment_by_class.items() if share < options.slo.attainment]
    if missed:
        print(f"{' and '.join(missed)} requests do not meet it, and are too few to change the overall share; "
              "each_class=true asks it of every class")  # fmt: skip
    return 0


def _asked(options: PlanOptions) -> str:
    return f"{options.slo.attainment:.0%} of {'each length class' if options.each_class else 'all requests'}"


def _capacity(options: PlanOptions, candidates: PlanSearchSpace, pool: ProcessPoolExecutor) -> int:
    """The largest load of every candidate that uses all GPUs it can, each searched in a process of its own."""
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
        print(f"\nno request rate meets the SLO for {_asked(options)}")
        return 1
    best: dict[str, tuple[PlanCandidate, float] | None] = {}
    for one in results:
        best.setdefault(one[0].name, one if one[1] else None)
    print_best(options, best)
    print(
        f"\n{qps:.3f} requests/s on {gpus_text(trial.num_gpus)} of {options.hardware.name}: {settings_text(trial)}\n"
        f"{cost_text(options, trial, qps)}"
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
