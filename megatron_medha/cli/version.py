"""`medha version`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.native_build import NativeUnavailable, usable_targets
from megatron_medha.system.compiled_core import use_compiled_core

USAGE = """\
usage: medha version

Prints the versions of this package, Megatron-core, torch and Python, whether the scheduler is compiled, and the
instruction sets that the CPU kernels can use here, the best first: model.instruction_set=auto takes that one. Then
which options the bits of outputs need to be the same at any parallel.tp.
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
    print(f"cpu instructions {_instruction_sets()}")
    print("same bits over parallel.tp with model.virtual_tp=auto (off by default)")
    return 0


def _instruction_sets() -> str:
    try:
        return ", ".join(usable_targets()).lower()
    except NativeUnavailable as error:
        return f"none ({error})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
