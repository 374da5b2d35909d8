"""Our server and its peers in turn, on one checkpoint and one load; tables, verdicts and pictures.

    python -m experiments.peers.run --plan quick                # an hour on two quiet cores, what matters most first
    python -m experiments.peers.run --plan smoke --requests 20  # the same in small: does all of it run?
    python -m experiments.peers.run --plan full                 # two hours: more seeds, cap 128, llama.cpp -b 256
    python -m experiments.peers.run --report                    # tables and pictures from what there is
    python -m experiments.peers.run --only medha,vllm --skip longs
    python -m experiments.peers.run --only medha,medha-b30 --variant b30=scheduler.step_budget_s=0.03
    python -m experiments.peers.run --cells medha.longs-1.11,medha.longs-8.11,vllm.prefill-32768.13   # these alone

It makes a checkpoint of random weights (28 million parameters, bf16), installs vLLM's CPU build and llama.cpp's
llama-server into --peers (network, 5 GB, a C++ compiler and cmake, some 20 minutes, once), then starts one server at a
time and gives it its cells: lone prompts of 256 to 32K tokens, answers at batch 1 and 8, a mixed stream (19 of 20
prompts of 64 to 256 tokens, one of 8K to 16K or 16K to 32K), eight long prompts in waves of 1, 2, 4 and 8. Every cell
is a file under --out/cells: what was interrupted goes on when it is started again, and a cell is measured again once
its file is gone. A plan runs in order of importance, so it may be stopped at any time; --report shows what there is.

The rate of the mixed stream is the same for all: what keeps --rate-from (vLLM) busy 70% of the time by its own lone
prompts and decodes, measured in the same run. CPU seconds of server and of others are noted with every cell; where
others took more than 0.15 cores the table says PROVISIONAL. Ends with code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.lib.process_stats import machine_cpu_s, tree_cpu_s
from experiments.lib.random_llama import save_small_model
from experiments.lib.server_process import Server as Running
from experiments.peers import report
from experiments.peers.load import Endpoint, Load, Mixed, warm_up
from experiments.peers.plan import START_S, Cell, Sizes, Store, Visit, load_of, named_visits, plans
from experiments.peers.servers import Server, peer, servers


def main() -> None:
    """Install, run what is missing, report."""
    args = _parser().parse_args()
    # Ended from outside, servers end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the same command goes on from here"))
    sizes = Sizes(
        lengths=tuple(int(length) for length in args.lengths.split(",")),
        repeats=args.repeats,
        num_requests=args.requests,
        num_requests_16k=max(20, args.requests * 6 // 10),
        longs_tokens=args.longs_tokens,
        utilisation=args.utilisation,
    )
    known = servers(args.threads, args.medha, args.variant)
    wanted = args.only.split(",") if args.only else None
    if unknown := set(wanted or ()) - set(known):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    peers = args.peers or args.out / "installed"
    for directory in (peers, args.out):
        directory.mkdir(parents=True, exist_ok=True)
    store = Store(args.out / "cells")
    if not args.report:
        checkpoint = (args.checkpoint or peers / "random-small").resolve()
        planned = _with_variants(plans(sizes)[args.plan], known)
        visits = named_visits(args.cells.split(","), known) if args.cells else planned
        visits = [left for one in visits if (left := _left(one, wanted, args.skip, store))]
        if not (checkpoint / "config.json").exists():
            print("making the checkpoint", flush=True)
            save_small_model(checkpoint)
        for name in dict.fromkeys(one.server for one in visits):
            known[name].install(peers.resolve(), checkpoint)
        _run(visits, known, peers.resolve(), checkpoint, store, sizes, args)
    cells = store.read_all()
    if not cells:
        raise SystemExit(f"--report: there are no cells in {args.out / 'cells'} yet")
    results = report.Results(cells)
    found = report.write(results, args.judge, args.out)
    print((args.out / "table.md").read_text())
    print(f"tables and pictures are in {args.out}")
    sys.exit(0 if all(one.is_kept for one in found) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", choices=list(plans(Sizes())), default="quick", help="what is measured; default: %(default)s")
    add("--out", type=Path, default=Path("outputs/peers"), help="cells, logs, tables, pictures; default: %(default)s")
    add("--peers", type=Path, help="where peers are installed, and kept for the next run; default: OUT/installed")
    add("--checkpoint", type=Path, help="Hugging Face directory, for all; default: PEERS/random-small, made if missing")
    add("--only", help="servers of the plan, with commas; default: all of them")
    add("--cells", metavar="SERVER.LOAD.SEED,...", help="instead of a plan: these cells, each server started once")
    add("--skip", default="", help="cells whose names begin so, with commas: prefill-32768,longs")
    add("--report", action="store_true", help="run nothing: tables and pictures from the cells there are")
    add("--judge", default="medha", help="which of our servers is held to the bars; default: %(default)s")
    add("--medha", action="append", default=[], metavar="OVERRIDE", help="key=value of `medha serve`; again for more")
    add("--variant", action="append", default=[], metavar="NAME=OVERRIDE,...",
        help="our server once more, as medha-NAME, after every visit of medha; again for more")
    add("--threads", type=int, default=os.cpu_count() or 1, help="that every server computes with; default: all cores")
    add("--lengths", default="256,1024,8192,16384,32768", help="of lone prompts; default: %(default)s")
    add("--repeats", type=int, default=3, help="of decodes and of lone prompts up to 4096 tokens; default: %(default)s")
    add("--requests", type=int, default=100, help="of a mixed stream; six tenths with 16K-32K; default: %(default)s")
    add("--longs-tokens", type=int, default=Sizes().longs_tokens, help="of a prompt of longs-N; default: %(default)s")
    add("--rate", type=float, help="requests/s of mixed streams; default: from --utilisation")
    add("--utilisation", type=float, default=0.7, help="of --rate-from under the mixed stream; default: %(default)s")
    add("--rate-from", default="vllm", metavar="SERVER", help="whose lone cells it comes from; default: %(default)s")
    return parser


def _with_variants(visits: list[Visit], known: dict[str, Server]) -> list[Visit]:
    """After each visit of ours the same ones of our variants."""
    variants = [name for name in known if name.startswith("medha-")]
    found = []
    for one in visits:
        found.append(one)
        if one.server == "medha":
            found += [Visit(name, tuple(Cell(name, cell.load, cell.seed) for cell in one.cells)) for name in variants]
    return found


def _left(one: Visit, wanted: list[str] | None, skip: str, store: Store) -> Visit | None:
    """What of a visit is asked for and not done; None if nothing is."""
    if wanted and one.server not in wanted:
        return None
    prefixes = tuple(prefix for prefix in skip.split(",") if prefix)
    cells = tuple(cell for cell in one.cells if not store.has(cell) and not cell.load.startswith(prefixes))
    return Visit(one.server, cells) if cells else None


def _run(
    visits: list[Visit], known: dict[str, Server], peers: Path, checkpoint: Path, store: Store, sizes: Sizes,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    total_s = sum(one.expected_s for one in visits)
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}"
    with tqdm(total=total_s, bar_format=bar_format, dynamic_ncols=True) as bar:
        for one in visits:
            server = known[one.server]
            bar.set_postfix_str(f"starting {one.server}")
            with peer(server, peers, checkpoint, args.out / f"{one.server}.log") as (running, flags):
                endpoint = Endpoint(running.port, server.knows_priority)
                asyncio.run(warm_up(endpoint))
                bar.update(START_S)
                for cell in one.cells:
                    bar.set_postfix_str(f"{cell.server} {cell.load} seed {cell.seed}")
                    load = load_of(cell, sizes, store, args.rate, args.rate_from)
                    _measure(cell, load, endpoint, running, flags, store)
                    bar.update(cell.expected_s)


def _measure(
    cell: Cell, load: Load, endpoint: Endpoint, running: Running, flags: list[str], store: Store
) -> None:
    def seconds() -> tuple[float, float, float]:
        own = os.times()
        return tree_cpu_s(running.process.pid), own.user + own.system, machine_cpu_s()

    before, begun_s = seconds(), time.monotonic()
    seen = asyncio.run(load.run(endpoint, cell.seed))
    took_s = time.monotonic() - begun_s
    server_s, client_s, machine_s = (after - one for after, one in zip(seconds(), before, strict=True))
    about = {
        "flags": flags,
        "ready_after_s": running.ready_after_s,
        "took_s": took_s,
        "server_cpu_s": server_s,
        "server_cores": server_s / took_s,
        "client_cores": client_s / took_s,
        "other_cores": max(0.0, (machine_s - server_s - client_s) / took_s),
        "rate_per_s": load.rate if isinstance(load, Mixed) else None,
    }
    store.write(cell, seen, about)
    row = report.figures({"cell": {}, "seen": asdict(seen), **about})
    tqdm.write(f"{cell.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))


if __name__ == "__main__":
    main()
