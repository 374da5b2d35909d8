"""Builds and loads the C++ library of attention and linear layers: on first use, into the user's cache.

On first use rather than at install: it takes a few seconds once, links to nothing but the C++ runtime (tensors come as
data pointers through ctypes, so no torch headers and no rebuild when torch changes), and an environment that was
installed on one machine may run on another. A machine without a compiler loses the kernel and nothing else.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma")
# Instruction sets, the best first. Of the vector ones simd.h says what it asks for, of the tiles matrix_tiles.h,
# of bf16 dot products linear_pairs.h.
_TARGET_FLAGS = {
    "AMX": (*_AVX512, "-mavx512bf16", "-DMEDHA_TILES"),
    "AVX512_BF16": (*_AVX512, "-mavx512bf16", "-DMEDHA_PAIRS"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma"),
    # For tests on other machines: the order of operations without the instructions, and the same bits.
    "AMX_PLAIN": (*_AVX512, "-DMEDHA_PLAIN_TILES"),
    "AVX512_BF16_PLAIN": (*_AVX512, "-DMEDHA_PLAIN_PAIRS"),
}
_CPU_FLAGS = {  # by the names of /proc/cpuinfo
    "AMX": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma", "avx512_bf16", "amx_tile", "amx_bf16"},
    "AVX512_BF16": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma", "avx512_bf16"},
    "AVX512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
    "AVX2": {"avx2", "fma"},
}
_PRIVATE_PREFIX = "megatron_medha-"
# GCC 12's own AVX-512 headers trip its warnings about uninitialised values; nothing here reads errno.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-w")
_BUILD_TIMEOUT_S = 900.0  # longer than on the busiest machine: kernels built for other instructions have other bits
BUILD_S = 15  # about, on one core that has nothing else to do

_pinned: str | None = None  # by use_target


class NativeUnavailable(Exception):
    """Why the library cannot be had on this machine; the message is for the log."""


@functools.cache
def usable_targets() -> tuple[str, ...]:
    """The instruction sets of this machine that there are kernels for, the best first. Raises NativeUnavailable."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NativeUnavailable(f"it is written for x86-64, and this machine is {platform.machine()}")
    flags = _cpu_flags()
    usable = [target for target, needed in _CPU_FLAGS.items() if needed <= flags]
    if "AMX" in usable and not _may_use_tiles():
        usable.remove("AMX")
    if not usable:
        raise NativeUnavailable("it needs AVX2 and FMA, which this machine lacks")
    return tuple(usable)


def use_target(name: str) -> None:
    """Settle what `native_target` is from now on; "auto": the best that can be had. Raises NativeUnavailable."""
    global _pinned
    if name != "auto" and name.upper() not in usable_targets():
        raise NativeUnavailable(f"this machine has {', '.join(usable_targets())}, not {name.upper()}")
    _pinned = None if name == "auto" else name.upper()


def native_target() -> str:
    """The instruction set that the kernels use. Raises NativeUnavailable."""
    return _pinned or _best_target()


def missed_targets() -> tuple[str, ...]:
    """Better instruction sets of this machine that the kernels do not use, as they could not be built for them."""
    if _pinned is not None:
        return ()
    return usable_targets()[: usable_targets().index(native_target())]


@functools.cache
def _best_target() -> str:
    """The best instruction set that the compiler knows as well."""
    targets = usable_targets()
    for target, worse in zip(targets, (*targets[1:], None), strict=True):
        try:
            native_library(target)
            return target
        except NativeUnavailable as error:
            if worse is None:
                raise
            log.warning(
                "native_kernels_unavailable target=%s next=%s reason=%s: outputs have other bits than where %s can be "
                "had; model.instruction_set=%s refuses to start instead",
                target, worse, error, target, target.lower(),
            )  # fmt: skip
    raise AssertionError("there is a target")


def native_library(target: str | None = None) -> ctypes.CDLL:
    """The library for `target`, by default native_target(); built unless a build of it is in the cache.

    Raises NativeUnavailable if there is no compiler, or it fails, or the machine lacks the instructions.
    """
    return _loaded(target or native_target())


@functools.cache
def _loaded(target: str) -> ctypes.CDLL:
    if target == "AMX" and target not in usable_targets():  # where the process gets its tile registers
        raise NativeUnavailable("this machine has no AMX, or Linux does not allow it")
    path = _built(target)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}") from error
    finally:
        if path.parent.name.startswith(_PRIVATE_PREFIX):
            shutil.rmtree(path.parent, ignore_errors=True)  # what is loaded stays
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    others = dict.fromkeys(("attend_shard", "merge_shards", "exp2"), [pointer, pointer, number])
    others["finish"] = [pointer, pointer]
    names = ("attend", "linear", "norm", "activate", "experts", "decoder", *others)
    for name in names:
        function = getattr(library, f"medha_{name}")
        function.argtypes, function.restype = others.get(name, [pointer]), ctypes.c_int
    library.medha_exp2.restype = None
    library.medha_set_points.argtypes, library.medha_set_points.restype = [pointer, number], None
    return library


@functools.cache
def gomp_parallel_address() -> int | None:
    """The address of GOMP_parallel in this process; None: no runtime that has it, and one thread does all the work.

    torch's own OpenMP threads are to do the work: a runtime linked to the library would have threads of its own, two
    sets of them on the same cores. The symbol is looked up by name, as wheels rename the file of the runtime.
    """
    return ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", None), ctypes.c_void_p).value


def is_built() -> bool:
    """Whether the library for this machine's best instruction set is in the cache: if not, the first use builds it."""
    try:
        target = _pinned or usable_targets()[0]
        return (cache_directory() / _file_name(target)).exists()
    except (NativeUnavailable, OSError, RuntimeError):  # RuntimeError: no home directory
        return False


def cache_directory() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME or ~/.cache, in a directory of the project's own."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megatron_medha"


def _built(target: str) -> Path:
    """The file of the library; ranks that start together build it once."""
    name = _file_name(target)
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / name
        if path.exists():
            return path
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(target, path)
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        log.info("native_kernels_not_cached reason=%s", error)
        directory = Path(tempfile.mkdtemp(prefix=_PRIVATE_PREFIX))  # for this process alone, until it is loaded
        try:
            _compile(target, directory / name)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory / name


def _file_name(target: str) -> str:
    return f"kernels-{target.lower()}-{_digest(target)}.so"


def _cpu_flags() -> set[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        raise NativeUnavailable("/proc/cpuinfo does not list what this processor has")
    return set(found[1].split())


def _may_use_tiles() -> bool:
    """Asks Linux for the tile registers, once for the process: they are large, and it has none until it asks."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return platform.system() == "Linux" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _digest(target: str) -> str:
    """Of everything the build depends on but the compiler."""
    digest = hashlib.sha256(repr((_FLAGS, _TARGET_FLAGS[target])).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(target: str, path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailable("there is no C++ compiler (c++, g++ or clang++, or $CXX)")
    started_s = time.monotonic()
    log.info("native_kernels_building target=%s expected_seconds=%d (once for this machine)", target, BUILD_S)
    # Beside its final place and then renamed: nobody ever loads half a file.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [compiler, *_FLAGS, *_TARGET_FLAGS[target], *sources, "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed: {(done.stderr or done.stdout).strip()[:500]}")
        os.replace(unfinished, path)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{compiler} took longer than {_BUILD_TIMEOUT_S:.0f} s") from error
    finally:
        unfinished.unlink(missing_ok=True)
    log.info("native_kernels_built target=%s path=%s seconds=%.1f", target, path, time.monotonic() - started_s)
