"""How long until a server listens, and until its model is ready: wall time, and CPU time of front and ranks.

    python -m experiments.start_time.run checkpoints/tiny
    python -m experiments.start_time.run checkpoints/tiny --checkout ../before    # in turn with another working copy

The first start is not counted: it leaves bytecode and built kernels behind. "Listening" and "ready"
are the server's own lines. What shares the machine lengthens wall time but hardly CPU time, so both are printed; the
bar is for the median wall time of the front. Exits with 1 if it is missed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from experiments.lib.process_stats import children, cpu_s
from experiments.lib.server_process import free_port

MAX_LISTENING_S = 1.5
THIS = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server."""

    listening_s: float       # since the process was started
    listening_cpu_s: float   # of the front until then
    ready_s: float
    front_cpu_s: float       # until ready
    ranks_cpu_s: float       # of all ranks, until ready


def main() -> int:
    """Measures; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("override", nargs="*", help="further options of medha serve, such as parallel.spp=2")
    parser.add_argument("--starts", type=int, default=5, help="counted starts (default 5)")
    parser.add_argument("--checkout", type=Path, help="another working copy with its .venv, started in turn with this")
    arguments = parser.parse_args()
    checkouts = [THIS] if arguments.checkout is None else [arguments.checkout.resolve(), THIS]
    overrides = [f"checkpoint={arguments.checkpoint.resolve()}", *arguments.override]
    starts: dict[Path, list[Start]] = {checkout: [] for checkout in checkouts}
    for number in tqdm(range(arguments.starts + 1), desc="starts", unit="start"):
        for checkout in checkouts:
            # One port for all: the options of another port are other options.
            start = start_once(checkout, overrides, port=PORT)
            if number:
                starts[checkout].append(start)
    for checkout in checkouts:
        print(f"{'this working copy' if checkout == THIS else checkout}, median of {arguments.starts} (least):")
        for name in Start.__slots__:
            values = [getattr(start, name) for start in starts[checkout]]
            print(f"  {name:18s} {median(values):6.2f} s  ({min(values):.2f} s)")
    listening_s = median(start.listening_s for start in starts[THIS])
    is_met = listening_s <= MAX_LISTENING_S
    print(f"listening after {listening_s:.2f} s, bar {MAX_LISTENING_S} s{'' if is_met else ', missed'}")
    return 0 if is_met else 1


def start_once(checkout: Path, overrides: list[str], port: int) -> Start:
    """Start a server, read what it says, end it."""
    python = sys.executable if checkout == THIS else str(checkout / ".venv" / "bin" / "python")
    command = [python, "-m", "megatron_medha", "serve", f"server.port={port}", *overrides]
    began_s = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=checkout)
    try:
        _wait_for(process, "listening on")
        listening_s, listening_cpu_s = time.monotonic() - began_s, cpu_s(process.pid)
        _wait_for(process, "ready after")
        ready_s, front_cpu_s = time.monotonic() - began_s, cpu_s(process.pid)
        ranks_cpu_s = sum(map(cpu_s, children(process.pid)))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return Start(listening_s, listening_cpu_s, ready_s, front_cpu_s, ranks_cpu_s)


def _wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(words):
            return
    raise SystemExit(f"the server ended with code {process.wait()} before it said {words!r}")


PORT = free_port()

if __name__ == "__main__":
    sys.exit(main())
