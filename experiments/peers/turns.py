"""Tables, verdicts and the picture of sessions: hits, TTFT of turns, the same over a lone prefill of new tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from experiments.lib.drawing import panels
from experiments.lib.quantile import quantile
from experiments.peers.plan import LONGS_8K, mixed_load
from experiments.peers.results import Results, Verdict, head, line, number
from experiments.peers.sessions import LonePrefill

P50_BAR, P99_BAR = 1.2, 2.0      # of a turn's TTFT over a lone prefill of its new tokens
BESIDE_BAR = 1.25                # short p99 beside sessions over that without; medians over seeds, whose noise it is
BEST_VLLM = "vllm-cap-64-cached"

TurnRow = dict[str, float | None]   # a cell's figures, by the keys of _COLUMNS
_COLUMNS = {
    "hit rate, %": ("hit_percent", 1), "possible, %": ("possible_percent", 1),
    "turn TTFT p50, s": ("ttft_p50_s", 3), "p99, s": ("ttft_p99_s", 3),
    "over lone prefill of new tokens, p50": ("over_lone_p50", 2), "p99": ("over_lone_p99", 2),
    "tokens/s": ("total_tokens_per_s", 0), "output tokens/s": ("output_tokens_per_s", 1),
    "cores, server": ("server_cores", 2), "cores, others": ("other_cores", 2),
}  # fmt: skip


def lone_prefill(results: Results, server: str, seed: int) -> LonePrefill | None:
    """Of that server, from its lone prompts with this seed, or with all if there are fewer than three lengths."""
    cells = [(load, one) for load in results.loads("prefill") for one in results.of(server, load)]
    for chosen in ([(load, one) for load, one in cells if one["cell"]["seed"] == seed], cells):
        rates: dict[int, list[float]] = {}
        for load, one in chosen:
            rates.setdefault(int(load[8:]), []).extend(one["seen"]["rates"])
        if len(rates) >= 3:
            return LonePrefill.fitted({length: length / median(values) for length, values in rates.items()})
    return None


def over_lone(one: dict[str, Any], lone: LonePrefill) -> list[float]:
    """Of all turns but the first, TTFT over a lone prefill of its new tokens at its context."""
    return [
        turn["ttft_s"] / lone.seconds(turn["num_reusable_tokens"], turn["num_prompt_tokens"])
        for turn in one["seen"]["turns"] if turn["number"]
    ]  # fmt: skip


def turn_row(results: Results, server: str, load: str, seed: int) -> TurnRow | None:
    """A cell's figures, if it was measured."""
    one = next((one for one in results.of(server, load) if one["cell"]["seed"] == seed), None)
    if one is None or not one["seen"].get("turns"):
        return None
    turns = one["seen"]["turns"]
    num_prompt = sum(turn["num_prompt_tokens"] for turn in turns)
    # Some servers report hits only where there are any.
    cached = [turn["num_cached_tokens"] for turn in turns if turn["num_cached_tokens"] is not None]
    ttft_s = [turn["ttft_s"] for turn in turns if turn["number"]]
    lone = lone_prefill(results, server, seed)
    ratios = over_lone(one, lone) if lone else []
    took_s = one["seen"]["took_s"]
    return {
        "hit_percent": 100 * sum(cached) / num_prompt if cached else None,
        "possible_percent": 100 * sum(turn["num_reusable_tokens"] for turn in turns) / num_prompt,
        "ttft_p50_s": quantile(ttft_s, 0.5) if ttft_s else None,
        "ttft_p99_s": quantile(ttft_s, 0.99) if ttft_s else None,
        "over_lone_p50": quantile(ratios, 0.5) if ratios else None,
        "over_lone_p99": quantile(ratios, 0.99) if ratios else None,
        "total_tokens_per_s": (num_prompt + sum(turn["num_output_tokens"] for turn in turns)) / took_s,
        "output_tokens_per_s": sum(turn["num_output_tokens"] for turn in turns) / took_s,
        "server_cores": one["server_cores"],
        "other_cores": one["other_cores"],
    }


def turn_lines(results: Results) -> Iterable[str]:
    """A table for every load that has sessions."""
    for load in [*results.loads("sessions"), *results.loads("beside")]:
        thinks = {one["think_s"] for name in results.servers for one in results.of(name, load) if one.get("think_s")}
        pauses = f", mean pause {min(thinks):.3g} s" if thinks else ""
        yield f"\n### Turns of {load}{pauses}\n"
        yield head(["server", "seed", *_COLUMNS])
        for seed in results.seeds(load):
            for name in results.servers:
                if row := turn_row(results, name, load, seed):
                    yield line([name, str(seed), *(number(row[key], n) for key, n in _COLUMNS.values())])


