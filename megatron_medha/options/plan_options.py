"""The options of `medha plan`, and the candidates that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import product
from pathlib import Path

from megatron_medha.core.errors import ConfigError, check_range
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.options.serve_options import ParallelOptions
from megatron_medha.options.simulate_options import SimulatedSystem, SimulateOptions, simulation_config
from megatron_medha.sim.baselines.baseline_config import BaselineConfig
from megatron_medha.sim.planning.candidate import PlanCandidate
from megatron_medha.sim.planning.trial_window import TrialWindow, choose_window
from megatron_medha.sim.run_directory import RecordConfig
from megatron_medha.sim.system import SystemConfig, SystemKind


class PlanGoal(Enum):
    """What is looked for."""

    CHEAPEST = "cheapest"  # the fewest GPUs that meet the SLO under workload.qps
    CAPACITY = "capacity"  # the most load under which all GPUs of the hardware meet the SLO


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(SimulatedSystem):
    """Everything a user can say, as conf/plan.yaml lays it out."""

    find: PlanGoal = PlanGoal.CHEAPEST
    schedulers: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    gpu_usd_per_h: float | None = None
    out: Path | None = None
    each_class: bool = False
    max_kvp: int = 4
    max_dp: int = 8
    trial_s: float | None = None
    max_drain_s: float = 600.0
    resolution: float = 0.05
    num_processes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key, low, high in (
            ("gpu_usd_per_h", 0.0, 1e6),
            ("max_kvp", 1, 1 << 10),
            ("max_dp", 1, 1 << 20),
            ("trial_s", 1.0, 1e9),
            ("max_drain_s", 0.0, 1e9),
            ("resolution", 1e-3, 1.0),
            ("num_processes", 1, 1 << 10),
        ):
            check_range(key, getattr(self, key), low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to decide that is tried in every layout."""

    name: str  # an option of scheduler=, or of system= where no scheduler of ours decides
    system: SystemConfig
    scheduler: BaselineConfig

    def is_tried_in(self, layout: ParallelLayout, devices_per_node: int) -> bool:
        """A system of instances cuts GPUs by rules of its own: of all layouts of its GPUs it is tried in one."""
        if self.system.kind is SystemKind.MEDHA:
            return True
        return layout.kvp == 1 and layout.tp == min(layout.world_size, devices_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSearchSpace:
    """What can be tried, and what cannot be with the reason."""

    trials: tuple[PlanCandidate, ...]            # by GPUs, ascending
    window: TrialWindow                  # the requests that all of them are tried on
    impossible: tuple[tuple[ParallelLayout, str], ...]  # layouts that no contender can have


def candidates(options: PlanOptions, contenders: Sequence[Contender]) -> PlanSearchSpace:
    """Every layout that the hardware has GPUs for: tp within a node, powers of two, whatever fits the memory.

    Raises ConfigError if the hardware is a single device, or if nothing fits.
    """
    hardware = options.hardware
    if hardware.num_devices == 1:
        raise ConfigError(
            f"hardware={hardware.name}: a single device leaves nothing to search; take a cluster, like "
            "hardware=a100_x16, or give hardware.num_devices"
        )
    window = choose_window(
        options.workload,
        options.seed,
        options.classes,
        attainment=options.slo.attainment,
        each_class=options.each_class,
        trial_s=options.trial_s,
    )
    if options.find is PlanGoal.CAPACITY and options.workload.sessions is not None:
        raise ConfigError("workload=sessions find=capacity: turns come when earlier ones have ended, at no rate that "
            "could be varied; use find=cheapest with more or fewer workload.sessions.max_live")
    if options.find is PlanGoal.CAPACITY and options.workload.qps is None:
        raise ConfigError("workload.qps=null: find=capacity varies the load from there; give requests per second")
    longest = window.max_request_tokens
    trials: list[PlanCandidate] = []
    impossible: list[tuple[ParallelLayout, str]] = []
    tps = [degree for degree in _powers(hardware.devices_per_node) if degree <= hardware.num_devices]
    for tp, spp, kvp in product(tps, _powers(hardware.num_devices), _powers(options.max_kvp)):
        layout = ParallelLayout(tp=tp, spp=spp, kvp=kvp)
        if layout.world_size > hardware.num_devices:
            continue
        num_possible, why = 0, ""
        tried = [one for one in contenders if one.is_tried_in(layout, hardware.devices_per_node)]
        for contender in tried:
            try:
                config = simulation_config(_simulate_options(options, layout, contender, window))
            except ConfigError as error:
                why = str(error)
                continue
            if (most := config.max_request_tokens) < longest:
                why = f"its KV memory holds {most:,} tokens of one request, and the longest has {longest:,}"
                continue
            num_possible += 1
            trials += [
                PlanCandidate(name=contender.name, config=replace(config, dp=dp), each_class=options.each_class)
                for dp in range(1, options.max_dp + 1)
                if dp * layout.world_size <= hardware.num_devices
            ]
        if tried and not num_possible:
            impossible.append((layout, why))
    if not trials:
        layout, why = impossible[-1]
        raise ConfigError(
            f"hardware={hardware.name}: no layout can serve this workload; tp={layout.tp} spp={layout.spp} "
            f"kvp={layout.kvp}: {why}"
        )
    return PlanSearchSpace(
        trials=tuple(sorted(trials, key=_by_cost)),
        window=window,
        impossible=tuple(impossible),
    )


def can_be_served(trial: PlanCandidate) -> bool:
    """Whether medha serve has it: other systems and baseline schedulers are for comparisons alone."""
    return trial.config.instances is None and not isinstance(trial.config.setup.config, BaselineConfig)


def _by_cost(trial: PlanCandidate) -> tuple[int, int, int, int]:
    layout = trial.config.setup.layout
    return trial.num_gpus, trial.dp, layout.kvp, layout.spp


def _simulate_options(
    options: PlanOptions, layout: ParallelLayout, contender: Contender, window: TrialWindow
) -> SimulateOptions:
    shared = {field.name: getattr(options, field.name) for field in fields(SimulatedSystem)}
    shared |= {"system": contender.system, "scheduler": contender.scheduler, "workload": window.workload}
    parallel = ParallelOptions(tp=layout.tp, spp=layout.spp, kvp=layout.kvp)
    return SimulateOptions(**shared, max_drain_s=options.max_drain_s, parallel=parallel, record=RecordConfig())


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]
