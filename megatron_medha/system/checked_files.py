"""Checks of files that options name: whether results can be written, and who else could read or change keys."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from megatron_medha.core.errors import ConfigError

_log = logging.getLogger(__name__)

_DOCKER_SECRETS = Path("/run/secrets")


def check_private(path: Path, key: str) -> None:
    """ConfigError naming the option `key` if others can change the file or read it.

    PostgreSQL's rule for its TLS key: it belongs to this user and is 0600 or less, or to root and is 0640 or less. In
    a volume of secrets (Kubernetes, Docker) files are 0644 or 0444 by default: there, only who could change one counts.
    """
    try:
        found = path.stat()  # of what a symbolic link leads to
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}") from None
    mode, user = stat.S_IMODE(found.st_mode), os.geteuid()
    if found.st_uid not in (user, 0):
        raise ConfigError(
            f"{key}={path} belongs to user {found.st_uid}, who could change it; `chown {user} {path}`"
        )
    allowed = 0o740 if found.st_uid == 0 else 0o700
    if not mode & 0o777 & ~allowed:
        return
    if not mode & 0o022 and _is_in_volume(path):
        _log.info("key_file_readable_by_others key=%s mode=%o", key, mode)
        return
    raise ConfigError(
        f"{key}={path} can be {'changed' if mode & 0o022 else 'read'} by others (mode {mode:04o}); `chmod 600 {path}`, "
        f"or 0440 and fsGroup in a pod"
    )


def _is_in_volume(path: Path) -> bool:
    # Kubernetes makes every file of such a volume a link through `..data`.
    return (path.parent / "..data").is_symlink() or path.absolute().is_relative_to(_DOCKER_SECRETS)


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