def turn_verdicts(results: Results, ours: str) -> Iterable[Verdict]:
    """Every bar of sessions that the cells there are can answer."""
    for load in results.loads("sessions"):
        for seed in results.seeds(load):
            if mine := turn_row(results, ours, load, seed):
                others = {
                    name: row for name in results.servers
                    if not name.startswith("medha") and (row := turn_row(results, name, load, seed))
                }  # fmt: skip
                yield from _of_cell(f"{load}, seed {seed}: ", mine, others)
    yield from _beside(results, ours)


def _of_cell(where: str, mine: TurnRow, others: dict[str, TurnRow]) -> Iterable[Verdict]:
    for key, what, bar in (
        ("over_lone_p50", "turn TTFT p50 over lone prefill of new tokens", P50_BAR),
        ("over_lone_p99", "turn TTFT p99 over lone prefill of new tokens", P99_BAR),
    ):
        value = mine[key]
        if value is None:
            continue
        yield Verdict(where + what, f"{value:.2f}", f"{bar:g}", value <= bar)
        if peers := {name: peer for name, row in others.items() if (peer := row[key]) is not None}:
            best = min(peers, key=lambda name: peers[name])
            yield Verdict(where + what, f"{value:.2f}", f"{peers[best]:.2f} ({best})", value <= peers[best])
    if peers := {name: hits for name, row in others.items() if (hits := row["hit_percent"]) is not None}:
        best, value = max(peers, key=lambda name: peers[name]), mine["hit_percent"]
        figure = "not reported" if value is None else f"{value:.1f}%"
        yield Verdict(
            where + "hit rate", figure, f"{peers[best]:.1f}% ({best})", value is not None and value >= peers[best]
        )


def _beside(results: Results, ours: str) -> Iterable[Verdict]:
    stream = mixed_load(LONGS_8K)
    for load in results.loads("beside"):
        alone_s, beside_s = [], []
        for seed in results.seeds(load):
            alone, beside = results.row(ours, stream, seed), results.row(ours, load, seed)
            if alone and beside:
                alone_s.append(alone["short_ttft_p99_s"])
                beside_s.append(beside["short_ttft_p99_s"])
            if beside and (best := results.row(BEST_VLLM, load, seed)):
                yield Verdict(
                    f"{load}, seed {seed}: short p99 TTFT", f"{beside['short_ttft_p99_s']:.3f} s",
                    f"{best['short_ttft_p99_s']:.3f} s ({BEST_VLLM})",
                    beside["short_ttft_p99_s"] < best["short_ttft_p99_s"],
                )  # fmt: skip
        if alone_s:
            factor = median(beside_s) / median(alone_s)
            yield Verdict(
                f"{load}: short p99 TTFT over that of {stream} alone, medians of {len(alone_s)} seeds",
                f"{median(beside_s):.3f} s: {factor:.2f}x", f"{BESIDE_BAR:g}x", factor <= BESIDE_BAR,
            )  # fmt: skip


def plot_turns(results: Results, out: Path) -> None:
    """sessions.png: for every load the share of turns below a multiple of their lone prefill, with the bars."""
    loads = results.loads("sessions")
    if not loads:
        return
    figure, axes = panels(columns=len(loads), width=5.2, height=4.2, squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        for index, name in enumerate(results.servers):
            found: list[float] = []
            for one in results.of(name, load):
                if lone := lone_prefill(results, name, one["cell"]["seed"]):
                    found += over_lone(one, lone)
            if found:
                shares = [(place + 1) / len(found) for place in range(len(found))]
                axis.step(sorted(found), shares, where="post", color=f"C{index}", label=name)
        axis.axvline(P50_BAR, color="grey", linestyle=":", label=f"bar of p50, {P50_BAR:g}")
        axis.axvline(P99_BAR, color="grey", linestyle="--", label=f"bar of p99, {P99_BAR:g}")
        axis.axhline(0.5, color="grey", linewidth=0.5)
        axis.axhline(0.99, color="grey", linewidth=0.5)
        axis.set_xscale("log")
        axis.set_xlabel("TTFT of a turn over a lone prefill of its new tokens, same server")
        axis.set_ylabel("share of turns")
        axis.set_title(f"{load}: left is better", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out / "sessions.png", dpi=120)
