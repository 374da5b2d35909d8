"""The picture of a plan: GPUs over load, and attainment over GPUs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medha.cli.reports.plots import COLOURS
from megatron_medha.cli.reports.report_pictures import (
    LINE_COLOURS,
    LINE_DASHES,
    LINE_MARKERS,
    drawing,
    note_line,
    save_picture,
)
from megatron_medha.options.plan_options import PlanOptions
from megatron_medha.sim.planning.load_plan import LoadPlan, attainment_intervals

_ALL_COLOUR = "#000000"


def plan_picture(options: PlanOptions, plans: Sequence[LoadPlan], out: Path) -> Path:
    """GPUs over load, where there are several loads, and attainment over GPUs at the highest; the path of the SVG.

    Where no layout can meet the SLO under any load: how long the longest prompt takes alone.
    """
    has_loads = len(plans) > 1
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(
            1, 2 if has_loads else 1, figsize=(8.4 if has_loads else 5.6, 3.4), layout="constrained", squeeze=False
        )
        if has_loads:
            _draw_gpus(axes[0][0], options, plans)
        drawn = [plan for plan in plans if plan.curve]
        if drawn:
            _draw_attainment(axes[0][-1], options, max(drawn, key=lambda plan: plan.qps))
        else:
            _draw_bounds(axes[0][-1], options, plans[0])
        return save_picture(figure, out / "plan")


def _draw_gpus(axes: Any, options: PlanOptions, plans: Sequence[LoadPlan]) -> None:
    ordered = sorted(plans, key=lambda plan: plan.qps)
    highest = options.hardware.num_devices
    for place, name in enumerate(ordered[0].best):
        found = [(plan.qps, one.trial.num_gpus) for plan in ordered if (one := plan.best.get(name)) is not None]
        missed = [plan.qps for plan in ordered if plan.best.get(name) is None]
        colour, marker = LINE_COLOURS[place % len(LINE_COLOURS)], LINE_MARKERS[place % len(LINE_MARKERS)]
        axes.plot(*(zip(*found, strict=True) if found else ([], [])), color=colour, marker=marker, label=name,
                  linestyle=LINE_DASHES[place % len(LINE_DASHES)])  # fmt: skip
        if missed:
            axes.plot(missed, [highest * 1.06] * len(missed), linestyle="", marker="x", color=colour,
                      markeredgewidth=2)  # fmt: skip
            axes.annotate("not met", (missed[-1], highest * 1.06), xytext=(-5, -3), textcoords="offset points",
                          ha="right", va="center", fontsize=8, color=colour)  # fmt: skip
    axes.axhline(highest, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel="offered load (requests/s)", ylabel=f"GPUs of {options.hardware.name}", ylim=(0, highest * 1.12),
             title="fewest GPUs that meet the SLO")  # fmt: skip
    axes.set_xticks([plan.qps for plan in ordered], [f"{plan.qps:g}" for plan in ordered])
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")


def _draw_attainment(axes: Any, options: PlanOptions, plan: LoadPlan) -> None:
    names = list(plan.best)
    for place, name in enumerate(names):
        points = [(one.trial.num_gpus, attainment_intervals(one, plan.window)) for one in plan.curve
                  if one.trial.name == name]  # fmt: skip
        for of_what in ("all", *plan.window.num_by_class):
            if of_what != "all" and len(plan.window.num_by_class) == 1:
                continue
            found = [(gpus, shares[of_what]) for gpus, shares in points if of_what in shares]
            if not found:
                continue
            bars = [[100 * (share - low) for _, (share, low, _) in found],
                    [100 * (high - share) for _, (share, _, high) in found]]  # fmt: skip
            axes.errorbar(
                [gpus for gpus, _ in found], [100 * share for _, (share, _, _) in found], yerr=bars, capsize=3,
                color=_ALL_COLOUR if of_what == "all" else COLOURS[of_what], linewidth=1.4,
                marker=LINE_MARKERS[place % len(LINE_MARKERS)], linestyle=LINE_DASHES[place % len(LINE_DASHES)],
                label=of_what if len(names) == 1 else f"{name}: {of_what}",
            )  # fmt: skip
    target = 100 * options.slo.attainment
    axes.axhline(target, color="#555555", linestyle="--", linewidth=1)
    note_line(axes, target, f"SLO\n{target:.3g}%")
    sizes = sorted({one.trial.num_gpus for one in plan.curve})
    axes.set_xticks(sizes)
    axes.set(xlabel=f"GPUs of {options.hardware.name}", ylabel="requests that meet the SLO (%)", ylim=(-3, 104),
             title=f"at {plan.qps:.3g} requests/s")  # fmt: skip
    axes.grid(alpha=0.25)
    if sizes:
        axes.legend(frameon=False, loc="lower right")


def _draw_bounds(axes: Any, options: PlanOptions, plan: LoadPlan) -> None:
    points = [(bound.trial.num_gpus, bound.longest_ttft_s) for bound in plan.bounds]
    least = {gpus: min(ttft_s for of_gpus, ttft_s in points if of_gpus == gpus) for gpus, _ in sorted(points)}
    axes.plot(*zip(*points, strict=True), "o", color="#bbbbbb", label="layouts")
    axes.plot(list(least), list(least.values()), color=LINE_COLOURS[0], marker="s", label="best layout")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(least), [str(gpus) for gpus in least])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    if options.slo.ttft_s is not None:
        axes.axhline(options.slo.ttft_s, color="#555555", linestyle="--", linewidth=1)
        note_line(axes, options.slo.ttft_s, f"slo.ttft_s\n{options.slo.ttft_s:g} s")
    axes.set(xlabel=f"GPUs of {options.hardware.name}", ylabel="TTFT (s)",
             title=f"a lone prompt of {plan.window.longest_prompt_tokens:,} tokens")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
