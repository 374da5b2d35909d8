"""SIGINT and SIGTERM of `medha serve`: the first one drains, the second one ends the process for certain."""

from __future__ import annotations

import _thread
import faulthandler
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_medha.cli.parts.status_printer import print_line

EXIT_CODE_SIGNALLED = 130
_HARD_EXIT_S = 5.0  # after the second signal, where stopping at once does not work


class StopSignals:
    """SIGINT and SIGTERM: before the server listens they end the start, then uvicorn takes them and we count."""

    def __init__(self) -> None:
        self.num_signals = 0
        self.is_early = False
        self._num_ends = 0

    def install_early_handlers(self) -> None:
        """From now on; uvicorn puts these back when it has shut down and raises its signal again."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def count(self, is_asked_for: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Count, and pass on to the handlers installed since. Not every signal comes from a user.

        waits_for: what the first one waits for, and how long; nothing if empty.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._counting(signal.getsignal(number), is_asked_for, waits_for))

    def _counting(
        self, inner: Any, is_asked_for: Callable[[], bool], waits_for: Callable[[], str]
    ) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.num_signals += 1
            if self.num_signals == 1 and is_asked_for():
                print_line(f"\nstopping{waits_for()}")
            elif self.num_signals == 2:
                _force_exit()
            elif self.num_signals > 2:
                os._exit(EXIT_CODE_SIGNALLED)
            inner(number, frame)

        return handle

    def _end(self, number: int, frame: FrameType | None) -> None:
        # Once it comes while the server starts, or from uvicorn after it has stopped; after that, what is left hangs.
        self._num_ends += 1
        if self._num_ends > 1:
            os._exit(EXIT_CODE_SIGNALLED)
        self.is_early = not self.num_signals
        raise KeyboardInterrupt


def _force_exit() -> None:
    """End within seconds, whatever the event loop and other threads do; ranks end with this process."""
    # A thread of C: where another holds the interpreter's lock, none of Python's runs. It prints where all are.
    faulthandler.dump_traceback_later(_HARD_EXIT_S + 1.0, exit=True)
    # Not threading's: the signal may have come while the main thread held one of its locks.
    _thread.start_new_thread(_schedule_force_exit, ())


def _schedule_force_exit() -> None:
    time.sleep(_HARD_EXIT_S)
    os._exit(EXIT_CODE_SIGNALLED)
