"""`medha compile`: translate the scheduler to C, for decisions in a third of the time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

from megatron_medha.core.errors import ConfigError
from megatron_medha.system.compiled_core import MODULES, SWITCH, compile_core, compiled_directory

_USUAL_S = 80  # on a 2-core server

USAGE = f"""\
usage: medha compile [--remove]

Compiles the scheduler's {len(MODULES)} modules with mypyc, once, in one to two minutes, into the user's cache
($XDG_CACHE_HOME or ~/.cache). From then on medha serve, simulate, plan and replay make the same decisions in a third of
the time. After an edit of the sources they run interpreted, until they are compiled again. Needs a C compiler and
`pip install 'megatron_medha[compile]'`.

  --remove   remove the build of these sources

environment:
  {SWITCH}=0   interpret the sources even if there is a build

examples:
  medha compile
  {SWITCH}=0 medha simulate    # the same results, slower
"""


def run(words: Sequence[str]) -> int:
    """Compile, or remove what was compiled."""
    if words and list(words) not in (["-h"], ["--help"], ["--remove"]):
        raise ConfigError(f"{words[0]}: medha compile takes --remove or nothing")
    if words and words[0] != "--remove":
        print(USAGE, end="")
        return 0
    try:
        directory = compiled_directory()
    except RuntimeError as error:
        raise ConfigError(f"there is no home directory to keep a build in ({error}); set XDG_CACHE_HOME") from None
    if words:
        is_there = directory.exists()
        shutil.rmtree(directory, ignore_errors=True)
        print(f"removed {directory}" if is_there else "these sources are not compiled")
        return 0
    if directory.exists():
        print(f"compiled already: {directory}")
        return 0
    began_s = time.monotonic()
    print(f"compiling, about {_USUAL_S} s on a server of two cores", flush=True)
    compile_core()
    print(f"compiled in {time.monotonic() - began_s:.0f} s: {directory}")
    return 0
