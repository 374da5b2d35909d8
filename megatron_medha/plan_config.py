"""The options of `medha plan`, and the candidates that they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import product

from megatron_medha.config import ModelOptions, ParallelOptions
from megatron_medha.core.config import SchedulerConfig
from megatron_medha.core.engine_costs import EngineCosts
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.hardware import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.policies import POLICIES
from megatron_medha.engine.outcome import Slo
from megatron_medha.engine.summary import LengthClasses
from megatron_medha.engine.workload import Workload, WorkloadConfig
from megatron_medha.sim.run_directory import RecordConfig
from megatron_medha.sim.trial import Trial, at_rate
from megatron_medha.sim.truth import TruthConfig
from megatron_medha.simulate_config import MemoryOptions, SimulateOptions, simulation_config


class Find(Enum):
    """What is looked for."""

    CHEAPEST = "cheapest"  # the fewest GPUs that meet the SLO under workload.qps
    CAPACITY = "capacity"  # the most load under which all GPUs of the hardware meet the SLO


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Everything a user can say, as conf/plan.yaml lays it out."""

    find: Find = Find.CHEAPEST
    policies: tuple[str, ...] = ("lars",)
    max_kvp: int = 4
    max_dp: int = 8
    trial_s: float = 600.0
    max_drain_s: float = 600.0
    resolution: float = 0.05
    num_processes: int | None = None
    seed: int = 0
    model: ModelOptions
    scheduler: SchedulerConfig
    hardware: Hardware
    engine: EngineCosts
    workload: WorkloadConfig
    slo: Slo
    classes: LengthClasses
    truth: TruthConfig
    memory: MemoryOptions

    def __post_init__(self) -> None:
        for policy in self.policies:
            if policy not in POLICIES:
                raise ConfigError(f"policies=[{policy}]: not known; choose from {', '.join(POLICIES)}")
        if not self.policies:
            raise ConfigError("policies=[]: name at least one")
        for key, low, high in (
            ("max_kvp", 1, 1 << 10),
            ("max_dp", 1, 1 << 20),
            ("trial_s", 1.0, 1e9),
            ("max_drain_s", 0.0, 1e9),
            ("resolution", 1e-3, 1.0),
            ("num_processes", 1, 1 << 10),
        ):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{key}={value:g}: must be between {low:g} and {high:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What can be tried, and what cannot be with the reason."""

    trials: tuple[Trial, ...]            # by GPUs, ascending
    impossible: tuple[tuple[ParallelLayout, str], ...]


def candidates(options: PlanOptions) -> Candidates:
    """Every layout that the hardware has GPUs for: tp within a node, powers of two, whatever fits the memory.

    Raises ConfigError if the hardware is a single device, or if nothing fits.
    """
    hardware = options.hardware
    if hardware.num_devices == 1:
        raise ConfigError(
            f"hardware={hardware.name}: a single device leaves nothing to search; take a cluster, like "
            "hardware=a100_x16, or give hardware.num_devices"
        )
    longest = _longest_request(options)
    trials: list[Trial] = []
    impossible: list[tuple[ParallelLayout, str]] = []
    tps = [degree for degree in _powers(hardware.devices_per_node) if degree <= hardware.num_devices]
    for tp, spp, kvp in product(tps, _powers(hardware.num_devices), _powers(options.max_kvp)):
        layout = ParallelLayout(tp=tp, spp=spp, kvp=kvp)
        if layout.world_size > hardware.num_devices:
            continue
        for policy in options.policies:
            try:
                trial = Trial(config=simulation_config(_simulate_options(options, layout, policy)))
            except ConfigError as error:
                impossible.append((layout, str(error)))
                break
            if trial.config.shard_tokens * kvp < longest:
                impossible.append(
                    (layout, f"its KV memory holds {trial.config.shard_tokens * kvp:,} tokens, and the longest "
                     f"request has {longest:,}")
                )  # fmt: skip
                break
            trials += [
                replace(trial, dp=dp)
                for dp in range(1, options.max_dp + 1)
                if dp * layout.world_size <= hardware.num_devices
            ]
    if not trials:
        layout, why = impossible[-1]
        raise ConfigError(
            f"hardware={hardware.name}: no layout can serve this workload; tp={layout.tp} spp={layout.spp} "
            f"kvp={layout.kvp}: {why}"
        )
    qps = options.workload.qps
    if qps is not None:
        trials = [at_rate(trial, qps) for trial in trials]
    elif any(trial.dp > 1 for trial in trials) or options.find is Find.CAPACITY:
        raise ConfigError("workload.qps=null: a plan varies the load on a replica; give requests per second")
    return Candidates(trials=tuple(sorted(trials, key=_by_cost)), impossible=tuple(impossible))


def _by_cost(trial: Trial) -> tuple[int, int, int, int]:
    layout = trial.config.setup.layout
    return trial.num_gpus, trial.dp, layout.kvp, layout.spp


def _simulate_options(options: PlanOptions, layout: ParallelLayout, policy: str) -> SimulateOptions:
    workload = options.workload
    duration_s = min(options.trial_s, workload.duration_s or options.trial_s)
    return SimulateOptions(
        seed=options.seed,
        max_drain_s=options.max_drain_s,
        model=options.model,
        parallel=ParallelOptions(tp=layout.tp, spp=layout.spp, kvp=layout.kvp),
        scheduler=replace(options.scheduler, policy=policy),
        hardware=options.hardware,
        engine=options.engine,
        workload=replace(workload, duration_s=duration_s),
        slo=options.slo,
        classes=options.classes,
        truth=options.truth,
        memory=options.memory,
        record=RecordConfig(),
    )


def _longest_request(options: PlanOptions) -> int:
    duration_s = min(options.trial_s, options.workload.duration_s or options.trial_s)
    return Workload(replace(options.workload, duration_s=duration_s), options.seed).facts.max_request_tokens


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]
