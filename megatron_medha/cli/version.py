"""`medha version`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_medha.core.errors import ConfigError
from megatron_medha.system.compiled_core import use_compiled_core

USAGE = """\
usage: medha version

Prints the versions of this package, Megatron-core, torch and Python, and whether the scheduler is compiled.
"""


def run(words: Sequence[str]) -> int:
    """Print the versions a bug report needs."""
    if list(words) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if words:
        raise ConfigError(f"{words[0]}: takes no arguments")
    for package in ("megatron_medha", "megatron-core", "torch"):
        print(f"{package} {_version(package)}")
    print(f"python {platform.python_version()}")
    print(f"decisions {'compiled' if use_compiled_core() else 'interpreted (medha compile makes them faster)'}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
