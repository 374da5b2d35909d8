"""What `medha plan` prints: candidates, and the best of every contender with what it costs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from megatron_medha.options.plan_options import PlanOptions, PlanSearchSpace, can_be_served
from megatron_medha.sim.planning.candidate import CandidateVerdict, PlanCandidate
from megatron_medha.sim.planning.load_plan import LoadPlan
from megatron_medha.sim.planning.trial_window import MIN_PEAK_COVERED, TrialWindow
from megatron_medha.stats.capacity_search import wilson_interval
from megatron_medha.stats.text_table import number_text, percent_text, seconds_text, text_table

_MAX_ROWS = 30
_LAYOUT = ("GPUs", "tp", "spp", "kvp", "dp", "system")


def print_search_size(options: PlanOptions, found: PlanSearchSpace) -> None:
    """The size of the search, and why some of it cannot be."""
    name = found.trials[0].config.setup.shape.name
    left_out = f"; {len(found.impossible)} layouts do not fit" if found.impossible else ""
    print(
        f"{name} on up to {options.hardware.num_devices} GPUs of {options.hardware.name}: "
        f"{len(found.trials)} candidates{left_out}"
    )
    for layout, why in found.impossible[:3]:
        print(f"  tp={layout.tp} spp={layout.spp} kvp={layout.kvp}: {why}")
    if len(found.impossible) > 3:
        print(f"  and {len(found.impossible) - 3} more")
    window = found.window
    tried = " and ".join(f"{count:,} {name}" for name, count in window.num_by_class.items())
    print(f"each is given the same {window.seconds:,.0f} s of the workload: {tried} requests")
    for name in window.underrepresented:
        here = window.num_by_class.get(name, 0) / sum(window.num_by_class.values())
        print(f"  {here:.1%} of them are {name}, of the whole workload {window.whole_share_by_class[name]:.1%}; "
              "trial_s=null takes as many as it needs")  # fmt: skip
    if window.peak_covered < MIN_PEAK_COVERED and options.workload.path is not None:
        print(f"  their busiest minutes bring {window.peak_covered:.0%} of the tokens of the whole trace's busiest; "
              "trial_s=null takes as many as it needs")  # fmt: skip


def best_first(verdicts: Iterable[CandidateVerdict]) -> list[CandidateVerdict]:
    """Those that pass, then by share of requests that meet the SLO; of equals the one of fewer GPUs."""
    return sorted(
        verdicts,
        key=lambda verdict: (
            not verdict.passes, -(verdict.attainment or 0.0), verdict.trial.num_gpus, _layout_cells(verdict.trial),
        ),
    )  # fmt: skip


def print_verdicts(verdicts: Iterable[CandidateVerdict]) -> None:
    """All candidates that were tried at one load."""
    ordered = best_first(verdicts)
    has_hits = any(verdict.hit_rate for verdict in ordered)
    _print_table(
        [[*_layout_cells(verdict.trial), *_verdict_cells(verdict, has_hits)] for verdict in ordered],
        [*_LAYOUT, "meet SLO", "TTFT p90", "TPOT p90", "busy", *(["cached"] if has_hits else []), ""],
    )


def print_loads(results: Sequence[tuple[PlanCandidate, float]]) -> None:
    """All candidates with the load each carries, the largest first."""
    rows = [[*_layout_cells(trial), f"{qps:.3f}", f"{qps / trial.num_gpus:.4f}"] for trial, qps in results]
    _print_table(rows, [*_LAYOUT, "requests/s", "per GPU"])


def print_best(options: PlanOptions, best: Mapping[str, tuple[PlanCandidate, float] | None]) -> None:
    """What every contender needs at best (None: it cannot do it), the cheapest per request first."""
    if len(best) == 1:
        return
    found = [one for one in best.values() if one is not None]
    found.sort(key=lambda one: one[0].num_gpus / one[1])
    rows = [[*_layout_cells(trial), f"{qps:.3f}", *_cost_cells(options, trial, qps)] for trial, qps in found]
    rows += [["-", "-", "-", "-", "-", name, "-", "-", *(["-", "-"] if options.gpu_usd_per_h is not None else [])]
             for name, one in best.items() if one is None]  # fmt: skip
    prices = ["$/h", "$ per 1,000 requests"] if options.gpu_usd_per_h is not None else []
    print("\nat best:", end="")
    _print_table(rows, [*_LAYOUT, "requests/s", "GPU time per request", *prices])


def gpus_text(num_gpus: int) -> str:
    """So many GPUs."""
    return f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"


def cost_text(options: PlanOptions, trial: PlanCandidate, qps: float, window: TrialWindow) -> str:
    """What a request and a million tokens cost under this load."""
    cells = _cost_cells(options, trial, qps)
    text = f"{cells[0]} of GPU time per request"
    usd = usd_per_million_tokens(options, trial, qps, window)
    if usd is None:
        return text
    return (
        f"{text}; ${cells[1]} an hour, ${cells[2]} per 1,000 requests\n"
        f"${number_text(usd[0])} per million output tokens; ${number_text(usd[1])} per million tokens, prompts included"
    )


def usd_per_million_tokens(
    options: PlanOptions, trial: PlanCandidate, qps: float, window: TrialWindow
) -> tuple[float, float] | None:
    """Of output tokens alone, and of all; None if nobody said what a GPU costs."""
    if options.gpu_usd_per_h is None:
        return None
    usd_per_request = trial.num_gpus * options.gpu_usd_per_h / 3600.0 / qps
    num_requests = sum(window.num_by_class.values())
    usd = 1e6 * usd_per_request * num_requests
    return usd / window.num_output_tokens, usd / (window.num_prompt_tokens + window.num_output_tokens)


def asked_text(options: PlanOptions) -> str:
    """What has to meet the SLO."""
    return f"{options.slo.attainment:.0%} of {'each length class' if options.each_class else 'all requests'}"


def serve_command(trial: PlanCandidate, overrides: Sequence[str]) -> str | None:
    """The line that serves it; None for what only a simulation has.

    overrides: what was typed; the scheduler's and the cache's options belong to the server too.
    """
    if not can_be_served(trial):
        return None
    layout = trial.config.setup.layout
    degrees = {"tp": layout.tp, "spp": layout.spp, "kvp": layout.kvp, "dp": trial.dp}
    words = [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree > 1]
    words += [f"scheduler={trial.name}", *(word for word in overrides if word.startswith(("scheduler.", "kv.", "kv=")))]
    return shlex.join(["medha", "serve", "checkpoint=DIR", *words])


def print_loads_compared(plans: Sequence[LoadPlan]) -> None:
    """What every load needs at best."""
    rows = []
    for plan in plans:
        for name, found in plan.best.items():
            if found is None:
                rows.append([f"{plan.qps:g}", "-", "-", "-", "-", "-", name, "-"])
            else:
                rows.append([f"{plan.qps:g}", *_layout_cells(found.trial), attainment_text(found)])
    print("\nover load:", end="")
    _print_table(rows, ["requests/s", *_LAYOUT, "meet SLO"])


def attainment_text(verdict: CandidateVerdict) -> str:
    """The share of requests that meet the SLO, and that of every length class where there are several."""
    assert verdict.attainment is not None and verdict.attainment_by_class is not None
    by_class = ", ".join(f"{name} {share:.1%}" for name, share in verdict.attainment_by_class.items())
    return f"{verdict.attainment:.1%}" + (f" ({by_class})" if len(verdict.attainment_by_class) > 1 else "")


def interval_text(verdict: CandidateVerdict, num_by_class: Mapping[str, int]) -> str:
    """How far chance decides: the confidence interval of the share, of the worst class where each is asked for."""
    assert verdict.attainment is not None and verdict.attainment_by_class is not None
    share, count, what = verdict.attainment, sum(num_by_class.values()), "requests"
    if verdict.trial.each_class:
        name, share = min(verdict.attainment_by_class.items(), key=lambda item: item[1])
        count, what = num_by_class[name], f"{name} requests"
    low, high = wilson_interval(round(share * count), count)
    return f"95% confidence interval, from {count:,} {what}: {low:.1%} to {high:.1%}"


def settings_text(trial: PlanCandidate) -> str:
    """The overrides that make it."""
    layout = trial.config.setup.layout
    decides = "" if trial.config.instances is None else f"system={trial.name} "
    return (
        f"{decides}parallel.tp={layout.tp} parallel.spp={layout.spp} parallel.kvp={layout.kvp} on {trial.dp} "
        f"replica{'s' if trial.dp > 1 else ''}" + ("" if decides else f", scheduler={trial.name}")
    )


def _cost_cells(options: PlanOptions, trial: PlanCandidate, qps: float) -> list[str]:
    cells = [seconds_text(trial.num_gpus / qps)]
    if options.gpu_usd_per_h is not None:
        usd_per_h = trial.num_gpus * options.gpu_usd_per_h
        cells += [f"{usd_per_h:,.2f}", number_text(usd_per_h / 3.6 / qps)]
    return cells


def _layout_cells(trial: PlanCandidate) -> list[str]:
    layout = trial.config.setup.layout
    return [str(trial.num_gpus), str(layout.tp), str(layout.spp), str(layout.kvp), str(trial.dp), trial.name]


def _verdict_cells(verdict: CandidateVerdict, has_hits: bool) -> list[str]:
    hits = [percent_text(verdict.hit_rate)] if has_hits else []
    if verdict.attainment is None or verdict.ttft_p90_s is None:
        return ["-", "-", "-", "-", *hits, verdict.why]
    ttft = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in verdict.ttft_p90_s.items() if seconds is not None)
    tpot = "-" if verdict.tpot_p90_s is None else f"{verdict.tpot_p90_s * 1e3:.0f} ms"
    return [attainment_text(verdict), ttft, tpot, f"{verdict.utilisation or 0.0:.0%}", *hits, ""]


def _print_table(rows: list[list[str]], header: list[str]) -> None:
    left = () if header[-1] else (len(header) - 1,)  # the reason why a candidate was given up
    print("\n" + text_table([header, *rows[:_MAX_ROWS]], left), end="")
    if len(rows) > _MAX_ROWS:
        print(f"and {len(rows) - _MAX_ROWS} more")
