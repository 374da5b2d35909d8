"""Four requests explored in pieces: each call goes on where the last one has stopped.

    python tests/core/explore.py FILE [--states 1000000] [--seconds 240]

FILE is where it stands between two calls. The last one checks the bound on every wait, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from exploration import FOUR, Explorer
from explored_state import Bounds


def main() -> int:
    """0 once that many states are known, 1 while there is more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--states", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=240.0)
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # states are known by their hashes
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    explorer = Explorer(Bounds(FOUR))
    if arguments.file.exists():
        explorer.resume(arguments.file)
    is_whole = explorer.run(arguments.states, lambda line: print(line, flush=True), arguments.seconds)
    print(explorer.progress(), flush=True)
    if not is_whole and len(explorer.index_of) < arguments.states:
        explorer.save(arguments.file)
        return 1
    print(f"sound; at most {explorer.check_waits()} events to the end of all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
