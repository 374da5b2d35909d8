"""Our server and its peers in turn, on one checkpoint and one load; a table and plots.

    python -m experiments.peers.run --only medha                    # ours alone, nothing to install
    python -m experiments.peers.run                                 # installs vLLM and llama.cpp first
    python -m experiments.peers.run --only medha,vllm-cap-64 --rounds 3 --rate 2.5 --requests 200
    python -m experiments.peers.run --long 16384-32768 --seeds 11,12

Each round starts every server once, one at a time, and gives it the same requests: lone prompts and decodes, then
a mixed stream with 95% short prompts (64-256 tokens) and 5% long ones. Peers are installed into --peers, with network,
about 4 GB, 10 minutes. Figures of a machine that does other work as well mean nothing; medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from pathlib import Path

from experiments.peers.checkpoint import make_checkpoint
from experiments.peers.load import mixed, mixed_stream, solo
from experiments.peers.servers import servers, started

DEFAULT_PEERS = Path.home() / ".cache" / "megatron_medha" / "peers"


def main() -> None:
    """Install, run the rounds, write results.json, table.md and the plots into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; default: one is made")
    parser.add_argument("--only", help="names, with commas; default: all")
    parser.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="where peers are installed")
    parser.add_argument("--out", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lengths", default="1024,8192,16384,32768", help="of lone prompts")
    parser.add_argument("--repeats", type=int, default=3, help="of each lone prompt and decode")
    parser.add_argument("--requests", type=int, default=100, help="of a mixed stream; 0: none")
    parser.add_argument("--rate", type=float, default=2.5, help="requests a second")
    parser.add_argument("--long", default="8192-16384", help="tokens of a long prompt, from-to")
    parser.add_argument("--seeds", default="11", help="a mixed stream for each")
    args = parser.parse_args()
    known = servers(args.threads)
    names = args.only.split(",") if args.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    low, _, high = args.long.partition("-")
    args.peers.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or args.peers / "random-small"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint)
    for name in names:
        known[name].install(args.peers, checkpoint.resolve())
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(args.rounds):
        for name in names:
            with started(known[name], args.peers, checkpoint.resolve()) as port:
                figures = asyncio.run(solo(port, [int(n) for n in args.lengths.split(",")], args.repeats, round_))
                for seed in [int(seed) for seed in args.seeds.split(",")] if args.requests else []:
                    arrivals = mixed_stream(args.requests, args.rate, (int(low), int(high or low)), seed)
                    of_stream = asyncio.run(mixed(port, arrivals, seed))
                    figures |= {f"{key}, seed {seed}": value for key, value in of_stream.items()}
            results[name].append(figures)
            print(f"round {round_ + 1} of {args.rounds}: {name} done", file=sys.stderr, flush=True)
            written = json.dumps({"arguments": vars(args), "results": results}, default=str)
            (args.out / "results.json").write_text(written)
    medians = {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    table = as_table(medians)
    (args.out / "table.md").write_text(table)
    print(table)
    plot(medians, args.out)


def as_table(medians: dict[str, dict[str, float]]) -> str:
    """One row a figure, one column a server."""
    lines = ["| | " + " | ".join(medians) + " |", "| --- |" + " --- |" * len(medians)]
    for key in next(iter(medians.values())):
        cells = (f"{value:,.0f}" if (value := figures[key]) >= 100 else f"{value:.3g}" for figures in medians.values())
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(medians: dict[str, dict[str, float]], out: Path) -> None:
    """Bars of each figure, the solo ones and the mixed ones on a page each."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install -e '.[plots]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(next(iter(medians.values())))
    pages = {
        "solo": [key for key in keys if key.startswith(("prefill", "decode"))],
        "mixed": [key for key in keys if "seed" in key],
    }
    for page, shown in pages.items():
        if not shown:
            continue
        figure, axes = pyplot.subplots(1, len(shown), figsize=(2.4 * len(shown), 3.2), squeeze=False)
        for axis, key in zip(axes[0], shown, strict=True):
            axis.bar(list(medians), [figures[key] for figures in medians.values()])
            axis.set_title(key, fontsize=8)
            axis.tick_params(axis="x", rotation=60, labelsize=7)
        figure.tight_layout()
        figure.savefig(out / f"{page}.png", dpi=120)
        print(f"{out / page}.png")


if __name__ == "__main__":
    main()
