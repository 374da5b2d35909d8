"""Simulations as `medha simulate` would run them, from its own options."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.simulation import SimulationConfig


def configured(words: Sequence[str]) -> SimulationConfig:
    """Of these options of `medha simulate`."""
    return simulation_config(freeze(compose("simulate", SimulateOptions, list(words)), SimulateOptions))


def session_words(**values: float) -> list[str]:
    """Fields of workload.sessions, as options."""
    return [f"workload.sessions.{name}={value}" for name, value in values.items()]
