"""Which system decides in a simulation: the one place where a configuration becomes a Decisions object."""

from __future__ import annotations

from megatron_medha.engine.ports import Decisions
from megatron_medha.engine.scheduler_setup import SchedulerSetup


def build_system(setup: SchedulerSetup) -> Decisions:
    """The system under test, which has seen nothing yet. Baseline systems that are no Scheduler are built here too."""
    return setup.build()
