"""A private folder for sockets and the like, which does not outlive its process for long, however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "medha-"
_LOCK = "lock"
_LOCKED_WITHIN_S = 60.0


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A folder in the temporary one, gone at the end. Those of processes that were killed are removed first."""
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        directory = Path(name)
        # The kernel frees the lock when the process ends. It is held before it has its name: one that finds it free
        # finds it abandoned.
        with open(directory / "unlocked", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(directory / "unlocked", directory / _LOCK)
            yield directory


def remove_abandoned() -> None:
    """Remove the scratch folders of ours whose process is gone."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            with open(directory / _LOCK, encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # in use, or not one of these
            continue


def remove_abandoned_files(directory: Path, prefix: str) -> None:
    """The same for single files, which their owner has locked since soon after it made them."""
    for path in directory.glob(f"{prefix}*"):
        try:
            stat = path.lstat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < _LOCKED_WITHIN_S:
                continue
            with open(path, encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue
