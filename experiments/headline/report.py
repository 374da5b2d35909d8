"""Tables and picture of the headline experiment, from the results of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.headline.systems import TITLES

OURS = "lars"
BASELINE = "loongserve_blocking"
CAPACITY_BAR = 5.7
BARS = (("p50", "all", 30.0), ("p90", "all", 174.0), ("p99", "all", 174.0))


def report(runs: dict[str, Any], capacities: dict[str, Any], minutes: int, folder: Path) -> int:
    """Print every table that the runs allow, draw the picture; 1 if a bar is missed."""
    for percent in ("5", "1", "0"):
        for qps in ("0.75", "0.25", "1.25"):
            for length in sorted({minutes, 60}):
                _table(runs, f"{percent}% {qps}/s {length}min")
    _plot(runs, f"5% 0.75/s {minutes}min", folder / "headline.png")
    num_missed = sum(_bars(runs, f"5% 0.75/s {length}min") for length in sorted({minutes, 60}))
    return 1 if num_missed + _capacities(capacities) else 0


def _capacities(capacities: dict[str, Any]) -> int:
    """Print them; 1 if the bar is missed."""
    if OURS not in capacities:
        return 0
    print("\n### Capacity: requests/s at which 90% of all meet their deadline, 5% long\n")
    print("| system | holds at | not at |")
    print("| --- | --- | --- |")
    for name, (low, high) in capacities.items():
        print(f"| {TITLES[name]} | {low:g} | {high:g} |")
    if BASELINE not in capacities:
        return 0
    # What holds for certain: ours carries its low, the baseline does not carry its high.
    factor = capacities[OURS][0] / capacities[BASELINE][1]
    print(f"\ncapacity: at least {factor:.2g} times {TITLES[BASELINE]}; bar {CAPACITY_BAR:g}: "
          f"{'met' if factor >= CAPACITY_BAR else 'MISSED'}")
    return int(factor < CAPACITY_BAR)


def _table(runs: dict[str, Any], case: str) -> None:
    present = [name for name in TITLES if f"{name} {case}" in runs]
    if not present:
        return
    print(f"\n### {case.replace('% ', '% long, ').replace('/s ', ' requests/s, ').replace('min', ' minutes')}\n")
    print("| system | short p50 | p90 | p99 | long p50 | p90 | p99 | all p50 | p90 | p99 | SLO short | long | all "
          "| TPOT p50 | p99 | no token |")
    print("|" + " --- |" * 16)
    for name in present:
        values = runs[f"{name} {case}"]
        cells = [TITLES[name]]
        for group in ("short", "long", "all"):
            if group in values:
                cells += [_seconds(values[group][f"ttft_p{percent}_s"]) for percent in (50, 90, 99)]
            else:
                cells += ["-"] * 3
        cells += [f"{100 * values[group]['attainment']:.0f}%" if group in values else "-"
                  for group in ("short", "long", "all")]
        cells += [f"{1000 * values['all'][f'tpot_p{percent}_s']:.0f} ms" for percent in (50, 99)]
        print("| " + " | ".join([*cells, str(values["num_without_token"])]) + " |")


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(runs: dict[str, Any], case: str) -> int:
    ours = runs.get(f"{OURS} {case}")
    if ours is None:
        return 0
    print(f"\n### How many times as long as {TITLES[OURS]} others take, {case}\n")
    print("| system | short p50 | p90 | p99 | long p50 | p90 | p99 | all p50 | p90 | p99 |")
    print("|" + " --- |" * 10)
    for name, title in TITLES.items():
        values = runs.get(f"{name} {case}")
        if values is not None and name != OURS:
            factors = [
                values[group][f"ttft_p{percent}_s"] / ours[group][f"ttft_p{percent}_s"]
                for group in ("short", "long", "all")
                for percent in (50, 90, 99)
            ]
            print(f"| {title} | " + " | ".join(f"{factor:.2g}" if factor < 10 else f"{factor:.0f}"
                                                for factor in factors) + " |")
    print()
    num_missed = 0
    against = runs.get(f"{BASELINE} {case}")
    for percent, group, bar in BARS if against is not None else ():
        factor = against[group][f"ttft_{percent}_s"] / ours[group][f"ttft_{percent}_s"]
        num_missed += factor < bar
        print(f"TTFT {percent}, {group}: {factor:.3g} times {TITLES[BASELINE]}; bar {bar:g}: "
              f"{'met' if factor >= bar else 'MISSED'}")
    return num_missed


def _plot(runs: dict[str, Any], case: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    present = [name for name in TITLES if f"{name} {case}" in runs]
    if not present:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.35 * len(present) + 1.6), sharey=True)
    for axis, group in zip(axes, ("short", "long"), strict=True):
        for row, name in enumerate(reversed(present)):
            values = runs[f"{name} {case}"][group]
            points = [values[f"ttft_p{percent}_s"] for percent in (50, 90, 99)]
            axis.plot(points, [row] * 3, color="0.75", zorder=1)
            for point, color in zip(points, ("#1f77b4", "#ff7f0e", "#d62728"), strict=True):
                axis.scatter([point], [row], color=color, zorder=2, s=22)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"TTFT of {group} prompts, s: p50 blue, p90 orange, p99 red")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(present)), [TITLES[name] for name in reversed(present)], fontsize=8)
    figure.suptitle(f"Llama-3 8B on 16 A100, simulated: {case}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
