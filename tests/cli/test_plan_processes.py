"""Ctrl-C ends a search at once, whatever its processes are at."""

from __future__ import annotations

import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from megatron_medha.cli.parts.process_pool import processes


def test_candidates_that_are_being_tried_do_not_hold_up_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), processes(1) as pool:
        at_work, waiting = pool.submit(time.sleep, 20.0), pool.submit(time.sleep, 20.0)
        raise KeyboardInterrupt
    assert isinstance(at_work.exception(), BrokenProcessPool)
    assert isinstance(waiting.exception(), BrokenProcessPool)


def test_a_search_that_ends_by_itself_loses_nothing() -> None:
    with processes(1) as pool:
        found = pool.submit(abs, -3)
    assert found.result() == 3
