"""Tables, verdicts and pictures from the cells there are: nothing here starts a server."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from experiments.lib.drawing import panels
from experiments.peers.plan import LONGS, LONGS_8K, LONGS_16K, mixed_load
from experiments.peers.results import Results, Verdict, head, line, number
from experiments.peers.turns import plot_turns, turn_lines, turn_verdicts

BAR_FROM_TOKENS = 1024           # shorter lone prompts are shown, and held to nothing
TBT_BAR_MS = 100.0
BETTER_THAN_DEFAULT = 10.0
LONGS_BAR = 2.0
# The better of both counts: without bf16 instructions vLLM may be faster in float32.
VLLM, VLLM_CAP_64 = ("vllm", "vllm-float32"), ("vllm-cap-64", "vllm-float32-cap-64")
DEFAULTS = ("vllm", "llama.cpp")
QUIET_OTHER_CORES = 0.15         # of others; beyond that a figure is marked


def verdicts(results: Results, ours: str) -> list[Verdict]:
    """Every bar that the cells there are can answer."""
    return [*_solo(results, ours), *_mixed(results, ours), *_longs(results, ours), *turn_verdicts(results, ours)]


def has_8_bit_weights(server: str) -> bool:
    """By its name."""
    return "int8" in server or "q8" in server


def _solo(results: Results, ours: str) -> Iterable[Verdict]:
    for load in [*results.loads("prefill"), *results.loads("decode")]:
        kind, _, size = load.partition("-")
        mine = results.rate(ours, load)
        peers = {
            name: rate
            for name in results.servers
            if not name.startswith("medha") and has_8_bit_weights(name) == has_8_bit_weights(ours)
            and (rate := results.rate(name, load)) is not None
        }  # fmt: skip
        if mine is None or not peers or (kind == "prefill" and int(size) < BAR_FROM_TOKENS):
            continue
        best = max(peers, key=lambda name: peers[name])
        what = f"lone prompt of {int(size):,} tokens" if kind == "prefill" else f"decode, batch {size}"
        yield Verdict(
            what, f"{mine:,.0f} tok/s", f"{peers[best]:,.0f} tok/s ({best}): {mine / peers[best]:.2f}x",
            mine >= peers[best],
        )  # fmt: skip


def _mixed(results: Results, ours: str) -> Iterable[Verdict]:
    for load in (mixed_load(LONGS_8K), mixed_load(LONGS_16K)):
        for seed in results.seeds(load):
            mine = results.row(ours, load, seed)
            if mine is None:
                continue
            where = f"{load}, seed {seed}: "
            capped = [row for name in VLLM_CAP_64 if (row := results.row(name, load, seed))]
            default = [row for name in VLLM if (row := results.row(name, load, seed))]
            p99_s, long_s, tokens = mine["short_ttft_p99_s"], mine["long_ttft_p50_s"], mine["total_tokens_per_s"]
            if capped:
                bar, name = min((row["short_ttft_p99_s"], row["server"]) for row in capped)
                yield Verdict(where + "short p99 TTFT", f"{p99_s:.3f} s", f"{bar:.3f} s ({name})", p99_s < bar)
            if default:
                bar, name = min((row["long_ttft_p50_s"], row["server"]) for row in default)
                yield Verdict(where + "long p50 TTFT", f"{long_s:.2f} s", f"{bar:.2f} s ({name})", long_s <= bar)
                bar, name = max((row["total_tokens_per_s"], row["server"]) for row in default)
                yield Verdict(where + "throughput", f"{tokens:,.0f} tok/s", f"{bar:,.0f} tok/s ({name})", tokens >= bar)
            tbt_ms = mine["short_tbt_p99_ms"]
            yield Verdict(where + "short TBT p99", f"{tbt_ms:.0f} ms", f"{TBT_BAR_MS:.0f} ms", tbt_ms < TBT_BAR_MS)
            for name in DEFAULTS:
                if other := results.row(name, load, seed):
                    factor = other["short_ttft_p99_s"] / p99_s
                    yield Verdict(
                        where + f"short p99 TTFT of {name} over ours", f"{factor:.1f}x",
                        f"{BETTER_THAN_DEFAULT:.0f}x", factor >= BETTER_THAN_DEFAULT,
                    )  # fmt: skip


def _longs(results: Results, ours: str) -> Iterable[Verdict]:
    for seed in results.seeds(LONGS[0]):
        one = results.row(ours, LONGS[0], seed)
        if one is None:
            continue
        for load in LONGS[1:]:
            if more := results.row(ours, load, seed):
                factor = more["short_ttft_p99_s"] / one["short_ttft_p99_s"]
                yield Verdict(
                    f"{load[6:]} longs at once, seed {seed}: short p99 TTFT over that of one",
                    f"{more['short_ttft_p99_s']:.3f} s: {factor:.2f}x", f"{LONGS_BAR:.0f}x", factor <= LONGS_BAR,
                )  # fmt: skip


def as_markdown(results: Results, ours: str) -> str:
    """All tables."""
    names = results.servers
    lines = [f"{one}\n" for one in results.settings()]
    lines += ["### Lone prompts and decodes, tokens/s (median)\n", head(["", *names])]
    for load in [*results.loads("prefill"), *results.loads("decode")]:
        lines.append(line([load, *(number(results.rate(name, load), 0) for name in names)]))
    columns = {
        "short TTFT p50, s": ("short_ttft_p50_s", 3), "p90": ("short_ttft_p90_s", 3), "p99": ("short_ttft_p99_s", 3),
        "long TTFT p50, s": ("long_ttft_p50_s", 2), "max": ("long_ttft_max_s", 2),
        "short TBT p99, ms": ("short_tbt_p99_ms", 0), "tokens/s": ("total_tokens_per_s", 0),
        "cores, server": ("server_cores", 2), "cores, others": ("other_cores", 2),
    }  # fmt: skip
    for load in [*results.loads("mixed"), *results.loads("longs"), *results.loads("beside")]:
        rate = next((row["rate_per_s"] for name in names for seed in results.seeds(load)
                     if (row := results.row(name, load, seed))), None)
        lines += [f"\n### {load}" + (f", {rate:.3g} requests/s" if rate else "") + "\n"]
        lines += [head(["server", "seed", *columns])]
        for seed in results.seeds(load):
            for name in names:
                if row := results.row(name, load, seed):
                    lines.append(line([name, str(seed), *(number(row[key], n) for key, n in columns.values())]))
    lines += turn_lines(results)
    lines += [f"\n### Bars ({ours})\n", head(["question", "figure", "bar", ""])]
    lines += [
        line([one.question, one.figure, one.bar, "kept" if one.is_kept else "**missed**"])
        for one in verdicts(results, ours)
    ]
    noisy = [row for row in results.rows() if row["other_cores"] > QUIET_OTHER_CORES]
    if noisy:
        worst = max(row["other_cores"] for row in noisy)
        lines.append(
            f"\nPROVISIONAL: beside {len(noisy)} of {len(results.rows())} cells other programs took more than "
            f"{QUIET_OTHER_CORES:g} cores (up to {worst:.2f})."
        )
    return "\n".join(lines) + "\n"


def write(results: Results, ours: str, out: Path) -> list[Verdict]:
    """table.md and the pictures into `out`."""
    (out / "table.md").write_text(as_markdown(results, ours))
    try:
        _plot(results, out)
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -e '.[plots]')", file=sys.stderr)
    return verdicts(results, ours)


def _plot(results: Results, out: Path) -> None:
    solo = [*results.loads("prefill"), *results.loads("decode")]
    colours = {name: f"C{index}" for index, name in enumerate(results.servers)}
    if solo:
        figure, axes = panels(columns=len(solo), width=2.1, height=3.4, squeeze=False)
        for axis, load in zip(axes[0], solo, strict=True):
            rates = {name: rate for name in results.servers if (rate := results.rate(name, load)) is not None}
            axis.bar(list(rates), list(rates.values()), color=[colours[name] for name in rates])
            axis.set_title(load + ", tokens/s", fontsize=8)
            axis.tick_params(axis="x", rotation=60, labelsize=7)
            axis.tick_params(axis="y", labelsize=7)
        figure.savefig(out / "solo.png", dpi=120)
    mixes = results.loads("mixed")
    if mixes:
        figure, axes = panels(columns=len(mixes), width=5.2, height=4.2, squeeze=False)
        for axis, load in zip(axes[0], mixes, strict=True):
            for name in results.servers:
                rows = [row for seed in results.seeds(load) if (row := results.row(name, load, seed))]
                if not rows:
                    continue
                xs, ys = [row["short_ttft_p99_s"] for row in rows], [row["long_ttft_p50_s"] for row in rows]
                axis.plot(xs, ys, "o", color=colours[name], label=name)
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("TTFT of short prompts, p99, s")
            axis.set_ylabel("TTFT of long prompts, p50, s")
            axis.set_title(f"{load}: left and down is better", fontsize=9)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        figure.savefig(out / "frontier.png", dpi=120)
    plot_turns(results, out)
