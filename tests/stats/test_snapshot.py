"""What a scheduler has to do at one moment."""

from __future__ import annotations

from dataclasses import astuple

from megatron_medha.stats.snapshot import NO_LOAD


def test_before_the_first_look_nothing_is_counted() -> None:
    assert astuple(NO_LOAD) == (0, 0, 0, 0, 0, 0, 0)
