"""Decisions interpreted or compiled: the scheduler's own modules, translated to C by mypyc on request.

The Python text stays the only source. `medha compile` translates it into the user's cache, under a name made of
everything the result depends on; a process that wants it loads a build of exactly its own sources or interprets them.
So an edited scheduler is never shadowed by an older build, and removing the cache loses nothing but time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from megatron_medha.core.errors import DependencyError, MedhaError

# What runs at every step, in a simulated world too. Not those whose classes are read from options, messages and files
# field by field, or have subclasses elsewhere, which only classes made by Python allow.
MODULES = (
    "core.cost.kernel_costs", "core.cost.online_cost", "core.cost.step_cost", "core.kv.block_pool",
    "core.kv.block_table", "core.kv.kv_memory", "core.kv.shards", "core.loop", "core.scheduling.batch_builder",
    "core.scheduling.batch_committer", "core.scheduling.chunking", "core.scheduling.deadlines",
    "core.scheduling.kinetic_queue", "core.scheduling.kinetic_tournament", "core.scheduling.overdue",
    "core.scheduling.overtaking", "core.scheduling.policies", "core.scheduling.prefill_packer",
    "core.scheduling.prefill_queue", "core.scheduling.scheduler", "core.scheduling.step_budget", "sim.held_batches",
    "sim.pipeline", "sim.truth",
)  # fmt: skip
SWITCH = "MEDHA_COMPILED_CORE"  # environment; "0": interpret, whatever the cache holds
_PACKAGE = "megatron_medha"
_FLOORS = ("core", "sim", "stats", "system")  # where they stand, with all that they import of ours
_HERE = Path(__file__).parents[1]
_GROUP = "medha_core"
_SHARED = f"{_GROUP}__mypyc"  # the library with the code of all of them; each module is a file that points into it
_PREFIX = "core-"
_SUFFIX = EXTENSION_SUFFIXES[0]
_BUILD_TIMEOUT_S = 900.0
_MAX_BUILDS = 8  # that are kept, of 2 MB each; those of other sources or of another Python may be wanted again
_BUILD = f"""
import json, sys
from mypyc.build import mypycify
from setuptools import setup
files, optimisation = json.loads(sys.argv[1])
modules = mypycify(files, opt_level=optimisation, debug_level="0", group_name={_GROUP!r})
setup(name={_GROUP!r}, packages=[], ext_modules=modules, script_args=["build_ext", "--inplace"])
"""


class CompileError(MedhaError):
    """The modules could not be compiled; the message has the end of what the tools said."""


def user_cache() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME or ~/.cache. RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megatron_medha"


def compiled_directory() -> Path:
    """Where the build of the sources that stand here is, or would be."""
    digest = hashlib.sha256(repr((MODULES, _BUILD, sysconfig.get_platform(), sys.version_info[:2])).encode())
    for floor in _FLOORS:
        for source in sorted((_HERE / floor).rglob("*.py")):  # of all: compiled code knows the constants it has seen
            digest.update(f"{source.relative_to(_HERE)}\0".encode() + source.read_bytes() + b"\0")
    return user_cache() / f"{_PREFIX}{digest.hexdigest()[:16]}"


def use_compiled_core() -> bool:
    """From here on, load the compiled modules where there is a build of exactly these sources; whether there is one.

    To be called before anything else of core is loaded; afterwards it changes nothing.
    """
    if any(isinstance(finder, _CompiledCore) for finder in sys.meta_path):
        return True
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        if not any(user_cache().glob(f"{_PREFIX}*")):
            return False  # to read and digest the sources takes longer than this
        directory = compiled_directory()
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return False
    if not _library(directory, _SHARED).exists():
        return False
    if any(f"{_PACKAGE}.{name}" in sys.modules for name in MODULES):
        return False  # too late: half of core would be compiled
    sys.meta_path.insert(0, _CompiledCore(directory))
    return True


def compile_core(optimisation: str = "3") -> Path:
    """Build what use_compiled_core loads, unless it is there; its directory.

    Raises DependencyError without mypy, CompileError if a tool fails.
    """
    if find_spec("mypyc") is None:
        raise DependencyError("medha compile needs mypy's compiler: pip install 'megatron_medha[compile]'")
    try:
        directory = compiled_directory()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with open(directory.parent / "core.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                with tempfile.TemporaryDirectory(prefix="build-", dir=directory.parent) as place:
                    _build(Path(place), optimisation)
                    os.replace(_gathered(Path(place)), directory)  # whole or not at all
                _remove_oldest(directory.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise CompileError(f"nothing can be kept in the user's cache ({error}); set XDG_CACHE_HOME") from error
    return directory


def _gathered(place: Path) -> Path:
    """The libraries of a build, in a directory of their own."""
    built = place / "built"
    for name in (_SHARED, *(f"{_PACKAGE}.{name}" for name in MODULES)):
        target = _library(built, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(_library(place, name), target)
    return built


def _remove_oldest(cache: Path) -> None:
    oldest_first = sorted(cache.glob(f"{_PREFIX}*"), key=lambda one: one.stat().st_mtime_ns)
    for old in oldest_first[:-_MAX_BUILDS]:
        shutil.rmtree(old, ignore_errors=True)


def _library(directory: Path, name: str) -> Path:
    # Where mypyc puts it, below what it takes for the root, and where the module itself says it is (__file__).
    return directory / f"{name.replace('.', '/')}{_SUFFIX}"


def _build(place: Path, optimisation: str) -> None:
    for floor in _FLOORS:
        shutil.copytree(_HERE / floor, place / _PACKAGE / floor, ignore=shutil.ignore_patterns("__pycache__"))
    (place / _PACKAGE / "__init__.py").touch()
    files = [f"{_PACKAGE}/{name.replace('.', '/')}.py" for name in MODULES]
    command = [sys.executable, "-P", "-c", _BUILD, json.dumps([files, optimisation])]
    try:
        build = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompileError(f"the compiler took longer than {_BUILD_TIMEOUT_S:.0f} s") from None
    if build.returncode:
        raise CompileError(f"the compiler failed: {(build.stdout + build.stderr)[-2000:].strip()}")


class _CompiledCore(MetaPathFinder):
    """Finds the compiled modules before Python finds their sources."""

    def __init__(self, directory: Path) -> None:
        names = (_SHARED, *(f"{_PACKAGE}.{name}" for name in MODULES))
        self._files = {name: _library(directory, name) for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)
