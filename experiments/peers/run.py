"""Our server and its peers in turn, on one checkpoint and one load; tables, verdicts and pictures.

    python -m experiments.peers.run --plan quick                # an hour on two quiet cores, what matters most first
    python -m experiments.peers.run --plan smoke --requests 20  # the same in small: does all of it run?
    python -m experiments.peers.run --plan full                 # two hours: more seeds, cap 128, llama.cpp -b 256
    python -m experiments.peers.run --report                    # tables and pictures from what there is
    python -m experiments.peers.run --only medha,vllm --skip longs
    python -m experiments.peers.run --only medha,medha-b30 --variant b30=scheduler.step_budget_s=0.03
    python -m experiments.peers.run --cells medha.longs-1.11,medha.longs-8.11,vllm.prefill-32768.13   # these alone
    python -m experiments.peers.run --plan sessions         # an hour and a half: sessions, and the stream beside them
    python -m experiments.peers.run --plan sessions-quick --requests 20 --repeats 1   # the same in small: five minutes
    python -m experiments.peers.run --plan lone --model 440m # half an hour: lone prompts and decodes of another model
    python -m experiments.peers.run --plan lone --model 440m --no-bf16     # without bf16 instructions, for all

It makes a checkpoint of random weights (28 million parameters, bf16; --model: others), installs vLLM's CPU build and
llama.cpp's llama-server into --peers (network, 5 GB, a C++ compiler and cmake, some 20 minutes, once), then starts one
server at a time and gives it its cells: lone prompts of 256 to 32K tokens, answers at batch 1 and 8, a mixed stream
(19 of 20 prompts of 64 to 256 tokens, one of 8K to 16K or 16K to 32K), eight long prompts in waves of 1, 2, 4 and 8,
sessions whose prompts grow by the server's own output and new tokens. Every cell is a file under --out/cells: what was
interrupted goes on when it is started again, and a cell is measured again once its file is gone. A plan runs in order
of importance, so it may be stopped at any time; --report shows what there is.

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

from experiments.lib.instruction_sets import instruction_sets
from experiments.lib.process_stats import machine_cpu_s, tree_cpu_s
from experiments.lib.server_process import Server as Running
from experiments.peers import report
from experiments.peers.load import Endpoint, Mixed, warm_up
from experiments.peers.models import MODELS, SMALL
from experiments.peers.plan import START_S, Cell, Load, Sizes, Visit, load_of, named_visits, plans
from experiments.peers.results import Results, figures
from experiments.peers.servers import Server, peer, servers
from experiments.peers.sessions import BesideSessions, Sessions
from experiments.peers.store import Store


def main() -> None:
    """Install, run what is missing, report."""
    args = _parser().parse_args()
    # Ended from outside, servers end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the same command goes on from here"))
    model = MODELS[args.model]
    args.out = args.out or Path("outputs/peers" if model is SMALL and not args.no_bf16 else
                                f"outputs/peers-{model.name}{'-no-bf16' if args.no_bf16 else ''}")  # fmt: skip
    sizes = Sizes(
        lengths=tuple(int(length) for length in args.lengths.split(",")) if args.lengths else model.lengths,
        repeats=args.repeats,
        num_requests=args.requests,
        num_requests_16k=max(20, args.requests * 6 // 10),
        longs_tokens=args.longs_tokens,
        utilisation=args.utilisation,
        session_context=args.session_context,
    )
    known = servers(args.threads, args.medha, args.variant, model=model, with_bf16=not args.no_bf16)
    wanted = args.only.split(",") if args.only else None
    if unknown := set(wanted or ()) - set(known):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for directory in (args.peers, args.out):
        directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(args.checkpoint or model.name),
        "instruction_sets": " ".join(instruction_sets(with_bf16=not args.no_bf16)),
    }
    store = Store(args.out / "cells")
    if not args.report:
        _refuse_other_settings(store, settings, args.out)
        checkpoint = (args.checkpoint or args.peers / f"random-{model.name}").resolve()
        planned = _with_variants(plans(sizes)[args.plan], known)
        visits = named_visits(args.cells.split(","), known) if args.cells else planned
        visits = [left for one in visits if (left := _left(one, wanted, args.skip, store))]
        if not (checkpoint / "config.json").exists():
            print("making the checkpoint", flush=True)
            model.save(checkpoint)
        for name in dict.fromkeys(one.server for one in visits):
            known[name].install(args.peers.resolve(), checkpoint)
        if args.install:
            return
        _run(visits, known, checkpoint, store, sizes, settings, args)
    cells = store.read_all()
    if not cells:
        raise SystemExit(f"--report: there are no cells in {args.out / 'cells'} yet")
    results = Results(cells)
    found = report.write(results, args.judge, args.out)
    print((args.out / "table.md").read_text())
    print(f"tables and pictures are in {args.out}")
    sys.exit(0 if all(one.is_kept for one in found) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", choices=list(plans(Sizes())), default="quick", help="what is measured; default: %(default)s")
    add("--out", type=Path, help="cells, logs, tables, pictures; default: outputs/peers, or outputs/peers-MODEL")
    add("--peers", type=Path, default=Path("outputs/peers/installed"), help="where peers are; default: %(default)s")
    add("--install", action="store_true", help="install the servers of the plan, convert the checkpoint, and end")
    add("--model", choices=list(MODELS), default=SMALL.name, help="shape, and memory for it; default: %(default)s")
    add("--checkpoint", type=Path, help="Hugging Face directory, for all; default: PEERS/random-MODEL, made if missing")
    add("--no-bf16", action="store_true", help="switch the CPU's bf16 instructions and tiles off in all servers")
    add("--only", help="servers of the plan, with commas; default: all of them")
    add("--cells", metavar="SERVER.LOAD.SEED,...", help="instead of a plan: these cells, each server started once")
    add("--skip", default="", help="cells whose names begin so, with commas: prefill-32768,longs")
    add("--report", action="store_true", help="run nothing: tables and pictures from the cells there are")
    add("--judge", default="medha", help="which of our servers is held to the bars; default: %(default)s")
    add("--medha", action="append", default=[], metavar="OVERRIDE", help="key=value of `medha serve`; again for more")
    add("--variant", action="append", default=[], metavar="NAME=OVERRIDE,...",
        help="our server once more, as medha-NAME, after every visit of medha; again for more")
    add("--threads", type=int, default=os.cpu_count() or 1, help="that every server computes with; default: all cores")
    add("--lengths", help="of lone prompts, with commas; default: the model's")
    add("--repeats", type=int, default=3, help="of decodes and of lone prompts up to 4096 tokens; default: %(default)s")
    add("--requests", type=int, default=100, help="of a mixed stream; six tenths with 16K-32K; default: %(default)s")
    add("--longs-tokens", type=int, default=Sizes().longs_tokens, help="of a prompt of longs-N; default: %(default)s")
    add("--rate", type=float, help="requests/s of mixed streams; default: from --utilisation")
    add("--utilisation", type=float, default=0.7, help="of --rate-from under the mixed stream; default: %(default)s")
    add("--rate-from", default="vllm", metavar="SERVER", help="whose lone cells it comes from; default: %(default)s")
    add("--session-context", type=int, default=Sizes().session_context,
        help="that sessions of the plan grow to, a turn for each 1024 tokens; default: %(default)s")
    add("--think", type=float, metavar="SECONDS", help="mean pause of sessions; default: --rate-from is half busy")
    return parser


def _refuse_other_settings(store: Store, settings: dict[str, str], out: Path) -> None:
    """Cells of another model or CPU are no part of this run."""
    for one in store.read_all():
        for key, value in settings.items():
            if one.get(key, value) != value:
                raise SystemExit(f"--out {out} has cells with {key} {one[key]}, not {value}; give another --out")


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
    visits: list[Visit], known: dict[str, Server], checkpoint: Path, store: Store, sizes: Sizes,
    settings: dict[str, str], args: argparse.Namespace,
) -> None:  # fmt: skip
    total_s = sum(one.expected_s for one in visits)
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}"
    with tqdm(total=total_s, bar_format=bar_format, dynamic_ncols=True) as bar:
        for one in visits:
            server = known[one.server]
            bar.set_postfix_str(f"starting {one.server}")
            log = args.out / f"{one.server}.log"
            with peer(server, args.peers.resolve(), checkpoint, log) as (running, flags):
                endpoint = Endpoint(running.port, server.knows_priority)
                asyncio.run(warm_up(endpoint, server.warm_up_tokens))
                bar.update(START_S)
                for cell in one.cells:
                    bar.set_postfix_str(f"{cell.server} {cell.load} seed {cell.seed}")
                    load = load_of(cell, sizes, store, args.rate, args.rate_from, args.think)
                    _measure(cell, load, endpoint, running, {"flags": flags, **settings}, store)
                    bar.update(cell.expected_s)


def _measure(
    cell: Cell, load: Load, endpoint: Endpoint, running: Running, settings: dict[str, object], store: Store
) -> None:
    def seconds() -> tuple[float, float, float]:
        own = os.times()
        return tree_cpu_s(running.process.pid), own.user + own.system, machine_cpu_s()

    before, begun_s = seconds(), time.monotonic()
    seen = asyncio.run(load.run(endpoint, cell.seed))
    took_s = time.monotonic() - begun_s
    server_s, client_s, machine_s = (after - one for after, one in zip(seconds(), before, strict=True))
    about = {
        **settings,
        "ready_after_s": running.ready_after_s,
        "took_s": took_s,
        "server_cpu_s": server_s,
        "server_cores": server_s / took_s,
        "client_cores": client_s / took_s,
        "other_cores": max(0.0, (machine_s - server_s - client_s) / took_s),
        "rate_per_s": load.rate if isinstance(load, (Mixed, BesideSessions)) else None,
        "think_s": _think_s(load),
    }
    store.write(cell, seen, about)
    row = figures({"cell": {}, "seen": asdict(seen), **about})
    tqdm.write(f"{cell.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))


def _think_s(load: Load) -> float | None:
    sessions = load.sessions if isinstance(load, BesideSessions) else load
    return sessions.think_s if isinstance(sessions, Sessions) else None


if __name__ == "__main__":
    main()
