"""How other threads reach the engine's thread: a queue whose arrival wakes a poll on a file descriptor."""

from __future__ import annotations

import os
import weakref
from collections import deque

from megatron_medha.core.batch import Event


class Inbox:
    """Events from any thread, taken up by one. Put None to end the loop."""

    def __init__(self) -> None:
        self._events: deque[Event | None] = deque()  # append and popleft are atomic
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        # Other threads may put something for as long as they hold it: only then is a descriptor free for others.
        self._closing = weakref.finalize(self, _close, self._read_fd, self._write_fd)

    def put(self, event: Event | None) -> None:
        """Add an event and wake the engine."""
        self._events.append(event)
        try:
            os.write(self._write_fd, b"x")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def fileno(self) -> int:
        """Readable while there may be events."""
        return self._read_fd

    def drain(self) -> list[Event | None]:
        """Everything put so far, oldest first."""
        try:
            os.read(self._read_fd, 65536)
        except BlockingIOError:
            pass  # woken by something else
        events: list[Event | None] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self) -> None:
        """Give the descriptors back; nothing may be put any more."""
        self._closing()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
