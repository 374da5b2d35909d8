"""conf/ for the commands that simulate: every option composes, and the defaults shown are those of the classes."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import megatron_medha
from megatron_medha.options.compose import compose, freeze, option_names
from megatron_medha.options.plan_options import PlanOptions
from megatron_medha.options.simulate_options import MemoryOptions, SimulateOptions, simulation_config
from megatron_medha.sim.run_directory import RecordConfig
from megatron_medha.sim.system import SystemConfig
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig

CONF = Path(megatron_medha.__file__).parents[1] / "conf"


def shown(name: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "defaults"}


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("slo/medha", Slo),
        ("classes/medha", LengthClasses),
        ("truth/exact", TruthConfig),
        ("memory/standard", MemoryOptions),
        ("record/standard", RecordConfig),
        ("system/medha", SystemConfig),
    ],
)
def test_the_default_option_shows_every_key_with_the_default_of_the_class(name: str, component: type) -> None:
    assert shown(name) == {field.name: plain(field.default) for field in dataclasses.fields(component)}


@pytest.mark.parametrize(("name", "component"), [("simulate", SimulateOptions), ("plan", PlanOptions)])
def test_the_file_of_a_command_shows_every_key_with_the_default_of_the_class(name: str, component: type) -> None:
    own = {field.name: plain(field.default) for field in dataclasses.fields(component)
           if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default)}  # fmt: skip
    assert {key: value for key, value in shown(name).items() if not isinstance(value, dict)} == own


def test_the_mix_shows_every_key_of_a_workload_with_load_and_end_set() -> None:
    defaults = {field.name: plain(field.default) for field in dataclasses.fields(WorkloadConfig)}
    assert shown("workload/medha_mix_05pct") == defaults | {"qps": 0.75, "duration_s": 600.0}


@pytest.mark.parametrize("group", ["slo", "classes", "truth", "memory", "record", "engine", "scheduler", "system"])
def test_every_option_composes(group: str) -> None:
    for option in option_names(group):
        words = [f"{group}={option}", "hardware=a100_x16", "parallel.tp=8", "parallel.spp=2"]
        config = simulation_config(freeze(compose("simulate", SimulateOptions, words), SimulateOptions))
        assert config.setup.layout.world_size == 16


@pytest.mark.parametrize("option", [name for name in option_names("workload") if name.startswith("medha")])
def test_the_mixes_differ_by_their_share_of_long_requests(option: str) -> None:
    options = freeze(compose("simulate", SimulateOptions, [f"workload={option}"]), SimulateOptions)
    assert options.workload.long_share == pytest.approx(int(option[-5:-3]) / 100, abs=0.006)
