"""One script for a machine with a GPU: checks every kernel, measures what is promised, prints it beside the bars.

    python tools/gpu_check.py                         # everything, 14 minutes at most; goes on from an earlier run
    python tools/gpu_check.py --list                  # the parts
    python tools/gpu_check.py --part attention,decode # some; results of others are kept
    python tools/gpu_check.py --again                 # also what is there already
    python tools/gpu_check.py --device cpu --tiny     # a rehearsal: every line of this runs, no figure means anything

The work is cut into cases of some seconds, the most valuable first. A process of its own computes them, one by one;
this one watches it. A case that fails costs its own rows; one that takes longer than it may, or takes the process with
it, costs them and a new start. Each case's rows go to a file of JSON lines as soon as they are there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkout import ROOT, use_checkout  # noqa: E402

_MINUTES = 14.0
_LATEST = ROOT / "experiments" / "gpu" / "latest.jsonl"


def main() -> int:
    """Run the cases; 1 if any of them failed, whatever the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="comma-separated; default: all")
    parser.add_argument("--list", action="store_true", help="print the parts and exit")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=f"when to stop (default {_MINUTES:g})")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--out", type=Path, help="default: $OUT/gpu_check.jsonl or experiments/gpu/latest.jsonl")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    use_checkout()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: full sizes would take days")
    from experiments.gpu import parts, watch
    from experiments.gpu.results import Results

    if arguments.list:
        for name, meaning in parts.PARTS.items():
            print(f"{name:<12}{meaning}")
        return 0
    wanted = list(parts.PARTS) if arguments.part is None else arguments.part.split(",")
    if unknown := [name for name in wanted if name not in parts.PARTS]:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(parts.PARTS)}")
    beside = Path(os.environ["OUT"]) / "gpu_check.jsonl" if "OUT" in os.environ else _LATEST
    path = arguments.out or beside
    earlier = [path] if arguments.tiny else [path, _LATEST]
    results = Results(path, earlier, is_rehearsal=arguments.tiny, forgets=wanted if arguments.again else [])
    command = [sys.executable, "-m", "experiments.gpu.worker", arguments.device, "tiny" if arguments.tiny else "full"]
    num_failed = watch.run(
        command, wanted, results, deadline_s=started_s + 60 * arguments.minutes, cwd=ROOT, started_s=started_s
    )
    print(f"--- {time.monotonic() - started_s:.0f} s; {num_failed} cases failed; {path}", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
