"""What making a checkpoint needs, trained or converted: one rank of its own, and a directory that appears whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.groups import init_distributed
from megatron_medha.system.machine import num_usable_cores

_MAX_THREADS = 16  # the matrices are small: more threads wait for each other


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, unless there is one, and as many threads as there are cores."""
    num_threads = torch.get_num_threads()
    was_initialized = dist.is_initialized()
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    torch.set_num_threads(min(_MAX_THREADS, num_usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if not was_initialized:
            dist.destroy_process_group()


@contextmanager
def unfinished(directory: Path, key: str = "directory") -> Iterator[Path]:
    """A directory beside it to write into, which becomes it if all goes well and vanishes otherwise."""
    target = directory.with_name(f".{directory.name}.unfinished-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir()
    except OSError as error:
        raise ConfigError(f"{key}={directory}: cannot be written ({error.strerror}); name another") from error
    try:
        yield target
        target.replace(directory)  # takes the place of an empty directory too
    finally:
        shutil.rmtree(target, ignore_errors=True)


def refuse_filled(directory: Path) -> None:
    """Raise ConfigError if something is there."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} already exists and is not empty: delete it or name another directory")
