"""A text file written beside serving: when it can be written no more, the log says so, and serving goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol, TextIO

_log = logging.getLogger(__name__)


class TextSink(Protocol):
    """Where text goes."""

    def write(self, text: str, /) -> object:
        """Add the text at the end."""


class BestEffortFile:
    """Requests must not end because the disk is full that a log of them is written to."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path = path
        self._stream: TextIO | None = stream

    @classmethod
    def open(cls, path: Path, *, by_line: bool) -> BestEffortFile:
        """A new file; with by_line a crash of this process loses no line. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, path.open("w", buffering=1 if by_line else -1, encoding="utf-8"))

    def write(self, text: str, /) -> None:
        """Add the text at the end, unless something before could not be written."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Write what is not on disk yet, and close."""
        if self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:
                self._give_up(error)
            self._stream = None

    def _give_up(self, error: OSError) -> None:
        _log.error("file_write_failed path=%s reason=%r", self._path, error.strerror)
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except OSError:
                pass  # it still holds what could not be written
