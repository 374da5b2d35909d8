"""Processes that run simulations. Imports none of them: each process loads compiled modules before it begins."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import TypeVar

from megatron_medha.system.compiled_core import use_compiled_core

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def processes(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes. An error or Ctrl-C in the block ends those at work, and the rest is not waited for."""
    before = active_children()
    # Not forked: a child must not inherit what threads and the progress bar hold.
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _begin) as pool:
        try:
            yield pool
        except BaseException:
            for child in active_children():
                if child not in before:
                    child.terminate()
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent acts on it
    use_compiled_core()


def run_all(
    pool: ProcessPoolExecutor, work: Callable[[T], R], items: Iterable[T], advance: Callable[[], object]
) -> Iterator[R]:
    """Results as they come."""
    for future in as_completed([pool.submit(work, item) for item in items]):
        advance()
        yield future.result()
