"""Whether a file can be written, found out before the work whose result goes there."""

from __future__ import annotations

from pathlib import Path

from megatron_medha.core.errors import ConfigError


def check_writable(key: str, path: Path) -> None:
    """Make the directory of a file and see that the file can be opened; what it holds stays as it is.

    key: the user's name for it. Raises ConfigError.
    """
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_new or not path.is_fifo():  # to open a pipe is to wait for its reader
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be written ({error.strerror}); name another file") from error
    if is_new:
        path.unlink()
