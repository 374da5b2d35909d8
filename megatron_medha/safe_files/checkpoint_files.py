"""Opening files of a checkpoint: regular ones, no larger than they may be, inside of its directory.

Checkpoints come from strangers: a FIFO would hold the start up for good, /dev/zero or a gigabyte of brackets
would fill the memory.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megatron_medha.core.errors import CheckpointError

MAX_JSON_BYTES = 4 << 20         # config.json and its like: kilobytes; in Python objects it takes 30 times as much
MAX_TOKENIZER_BYTES = 128 << 20  # the largest known are 35 MB
_MAX_CONTAINERS = 200_000        # in a JSON file: the garbage collector takes seconds over a million
_MAX_SHOWN = 80
_MAX_LINES, _MAX_LINE = 8, 1000


def open_regular(path: Path) -> BinaryIO:
    """The file, opened for reading. Raises CheckpointError if it is none, or a device, a pipe or a directory."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer. It means nothing for regular files.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a regular file")
    return file


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """All of a regular file. Raises CheckpointError if it is larger than that, or cannot be read."""
    with open_regular(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if content is None:  # /proc/kmsg, which calls itself a regular file, has nothing to read at present
        raise CheckpointError(f"{path}: cannot be read")
    if len(content) > max_bytes:
        raise CheckpointError(f"{path}: is larger than the limit of {max_bytes} bytes")
    return content


def read_word(path: Path) -> str:
    """The text of a file that holds one name or number."""
    return read_bytes(path, 4096).decode(errors="replace").strip()


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in that file. Raises CheckpointError when it cannot be read or is none."""
    content = read_bytes(path, max_bytes)
    if content.count(b"[") + content.count(b"{") > _MAX_CONTAINERS:
        raise CheckpointError(f"{path}: holds more than {_MAX_CONTAINERS} lists and objects, which no such file does")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def path_inside(directory: Path, name: object, source: str) -> Path:
    """The file of that name in the directory. Raises CheckpointError, with the source, for one that leads out of it."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    is_inside = parts and ".." not in parts and not str(name).startswith("/")
    # Longer ones, and those with a null, are no names: to look for them raises an OSError.
    if not is_inside or "\0" in str(name) or any(len(part.encode(errors="replace")) > 255 for part in parts):
        raise CheckpointError(f"{directory / source}: names {shown(name)}, which is no file inside of the directory")
    return directory.joinpath(*parts)


def shown(value: object) -> str:
    """A value for an error message, cut if it is long."""
    text = repr(value[: 2 * _MAX_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def cut(error: object) -> str:
    """An error's text, cut if it is long: some repeat what they have read."""
    text = str(error)
    return text if len(text) <= _MAX_LINE else text[:_MAX_LINE] + "..."


def listed(problems: Sequence[str]) -> str:
    """Problems, one a line; of many the first ones, and how many more there are."""
    lines = [cut(problem) for problem in problems[:_MAX_LINES]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more > 0 else lines)
